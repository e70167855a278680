"""Converting official checkpoints, there and back, and refusing others."""

from argparse import Namespace

import pytest
import torch
from converter_runs import converter, refusal, same
from safetensors.torch import save_file

from mmstabvim import VisionMamba
from mmstabvim.models.vim_checkpoint import (
    describe,
    from_official,
    to_official,
)


@pytest.fixture
def convert(capsys):
    """Run the tool in this process and return what it printed."""
    return converter('vim_to_mmpretrain', capsys)


@pytest.fixture
def state():
    """Weights of a small classifier, under this project's names."""
    torch.manual_seed(0)
    backbone = VisionMamba(
        dict(embed_dims=8, num_layers=2, d_state=4), img_size=32
    )
    state = {f'backbone.{k}': v for k, v in backbone.state_dict().items()}
    state['head.fc.weight'] = torch.randn(5, 8)
    state['head.fc.bias'] = torch.randn(5)
    return state


@pytest.fixture
def official(state):
    return to_official(state)[0]


def test_golden_checkpoint(golden, tmp_path, convert):
    """A file as published: weights, their average, arguments, optimizer."""
    data = golden('vim_cls_midcls.npz')
    state = {
        key.removeprefix('state/'): torch.from_numpy(data[key])
        for key in data.files
        if key.startswith('state/')
    }
    average = {k: v + 1 for k, v in state.items()}
    source = tmp_path / 'official.pth'
    torch.save(
        {
            'model': state,
            'model_ema': average,
            'optimizer': {'state': {}},
            'epoch': 3,
            'args': Namespace(model='vim'),
        },
        source,
    )
    for flags, weights in (([], state), (['--ema'], average)):
        said = convert(source, tmp_path / 'new.pth', '--overwrite', *flags)
        assert 'embed_dims=48, num_layers=4, d_state=16' in said
        assert 'every weight was used' in said
        new = torch.load(tmp_path / 'new.pth', weights_only=True)
        assert same(new['state_dict'], from_official(weights)[0])

        back = tmp_path / 'back.pth'
        convert(tmp_path / 'new.pth', back, '--reverse', '--overwrite')
        assert same(torch.load(back, weights_only=True)['model'], weights)


def test_names_go_there_and_back(state, official):
    assert 'layers.1.mixer.A_b_log' in official
    assert 'layers.0.mixer.conv1d_b.bias' in official
    again, unused = from_official(official)
    assert not unused
    assert same(again, state)
    assert describe(state) == dict(
        embed_dims=8,
        num_layers=2,
        d_state=4,
        patch_size=16,
        num_classes=5,
        num_tokens=5,
        num_cls_tokens=1,
    )


def test_two_class_tokens(state):
    state['backbone.cls_token'] = torch.randn(1, 2, 8)
    official, _ = to_official(state)
    assert 'cls_token' not in official
    assert torch.equal(
        official['cls_token_tail'], state['backbone.cls_token'][:, 1:]
    )
    assert same(from_official(official)[0], state)


def test_unused_keys_are_reported(official, tmp_path, convert):
    official['rope.freqs_cos'] = torch.zeros(4, 8)
    official['layers.0.mixer.gamma'] = torch.zeros(8)
    source = tmp_path / 'vim.pth'
    torch.save({'model': official}, source)
    said = convert(source, tmp_path / 'new.pth')
    assert 'not used: rope.freqs_cos' in said
    assert 'not used: layers.0.mixer.gamma' in said
    assert 'every weight was used' not in said


def test_other_files_are_refused(official, tmp_path, convert, capsys):
    """Another model, a unidirectional Mamba, a wrong key, no tensors."""
    one_way = {k: v for k, v in official.items() if '_b' not in k}
    cases = {
        'resnet': ({'model': {'conv1.weight': torch.zeros(3)}}, 'no Vim'),
        'one_way': ({'model': one_way}, 'not a complete bidirectional Vim'),
        'no_key': ({'weights': official}, "must hold 'model'"),
        'strange': ({'model': {'a': 3}}, 'are no tensors'),
    }
    for name, (content, message) in cases.items():
        source = tmp_path / f'{name}.pth'
        torch.save(content, source)
        said = refusal(convert, capsys, source, tmp_path / 'new.pth')
        assert message in said
        assert str(source) in said
        assert not (tmp_path / 'new.pth').exists()


def test_broken_files_are_refused(official, tmp_path, convert, capsys):
    source = tmp_path / 'vim.pth'
    torch.save({'model': official}, source)
    source.write_bytes(source.read_bytes()[:1000])
    for path in (source, tmp_path / 'none.pth'):
        said = refusal(convert, capsys, path, tmp_path / 'new.pth')
        assert str(path) in said


def test_nothing_is_overwritten_unasked(official, tmp_path, convert, capsys):
    source = tmp_path / 'vim.pth'
    torch.save({'model': official}, source)
    before = source.read_bytes()
    assert 'pass --overwrite' in refusal(convert, capsys, source, source)
    assert source.read_bytes() == before


def test_names_of_a_distributed_model(official, tmp_path, convert):
    """``module.`` before the official names; also from safetensors."""
    wrapped = {f'module.{k}': v.contiguous() for k, v in official.items()}
    torch.save({'model': wrapped}, tmp_path / 'a.pth')
    save_file(wrapped, tmp_path / 'a.safetensors')
    for name in ('a.pth', 'a.safetensors'):
        said = convert(tmp_path / name, tmp_path / f'{name}.new')
        assert 'every weight was used' in said
        new = torch.load(tmp_path / f'{name}.new', weights_only=True)
        assert same(to_official(new['state_dict'])[0], official)
