"""Stage ``model``: Vision Mamba beside a transformer, from 224 to 1248."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from _gpu import timing
from _gpu.records import Table, show
from _gpu.stage import KERNELS, Failures, SkippedError, Stage
from _gpu.timing import Budget, Timing
from mmstabvim import VisionMamba

SIZES = (224, 384, 512, 768, 1024, 1248)
QUICK_SIZES = (32,)
PATCH = 16
CLASSES = 1000
MODES = ('inference', 'training step')

TOKENS = 1 << 16
"""Of a batch, about: enough work for the GPU at every size."""

DEIT = {'tiny': 'deit-tiny', 'small': 'deit-small'}
QUICK_DEIT = dict(
    embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=16
)
QUICK_VIM = dict(embed_dims=8, num_layers=1, d_state=2)


@dataclasses.dataclass
class Candidate:
    """A backbone in a size.

    Args:
        name (str): As in the table.
        build (Callable): The backbone for an image size.
    """

    name: str
    build: Callable[[int], nn.Module]


class Classifier(nn.Module):
    """A backbone's class token and a linear layer.

    Args:
        backbone (nn.Module): Returns a tuple, the class token last.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dims, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, CLASSES)."""
        return self.head(self.backbone(image)[-1])


def run(stage: Stage) -> None:
    """Throughput and memory of every model at every size.

    Raises:
        SkippedError: If the kernels' tests failed.
    """
    if stage.refuses(*KERNELS):
        raise SkippedError('Not timed: tests failed.')
    torch.manual_seed(0)
    sizes = QUICK_SIZES if stage.quick else SIZES
    candidates = make_candidates(stage)
    stage.record.note(
        'bfloat16 autocast, patch 16, 1000 classes, random images and '
        "weights; DeiT is MMPretrain's VisionTransformer, whose attention "
        'is scaled_dot_product_attention. A training step: forward, '
        'backward, AdamW. Memory: the largest amount allocated, weights and '
        'optimizer included.'
    )
    stage.record.note(
        f'Batch: {TOKENS} tokens, rounded down to a multiple of 8 images, '
        'at least 8.'
    )
    table = stage.record.table(
        'Throughput',
        size='pixels',
        tokens='tokens',
        batch='batch',
        mode='mode',
        model='model',
        rate='images/s',
        ms='ms per step',
        spread='20 to 80 %',
        memory='peak MB',
        ratio='of DeiT',
    )
    count = len(sizes) * len(candidates) * len(MODES)
    budget = Budget(stage.deadline, count)
    with Failures() as failures:
        for size in sizes:
            for mode in MODES:
                rates: dict[str, float] = {}
                for model in candidates:
                    with failures.kept(f'{model.name} at {size}, {mode}'):
                        _add_row(
                            stage, table, model, size, mode, budget, rates
                        )


def make_candidates(stage: Stage) -> list[Candidate]:
    """DeiT first, then Vision Mamba, for each size of model."""
    from mmpretrain.models import VisionTransformer

    def deit(arch: Any) -> Callable[[int], nn.Module]:
        return lambda size: VisionTransformer(
            arch, img_size=size, patch_size=PATCH
        )

    def vim(arch: Any) -> Callable[[int], nn.Module]:
        return lambda size: VisionMamba(arch, img_size=size, patch_size=PATCH)

    if stage.quick:
        return [
            Candidate('DeiT-tiny', deit(QUICK_DEIT)),
            Candidate('Vim-tiny', vim(QUICK_VIM)),
        ]
    return [
        Candidate(f'{family}-{name}', build)
        for name, arch in DEIT.items()
        for family, build in (('DeiT', deit(arch)), ('Vim', vim(name)))
    ]


def choose_batch(size: int) -> int:
    """Images per batch, from the size alone."""
    tokens = (size // PATCH) ** 2 + 1
    return max(8, TOKENS // tokens // 8 * 8)


def _add_row(
    stage: Stage,
    table: Table,
    candidate: Candidate,
    size: int,
    mode: str,
    budget: Budget,
    rates: dict[str, float],
) -> None:
    batch = 2 if stage.quick else choose_batch(size)
    seconds = budget.take()
    row = dict(
        size=size,
        tokens=(size // PATCH) ** 2 + 1,
        batch=batch,
        mode=mode,
        model=candidate.name,
    )
    try:
        time, memory = measure(stage, candidate, size, batch, mode, seconds)
    except torch.cuda.OutOfMemoryError:
        table.add(**row, memory='out of memory')
        return
    finally:
        timing.free_memory()
    rate = rates[candidate.name] = 1e3 * batch / time.median
    other = rates.get(candidate.name.replace('Vim', 'DeiT'))
    table.add(
        **row,
        rate=rate,
        ms=time.median,
        spread=f'{show(time.low)} to {show(time.high)}',
        memory=memory,
        ratio=rate / other if other and 'Vim' in candidate.name else None,
    )


def measure(
    stage: Stage,
    candidate: Candidate,
    size: int,
    batch: int,
    mode: str,
    seconds: float,
) -> tuple[Timing, float | None]:
    """Time of a step, and the most MB that were allocated."""
    device = stage.device
    model = Classifier(candidate.build(size)).to(device)
    image = torch.randn(batch, 3, size, size, device=device)
    training = mode != MODES[0]
    step = (
        _training_step(model, image) if training else _inference(model, image)
    )
    if device != 'cuda':
        return timing.measure_steps(step, seconds, device), None
    torch.cuda.reset_peak_memory_stats()
    # half: the first step compiles, and the model had to be built
    time = timing.measure_steps(step, seconds / 2, device)
    return time, torch.cuda.max_memory_allocated() / 1e6


def _inference(model: nn.Module, image: torch.Tensor) -> Callable[[], Any]:
    model.eval()

    @torch.no_grad()
    def step() -> None:
        with torch.autocast(image.device.type, torch.bfloat16):
            model(image)

    return step


def _training_step(model: nn.Module, image: torch.Tensor) -> Callable[[], Any]:
    model.train()
    labels = torch.arange(len(image), device=image.device) % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(image.device.type, torch.bfloat16):
            logits = model(image)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
