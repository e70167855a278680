"""Quick runs of mmengine's Runner for the hook that bounds norms."""

import copy
import itertools

import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmstabvim import VisionMamba, WeightSpectralNormHook
from mmstabvim.stability import find_layers, layer_norms

ALL = ['patch_embed', 'in_proj', 'conv1d', 'x_proj', 'dt_proj', 'out_proj']
ALL += ['head']
WSN = dict(type='mmstabvim.WeightSpectralNormHook', layers=ALL)
EMA = dict(type='EMAHook', momentum=0.1)
REPARAM = dict(WSN, mode='reparam')
# one of each kind of rule and of bound
KINDS = {
    'bound': dict(WSN, max_norm='init'),
    'divide': dict(WSN, rule='divide'),
    'reparam bound': dict(REPARAM, max_norm='init'),
    'reparam divide': dict(REPARAM, rule='divide', max_norm=2.0),
    'learned': dict(REPARAM, rule='learned'),
}


class Classifier(BaseModel):
    """A Vision Mamba of one layer, every kind of layer in it."""

    def __init__(self):
        super().__init__()
        self.backbone = VisionMamba(
            arch=dict(embed_dims=16, num_layers=1, d_state=4),
            img_size=8,
            patch_size=4,
        )
        self.head = nn.Linear(16, 3)

    def forward(self, inputs, labels=None, mode='tensor'):
        logits = self.head(self.backbone(inputs)[0])
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return logits


class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(len(data_samples))

    def compute_metrics(self, results):
        return dict(sum=sum(results))


def images(count, batch_size):
    """Fixed images and labels, in order."""
    generator = torch.Generator().manual_seed(5)
    data = [
        dict(inputs=torch.randn(3, 8, 8, generator=generator), labels=k % 3)
        for k in range(count)
    ]
    return DataLoader(data, batch_size)


class Run:
    """A training run of three large steps per epoch, and how to change it."""

    def __init__(self, work_dir):
        self.work_dir, self.model = str(work_dir), Classifier
        self.hooks, self.epochs, self.validate = [], 1, False
        self.count, self.batch_size = 12, 4
        self.optimizer = dict(type='AdamW', lr=0.05, weight_decay=0.0)
        self.options = {}

    def runner(self, **options):
        torch.manual_seed(3)
        validation = dict(
            val_dataloader=images(4, 4),
            val_cfg={},
            val_evaluator=Evaluator([Count()]),
        )
        name = f'norms{next(COUNTER)}'
        return Runner(
            self.model(),
            self.work_dir,
            train_dataloader=images(self.count, self.batch_size),
            train_cfg=dict(by_epoch=True, max_epochs=self.epochs),
            optim_wrapper=dict(optimizer=self.optimizer, **self.options),
            custom_hooks=copy.deepcopy(self.hooks),
            experiment_name=name,
            log_level='ERROR',
            **(validation if self.validate else {}),
            **options,
        )

    def train(self, **options):
        runner = self.runner(**options)
        runner.train()
        return runner


COUNTER = itertools.count()


def hook_of(runner):
    return next(
        h for h in runner.hooks if isinstance(h, WeightSpectralNormHook)
    )


def norms(model):
    return layer_norms(find_layers(model, ALL))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def saved(run, name='epoch_1.pth'):
    return torch.load(f'{run.work_dir}/{name}', weights_only=False)


def average_of(runner):
    hooks = (h for h in runner.hooks if isinstance(h, EMAHook))
    return next(hooks).ema_model


def gains_of(model):
    """Gains of each layer, a number or (directions,)."""
    return {
        name: layer.parametrizations.weight[1].gain
        for name, layer in find_layers(model, ALL).items()
    }


def numbers_of(gains):
    """One number for each layer and direction, by its name."""
    return {
        name if gain.dim() == 0 else f'{name}.{k}': value
        for name, gain in gains.items()
        for k, value in enumerate(gain.reshape(-1).tolist())
    }
