"""The published models by name, in the toolkits' hubs."""

import copy
import subprocess
import sys

import mmengine.hub
import pytest
import torch

import mmstabvim  # noqa: F401
from mmstabvim.models.vim_checkpoint import to_official

NAMES = (
    'vim-tiny-p16_3rdparty_in1k',
    'vim-small-p16_3rdparty_in1k',
    'vim-base-p16_3rdparty_in1k',
    'vim-tiny-p16-s8_3rdparty_in1k',
    'vim-small-p16-s8_3rdparty_in1k',
)


@pytest.mark.parametrize(
    'imports',
    ['import mmstabvim, mmpretrain', 'import mmpretrain, mmstabvim'],
)
def test_names_are_listed_whoever_is_imported_first(imports):
    code = f"{imports}\nprint(*mmpretrain.list_models('*vim*'))"
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(NAMES) <= set(done.stdout.split())


@pytest.mark.parametrize('name', NAMES)
def test_number_of_parameters(name):
    """That the index states is that of the model."""
    import mmpretrain
    from mmpretrain.apis.model import ModelHub

    with torch.device('meta'):
        model = mmpretrain.get_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == ModelHub.get(name).metadata.parameters


def test_weights_of_a_local_official_file(tmp_path):
    import mmpretrain

    arch = dict(embed_dims=16, num_layers=2, _delete_=True)
    small = dict(backbone=dict(arch=arch), head=dict(in_channels=16))
    name = NAMES[0]
    torch.manual_seed(1)
    donor = mmpretrain.get_model(name, **copy.deepcopy(small))
    official, unused = to_official(donor.state_dict())
    assert not unused
    torch.save({'model': official}, tmp_path / 'vim.pth')
    torch.manual_seed(2)
    model = mmpretrain.get_model(
        name, pretrained=str(tmp_path / 'vim.pth'), **copy.deepcopy(small)
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, donor.state_dict()[key]), key


@pytest.mark.parametrize(
    ('config', 'kind'),
    [
        ('vim/vim-nano-p4_1xb64-20e_digits.py', 'ImageClassifier'),
        (
            'upernet/vim-nano-p4_upernet_1xb8-2k_digit-scenes-64x64.py',
            'EncoderDecoder',
        ),
    ],
)
def test_mmengine_hub_builds(config, kind):
    model = mmengine.hub.get_model(f'mmstabvim::{config}')
    assert type(model).__name__ == kind


def test_no_weights_are_promised():
    with pytest.raises(ValueError, match='pretrained must be False'):
        mmengine.hub.get_model(
            'mmstabvim::vim/vim-tiny-p16_8xb128_in1k.py', pretrained=True
        )
