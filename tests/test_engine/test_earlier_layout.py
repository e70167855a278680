"""Checkpoints of version 0.1, whose directions were modules.

The files in ``tests/data/earlier_layout`` are of three trainings by that
version: after two iterations, and the weights after the third.
"""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmpretrain.structures import DataSample
from torch.utils.data import Dataset

from mmstabvim import VisionMamba
from mmstabvim.engine import launch
from mmstabvim.engine.earlier_layout import convert_checkpoint
from mmstabvim.layers.earlier_layout import stack_directions
from mmstabvim.loading import load_weights

FILES = Path(__file__).parents[1] / 'data' / 'earlier_layout'
OPTIMIZER = dict(type='AdamW', lr=0.02, weight_decay=0.05)
EMA = dict(type='EMAHook', momentum=0.2)
CASES = dict(
    neg_exp=(dict(type='neg_exp'), {}, [EMA]),
    full_reparam=(
        dict(type='full', groups=2),
        dict(
            paramwise_cfg=dict(
                norm_decay_mult=0.0,
                bias_decay_mult=0.0,
                flat_decay_mult=0.0,
                custom_keys={'.state_matrix': dict(decay_mult=0.0)},
            )
        ),
        [
            dict(
                type='mmstabvim.SpectralNormalizationHook',
                rho_max='init',
                mode='reparam',
            ),
            dict(
                type='mmstabvim.EigenvalueClampingHook',
                eps=1.5,
                mode='reparam',
            ),
            EMA,
        ],
    ),
    complex_layer_decay=(
        dict(type='complex', init='ptd', hippo_bias=True),
        dict(
            constructor='mmstabvim.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.7, flat_decay_mult=0.0),
        ),
        [dict(type='mmstabvim.EigenvalueClampingHook', eps=0.5)],
    ),
)


@DATASETS.register_module(force=True)
class FourImages(Dataset):
    """The images that the earlier trainings saw."""

    metainfo: ClassVar = dict(classes=('a', 'b', 'c'))

    def full_init(self):
        pass

    def __len__(self):
        return 4

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        image = torch.rand(3, 8, 8, generator=generator) * 255
        sample = DataSample().set_gt_label(i % 3)
        return dict(inputs=image, data_samples=sample)


def config(case, work_dir, **wrapper):
    matrix, paramwise, hooks = CASES[case]
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                data_preprocessor=dict(
                    mean=[127.5] * 3,
                    std=[127.5] * 3,
                    num_classes=3,
                    to_rgb=False,
                ),
                backbone=dict(
                    type='mmstabvim.VisionMamba',
                    arch=dict(embed_dims=8, num_layers=2, d_state=4),
                    img_size=8,
                    patch_size=4,
                    state_matrix=matrix,
                ),
                head=dict(
                    type='LinearClsHead',
                    num_classes=3,
                    in_channels=8,
                    loss=dict(type='CrossEntropyLoss'),
                ),
            ),
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                dataset=dict(type='FourImages'),
                sampler=dict(type='DefaultSampler', shuffle=False),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=3),
            optim_wrapper=dict(
                type='OptimWrapper', optimizer=OPTIMIZER, **paramwise
            )
            | wrapper,
            param_scheduler=[
                dict(type='CosineAnnealingLR', T_max=10, by_epoch=True)
            ],
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', interval=1)
            ),
            custom_hooks=hooks,
            custom_imports=dict(imports=['mmstabvim']),
            work_dir=str(work_dir),
            experiment_name=f'{case}_{work_dir.name}',
            randomness=dict(seed=1),
        )
    )


def resumed(case, tmp_path, **wrapper):
    cfg = config(case, tmp_path, **wrapper)
    cfg.load_from, cfg.resume = str(FILES / f'{case}.pth'), True
    return launch.build_runner(cfg)


def assert_same(found, wanted):
    wanted = dict(wanted)
    stack_directions(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(
            torch.as_tensor(found[name]).double(),
            torch.as_tensor(value).double(),
            atol=1e-5,
        ), name


@pytest.mark.parametrize('case', CASES)
def test_training_goes_on(case, tmp_path):
    """One more iteration: weights, averages, moments, groups, radii."""
    resumed(case, tmp_path).train()
    found = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)
    wanted = torch.load(FILES / f'{case}_next.pth', weights_only=False)
    assert_same(found['state_dict'], wanted['state_dict'])
    if 'ema_state_dict' in wanted:
        assert_same(found['ema_state_dict'], wanted['ema_state_dict'])


def test_groups_of_another_training_are_refused(tmp_path):
    paramwise = dict(norm_decay_mult=0.0)
    runner = resumed('neg_exp', tmp_path, paramwise_cfg=paramwise)
    with pytest.raises(ValueError, match=r'groups of \[41\] \.\.\. param'):
        runner.train()


@pytest.mark.parametrize('case', CASES)
def test_weights_load_by_every_door(case):
    """PyTorch's own, and the project's."""
    path = FILES / f'{case}_next.pth'
    state = torch.load(path, weights_only=False)['state_dict']
    arch = dict(embed_dims=8, num_layers=2, d_state=4)
    options = dict(img_size=8, patch_size=4, state_matrix=CASES[case][0])
    inside = {
        name.removeprefix('backbone.'): value
        for name, value in state.items()
        if name.startswith('backbone.')
    }
    one, other = (VisionMamba(arch, **options).eval() for _ in range(2))
    one.load_state_dict(dict(inside))
    report = load_weights(other, path, strict=False)
    assert any('earlier layout' in note for note in report.notes)
    assert not report.missing
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(one(image)[0], other(image)[0])
    assert_same(one.state_dict(), inside)


def test_bounds_of_weight_norms():
    """Each direction keeps its own; free parameters are refused."""
    model = VisionMamba(dict(embed_dims=8, num_layers=1, d_state=4))
    old = 'layers.0.mixer.directions.'
    checkpoint = dict(
        state_dict={f'{old}{k}.D': torch.ones(16) for k in range(2)},
        weight_spectral_norm=dict(
            bounds={
                'layers.0.mixer.in_proj': 1.0,
                f'{old}0.x_proj': 2.0,
                f'{old}1.conv1d': 3.0,
            }
        ),
    )
    assert convert_checkpoint(checkpoint, model, None)
    assert checkpoint['weight_spectral_norm']['bounds'] == {
        'layers.0.mixer.in_proj': 1.0,
        'layers.0.mixer.ssm.x_proj.0': 2.0,
        'layers.0.mixer.conv1d.1': 3.0,
    }
    assert not convert_checkpoint(checkpoint, model, None)
    checkpoint['state_dict'] = {f'{old}0.D': torch.ones(16)}
    checkpoint['weight_spectral_norm']['raw'] = dict(state_dict={})
    with pytest.raises(ValueError, match='start anew'):
        convert_checkpoint(checkpoint, model, None)


def test_a_missing_direction_is_named():
    model = VisionMamba(dict(embed_dims=8, num_layers=2, d_state=4))
    state = {'layers.0.mixer.directions.1.D': torch.ones(16)}
    with pytest.raises(ValueError, match=r'mixer\.ssm\.D: .* directions \[1'):
        model.load_state_dict(state)
