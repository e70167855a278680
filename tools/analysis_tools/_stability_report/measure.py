"""Measure everything that the report shows, of one model."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lipschitz_report import last_output
from mmengine.dataset import pseudo_collate
from rich.progress import Progress
from torch import Tensor, nn

from _stability_report.directions import Direction, all_directions
from _stability_report.sensitivity import measure_sensitivity
from _stability_report.source import Source
from _stability_report.tensors import Seen, bounds_of, tensor_rows
from _stability_report.weights import nonfinite_rows, weight_rows
from mmstabvim.apis import trained
from mmstabvim.layers.mixer_ranges import trace_mixer

Row = dict[str, Any]
Rows = list[Row]


@dataclass
class Measured:
    """Numbers of one model, as rows that can be written and drawn.

    Attributes:
        source (Source): Where the model comes from.
        facts (dict): What was measured on what.
        broken (Rows): Weights that are not finite.
        directions (Rows): A row for each layer and direction.
        eigenvalues (Rows): Some of each layer and direction.
        decays (Rows): Histograms of ``|exp(delta A)|``.
        deltas (Rows): Histograms of the step size.
        first_nonfinite (dict, optional): The first tensor of a mixer that is
            not finite on the images.
        stopped (str): Why the model could not be run to its end, if so.
        gradients (Rows): Norm of the logit's gradient by layer and token.
        tensors (Rows): Largest values, bounds and limits.
        weights (Rows): A row for each weight.
        spectra (Rows): Singular values to draw.
        sensitivity (dict): Over all images, empty if not measured.
        images (Rows): Sensitivity of each image.
        without_sensitivity (str): Why it was not measured.
    """

    source: Source
    facts: Row = field(default_factory=dict)
    broken: Rows = field(default_factory=list)
    directions: Rows = field(default_factory=list)
    eigenvalues: Rows = field(default_factory=list)
    decays: Rows = field(default_factory=list)
    deltas: Rows = field(default_factory=list)
    first_nonfinite: Row | None = None
    stopped: str = ''
    gradients: Rows = field(default_factory=list)
    tensors: Rows = field(default_factory=list)
    weights: Rows = field(default_factory=list)
    spectra: Rows = field(default_factory=list)
    sensitivity: Row = field(default_factory=dict)
    images: Rows = field(default_factory=list)
    without_sensitivity: str = ''


def measure(
    source: Source, args: argparse.Namespace, progress: Progress
) -> Measured:
    """Load a model and measure it.

    Args:
        source (Source): The model.
        args (argparse.Namespace): The command line.
        progress (Progress): Gets bars.
    """
    args = source.arguments(args)
    cfg, model = trained.load_model(args)
    blocks = trained.find_blocks(model)
    names = list(blocks)
    found = Measured(source, broken=nonfinite_rows(model, names))
    directions = all_directions(blocks)
    seen = {name: Seen() for name in names}
    inputs, labels = load_samples(args, cfg, model)
    with watching(blocks, directions, seen):
        found.stopped = run(model, inputs, found.broken, progress)
    take_directions(found, directions)
    found.first_nonfinite = first_nonfinite(names, seen)
    found.tensors = tensor_rows(bounds_of(blocks, progress), seen)
    bar = progress.add_task('singular values', total=1)
    found.weights, found.spectra = weight_rows(model, names)
    progress.advance(bar)
    if not (found.broken or found.stopped or found.first_nonfinite):
        found.gradients = gradient_rows(model, blocks, inputs[0])
    look_at_sensitivity(found, model, inputs, labels, args, progress)
    found.facts = describe(args, cfg, model, inputs, names)
    return found


def load_samples(
    args: argparse.Namespace, cfg: Any, model: Any
) -> tuple[list[Tensor], list[int | None]]:
    """Images as the model reads them, and their labels where there are."""
    samples = (
        trained.test_samples(args, cfg)
        if args.images is None
        else trained.file_samples(args, cfg)
    )
    inputs: list[Tensor] = []
    labels: list[int | None] = []
    for sample in samples:
        data = model.data_preprocessor(pseudo_collate([sample]), False)
        inputs.append(data['inputs'])
        label = getattr(data['data_samples'][0], 'gt_label', None)
        known = args.images is None and label is not None
        labels.append(int(label) if known and label.numel() == 1 else None)
    return inputs, labels


@contextmanager
def watching(
    blocks: Any, directions: Sequence[Sequence[Direction]], seen: Any
) -> Iterator[None]:
    """Look at each mixer's tensors while the model runs."""

    def looker(name: str, pair: Sequence[Direction]) -> Any:
        def look(mixer: Any, inputs: tuple[Tensor]) -> None:
            traced = trace_mixer(mixer, inputs[0])
            seen[name].add(traced)
            for one, tensors in zip(pair, traced.directions, strict=True):
                one.add(tensors['delta'])

        return look

    handles = [
        block.mixer.register_forward_pre_hook(looker(name, pair))
        for (name, block), pair in zip(blocks.items(), directions, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(
    model: Any, inputs: Sequence[Tensor], broken: Rows, progress: Progress
) -> str:
    """Run the model on all images; why it stopped, if it did.

    A full state matrix that is not finite cannot be diagonalized, which the
    model does before its first layer.
    """
    bar = progress.add_task('images', total=len(inputs))
    for image in inputs:
        try:
            model(image, mode='tensor')
        except (ValueError, RuntimeError) as error:
            if not broken:
                raise
            return str(error)
        progress.advance(bar)
    return ''


def take_directions(
    found: Measured, directions: Sequence[Sequence[Direction]]
) -> None:
    """Turn what was seen into rows."""
    for direction in (d for pair in directions for d in pair):
        found.directions.append(direction.row())
        found.eigenvalues += direction.eigenvalue_rows()
        found.decays += direction.decay_rows()
        found.deltas += direction.delta_rows()


def first_nonfinite(names: Sequence[str], seen: dict[str, Seen]) -> Row | None:
    """The first tensor that is not finite, in the order of computation."""
    for layer, name in enumerate(names):
        place = seen[name].nonfinite
        if place is not None:
            direction, tensor, count = place
            return dict(
                layer=layer,
                direction=direction,
                name=name,
                tensor=tensor,
                count=count,
            )
    return None


@torch.enable_grad()
def gradient_rows(model: Any, blocks: Any, image: Tensor) -> Rows:
    """Norm of the gradient with respect to each mixer's tokens.

    Of the largest logit; of a segmentor, of its mean over the pixels.
    """
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        return lambda _, inputs: kept.update({name: inputs[0]})

    handles = [
        block.mixer.register_forward_pre_hook(keeper(name))
        for name, block in blocks.items()
    ]
    try:
        leaf = image.detach().requires_grad_()  # also if weights are frozen
        logits = last_output(model(leaf, mode='tensor'))
    finally:
        for handle in handles:
            handle.remove()
    found = torch.autograd.grad(
        logits.amax(1).mean(), list(kept.values()), materialize_grads=True
    )
    return [
        dict(layer=layer, token=token, value=value)
        for layer, gradient in enumerate(found)
        for token, value in enumerate(gradient[0].norm(dim=-1).tolist())
    ]


def look_at_sensitivity(
    found: Measured,
    model: nn.Module,
    inputs: Sequence[Tensor],
    labels: Sequence[int | None],
    args: argparse.Namespace,
    progress: Progress,
) -> None:
    """Measure it where it means something, else say why not."""
    count = min(args.profile_samples, len(inputs))
    images = [x for x in inputs[:count] if x.shape == inputs[0].shape]
    if hasattr(model, 'decode_head'):
        found.without_sensitivity = (
            'Not measured: the model is a segmentor, whose logits are as many '
            'as its pixels; the profile is defined for one vector of logits '
            'per image.'
        )
    elif args.profile_samples == 0:
        found.without_sensitivity = 'Not measured: --profile-samples 0.'
    elif found.broken or found.stopped or found.first_nonfinite:
        found.without_sensitivity = (
            'Not measured: weights or tensors are not finite, so that every '
            'number would be infinite.'
        )
    elif len(images) < 2:
        found.without_sensitivity = (
            f'Not measured: it needs two images of one size, got {count}.'
        )
    else:
        batch = torch.cat(images)
        with torch.no_grad():
            guess = model(batch).argmax(1).tolist()
        known = all(label is not None for label in labels[: len(images)])
        given = labels[: len(images)] if known else guess
        found.sensitivity, found.images = measure_sensitivity(
            model, batch, torch.tensor(given).to(batch.device), args, progress
        )
        found.facts['labels'] = 'given' if known else 'predicted'
        found.sensitivity['labels'] = found.facts['labels']


def describe(
    args: argparse.Namespace,
    cfg: Any,
    model: nn.Module,
    inputs: Sequence[Tensor],
    names: Sequence[str],
) -> Row:
    """What was measured, on what."""
    where = 'the test set' if args.images is None else str(args.images)
    blocks = trained.find_blocks(model)
    matrix = next(iter(blocks.values())).mixer.directions[0].state_matrix
    sizes = sorted({'x'.join(map(str, x.shape[2:])) for x in inputs})
    return dict(
        config=args.config,
        checkpoint=args.checkpoint,
        model=type(model).__name__,
        layers=len(names),
        state_matrix=type(matrix).__name__.removesuffix('StateMatrix'),
        channels=matrix.d_inner,
        modes=matrix.d_state * matrix.multiplicity,
        parameters=sum(p.numel() for p in model.parameters()),
        images=f'{len(inputs)} of {where}, {", ".join(sizes)}, seed '
        f'{args.seed}',
        seed=args.seed,
        samples=len(inputs),
    )
