"""Weight decay under the constructors of MMEngine and both toolkits.

These go by shape and name: matrices and kernels decay, biases and skip
weights do not.
"""

import pytest
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from mmstabvim import VisionMamba

DECAY = 0.05
ONE_DIMENSIONAL = ('D', 'dt_bias', 'bias', 'norm.weight')


class BEiTLike(VisionMamba):
    """A name that MMSegmentation's constructor knows."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = BEiTLike(
            dict(embed_dims=16, num_layers=2, d_state=4),
            img_size=16,
            patch_size=4,
        )

    def get_layer_depth(self, name, prefix=''):
        return self.backbone.get_layer_depth(name, 'backbone.')


def build(constructor, **paramwise):
    cfg = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=DECAY),
        constructor=constructor,
        paramwise_cfg=paramwise,
    )
    model = Model()
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    return {n: decay[id(p)] for n, p in model.named_parameters()}


CONSTRUCTORS = {
    'mmengine': (
        'DefaultOptimWrapperConstructor',
        'mmengine',
        dict(flat_decay_mult=0.0),
    ),
    'mmpretrain': (
        'LearningRateDecayOptimWrapperConstructor',
        'mmpretrain',
        dict(layer_decay_rate=0.9, flat_decay_mult=0.0),
    ),
    'mmseg': (
        'LearningRateDecayOptimizerConstructor',
        'mmseg',
        dict(num_layers=2, decay_rate=0.9, decay_type='layer_wise'),
    ),
}


@pytest.mark.parametrize('name', CONSTRUCTORS)
def test_only_matrices_decay(name):
    constructor, scope, paramwise = CONSTRUCTORS[name]
    pytest.importorskip(scope)
    if scope == 'mmseg':
        import mmseg.engine  # noqa: F401
    with DefaultScope.overwrite_default_scope(scope):
        decay = build(constructor, **paramwise)
    for parameter, value in decay.items():
        flat = parameter.endswith(ONE_DIMENSIONAL)
        assert value == (0.0 if flat else DECAY), parameter
    kinds = {parameter.split('.')[-1] for parameter in decay}
    assert {'D', 'dt_bias', 'bias', 'weight', 'A_log'} <= kinds
