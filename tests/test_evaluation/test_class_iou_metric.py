"""Each class's score as a number: that of MMSegmentation's printed table."""

import math

import numpy as np
import pytest
import torch
from mmengine.registry import METRICS, init_default_scope

from mmstabvim import ClassIoUMetric

CLASSES = ('road', 'tree', 'car', 'sign')
# a row of each image: truth and prediction; nobody ever says `sign`
TRUTH = [[0, 0, 0, 1, 1, 255], [2, 2, 0, 0, 1, 1]]
GUESS = [[0, 0, 1, 1, 1, 2], [2, 0, 0, 0, 1, 2]]
# intersection over union, pixel by pixel; 255 does not count
EXPECTED = {'road': 4 / 6, 'tree': 3 / 5, 'car': 1 / 3}


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmseg')
    yield
    init_default_scope('mmpretrain')


@pytest.fixture
def printed(monkeypatch):
    """The tables that IoUMetric prints, each as rows of cells."""
    from mmseg.evaluation.metrics import iou_metric

    tables = []

    def note(message, logger=None):
        rows = [
            [cell.strip() for cell in line.strip('|').split('|')]
            for line in message.split('\n')
            if line.startswith('|')
        ]
        if rows:
            tables.append(rows)

    monkeypatch.setattr(iou_metric, 'print_log', note)
    return tables


def evaluate(**kwargs):
    """Scores of the two images."""
    metric = METRICS.build(dict(type='mmstabvim.ClassIoUMetric', **kwargs))
    metric.dataset_meta = dict(classes=CLASSES)
    samples = [
        dict(
            gt_sem_seg=dict(data=torch.tensor([[truth]])),
            pred_sem_seg=dict(data=torch.tensor([[guess]])),
            img_path='image.png',
        )
        for truth, guess in zip(TRUTH, GUESS, strict=True)
    ]
    metric.process({}, samples)
    return metric.evaluate(len(samples))


def test_values_of_each_class():
    scores = evaluate()
    for name, value in EXPECTED.items():
        assert scores[f'IoU/{name}'] == pytest.approx(100 * value, abs=0.005)
    assert math.isnan(scores['IoU/sign'])
    mean = 100 * np.mean(list(EXPECTED.values()))
    assert scores['mIoU'] == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize('nan_to_num', [None, 0])
def test_same_as_the_printed_table(printed, nan_to_num):
    scores = evaluate(nan_to_num=nan_to_num)
    ((header, *rows),) = printed
    assert header[:2] == ['Class', 'IoU']
    assert [row[0] for row in rows] == list(CLASSES)
    for name, value, *_ in rows:
        np.testing.assert_allclose(scores[f'IoU/{name}'], float(value))


def test_means_are_those_of_iou_metric():
    """Which are returned beside the new values."""
    from mmseg.evaluation import IoUMetric

    scores = evaluate(iou_metrics=['mIoU', 'mDice'])
    plain = METRICS.build(
        dict(type='IoUMetric', iou_metrics=['mIoU', 'mDice'])
    )
    assert type(plain) is IoUMetric
    plain.dataset_meta = dict(classes=CLASSES)
    plain.results = [
        IoUMetric.intersect_and_union(*map(torch.tensor, pair), 4, 255)
        for pair in zip(GUESS, TRUTH, strict=True)
    ]
    means = plain.evaluate(2)
    new = {f'IoU/{name}' for name in CLASSES}
    assert scores.keys() == means.keys() | new
    assert {key: scores[key] for key in means} == means


def test_only_what_is_asked_for(tmp_path):
    """Without mIoU, and where masks are written only."""
    assert 'mDice' in evaluate(iou_metrics=['mDice'])
    assert not any('/' in key for key in evaluate(iou_metrics=['mDice']))
    folder = tmp_path / 'masks'
    assert evaluate(format_only=True, output_dir=str(folder)) == {}
    assert (folder / 'image.png').is_file()


def test_public_names():
    """In the package and, loaded on first use, in the sub-package."""
    import mmstabvim.evaluation

    assert mmstabvim.evaluation.ClassIoUMetric is ClassIoUMetric
    assert 'ClassIoUMetric' in mmstabvim.__all__
    with pytest.raises(AttributeError, match=r'evaluation.*NoSuchMetric'):
        _ = mmstabvim.evaluation.NoSuchMetric
