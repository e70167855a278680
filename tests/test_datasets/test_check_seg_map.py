"""The transform that refuses masks, and loading it when it is asked for."""

import subprocess
import sys

import numpy as np
import pytest
from mmengine.registry import TRANSFORMS

from mmstabvim import CheckSegMap


def results(mask, **kwargs):
    return dict(
        gt_seg_map=np.array(mask, np.uint8),
        ori_shape=(2, 3),
        img_path='a.jpg',
        seg_map_path='a.png',
        **kwargs,
    )


def test_good_mask_passes_unchanged():
    check = CheckSegMap(num_classes=3)
    good = results([[0, 1, 2], [255, 0, 0]])
    before = {key: np.copy(value) for key, value in good.items()}
    after = check(good)
    assert after is good
    assert after.keys() == before.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_resized_image_counts_as_it_was():
    """In a test the image is resized before the mask is loaded."""
    good = results(np.zeros((2, 3)), img_shape=(4, 6))
    CheckSegMap(num_classes=3)(good)


@pytest.mark.parametrize(
    ('mask', 'message'),
    [
        (np.zeros((3, 2)), r'a\.png.*a\.jpg, \(2, 3\), got \(3, 2\)'),
        (np.zeros((2, 3, 3)), r'a\.png.*\(2, 3\), got \(2, 3, 3\)'),
        ([[0, 3, 0], [7, 0, 255]], r'a\.png.*0 to 2 or 255.*got \[3, 7\]'),
        ([[0, 254, 0], [0, 0, 0]], r'a\.png.*got \[254\]'),
    ],
    ids=['size', 'channels', 'labels', 'one-below-ignored'],
)
def test_bad_mask(mask, message):
    with pytest.raises(ValueError, match=message):
        CheckSegMap(num_classes=3)(results(mask))


def test_one_class_means_two_labels():
    with pytest.raises(ValueError, match='CheckSegMap is 2 for two classes'):
        CheckSegMap(num_classes=1)(results([[0, 1, 0], [0, 0, 255]]))


def test_other_ignored_label():
    check = CheckSegMap(num_classes=3, ignore_index=9)
    check(results([[0, 9, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r'2 or 9 .*got \[255\]'):
        check(results([[0, 255, 0], [0, 0, 0]]))


def test_without_the_name_of_a_file():
    bad = results([[5, 0, 0], [0, 0, 0]])
    del bad['seg_map_path'], bad['img_path'], bad['ori_shape']
    bad['img_shape'] = (2, 3)
    with pytest.raises(ValueError, match=r'without seg_map_path.*got \[5\]'):
        CheckSegMap(num_classes=3)(bad)


def test_without_a_mask():
    """An inferencer's pipeline loads none."""
    image = dict(img=np.zeros((2, 3, 3)), ori_shape=(2, 3))
    assert CheckSegMap(num_classes=3)(image) is image


def test_bad_argument():
    with pytest.raises(ValueError, match=r'num_classes.*got 0'):
        CheckSegMap(num_classes=0)


def test_built_by_name():
    built = TRANSFORMS.build(dict(type='mmstabvim.CheckSegMap', num_classes=5))
    assert isinstance(built, CheckSegMap)
    assert repr(built) == 'CheckSegMap(num_classes=5, ignore_index=255)'


def test_without_mmseg():
    """Digits work; what is missing is said where it is asked for."""
    code = (
        'import sys\n'
        'sys.modules["mmseg"] = None\n'
        'from mmengine.registry import DATASETS\n'
        'import mmstabvim\n'
        'split = dict(type="mmstabvim.Digits", split="test")\n'
        'assert len(DATASETS.build(split)) > 0\n'
        'assert "mmcv" not in sys.modules\n'
        'try:\n'
        '    DATASETS.build(dict(type="mmstabvim.CamVidDataset"))\n'
        'except ImportError as error:\n'
        '    print(error)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 'CamVidDataset needs MMSegmentation: pip install' in done.stdout


def test_names_that_do_not_exist():
    import mmstabvim.datasets

    with pytest.raises(AttributeError, match='NoSuchDataset'):
        _ = mmstabvim.datasets.NoSuchDataset
