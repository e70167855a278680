"""Measure everything that the report shows, of one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from mmstabvim.analysis.mixers import (
    Blocks,
    find_mixer_blocks,
    no_progress,
    run_to_mixers,
    watch_mixers,
)
from mmstabvim.analysis.ranges import Observed, certified_bounds, tensor_rows
from mmstabvim.analysis.stability_report.directions import (
    Direction,
    all_directions,
)
from mmstabvim.analysis.stability_report.sensitivity import (
    measure_sensitivity,
)
from mmstabvim.analysis.stability_report.source import Source
from mmstabvim.analysis.weights import nonfinite_rows, weight_rows
from mmstabvim.layers.mixer_ranges import trace_mixer

Row = dict[str, Any]
Rows = list[Row]


@dataclass
class StabilityReport:
    """Numbers of one model, as rows that can be written and drawn.

    Attributes:
        source (Source): Origin of the model.
        facts (dict): What was measured on what.
        broken (list[dict]): Weights that are not finite.
        directions (list[dict]): A row for each layer and direction.
        eigenvalues (list[dict]): Some of each layer and direction.
        decays (list[dict]): Histograms of ``|exp(delta A)|``.
        deltas (list[dict]): Histograms of the step size.
        first_nonfinite (dict, optional): The first tensor of a mixer that is
            not finite on the images.
        stopped (str): Why the model could not be run to its end, if so.
        gradients (list[dict]): Norm of the logit's gradient by layer and
            token.
        tensors (list[dict]): Largest values, bounds and limits.
        weights (list[dict]): A row for each weight.
        spectra (list[dict]): Singular values to draw.
        sensitivity (dict): Over all images, empty if not measured.
        images (list[dict]): Sensitivity of each image.
        without_sensitivity (str): Why it was not measured.
    """

    source: Source = field(default_factory=Source)
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

    @property
    def finite(self) -> bool:
        """All weights, and all tensors on the images."""
        return not (self.broken or self.stopped or self.first_nonfinite)


def stability_report(
    model: Any,
    images: Sequence[Tensor],
    labels: Sequence[int | None] = (),
    *,
    profile_samples: int = 2,
    classes: int | None = None,
    steps: int = 4,
    seed: int = 0,
    source: Source | None = None,
    origin: str = 'the caller',
    progress: Progress | None = None,
) -> StabilityReport:
    """Measure the stability of a trained Vision Mamba.

    Args:
        model (nn.Module): A classifier of MMPretrain or a segmentor of
            MMSegmentation with blocks of a Vision Mamba, in evaluation mode.
        images (Sequence[Tensor]): (1, channels, height, width) each, as the
            model reads them; one or more.
        labels (Sequence[int | None]): Their classes. Defaults to none, for
            the predicted ones.
        profile_samples (int): Images for the sensitivity, 0 to leave it out.
            Defaults to 2.
        classes (int, optional): Largest logits whose Jacobians are formed.
            Defaults to None, for all of 10 or fewer, else 5.
        steps (int): Of Lanczos' method on the loss's Hessian. Defaults to 4.
        seed (int): Of the draws. Defaults to 0.
        source (Source, optional): Names of config and checkpoint, and records
            of the training. Defaults to None.
        origin (str): Of the images, in words.
        progress (Progress, optional): Gets bars. Defaults to None.

    Returns:
        StabilityReport: For :func:`write`.

    Raises:
        ValueError: If the model has no block.

    Example:
        >>> report = stability_report(model, images)  # doctest: +SKIP
        >>> write(report, folder=Path('out'))  # doctest: +SKIP
    """
    progress = progress or no_progress()
    blocks = find_mixer_blocks(model)
    names = list(blocks)
    found = StabilityReport(source or Source())
    found.broken = nonfinite_rows(model, names)
    directions = dict(zip(names, all_directions(blocks), strict=True))
    seen = {name: Observed() for name in names}
    found.stopped = _run(
        model, blocks, images, directions, seen, found.broken, progress
    )
    for direction in (d for pair in directions.values() for d in pair):
        found.directions.append(direction.row())
        found.eigenvalues += direction.eigenvalue_rows()
        found.decays += direction.decay_rows()
        found.deltas += direction.delta_rows()
    found.first_nonfinite = _first_nonfinite(seen)
    bounds = certified_bounds(blocks, torch.float16, progress, strict=False)
    found.tensors = tensor_rows(bounds, seen, torch.float16)
    bar = progress.add_task('singular values', total=1)
    found.weights, found.spectra = weight_rows(model, names)
    progress.advance(bar)
    if found.finite:
        found.gradients = _gradient_rows(model, blocks, images[0])
    sizes = sorted({'x'.join(map(str, x.shape[2:])) for x in images})
    found.facts = dict(
        config=found.source.config,
        checkpoint=found.source.checkpoint,
        model=type(model).__name__,
        layers=len(names),
        **_state_matrix_facts(blocks),
        parameters=sum(p.numel() for p in model.parameters()),
        images=f'{len(images)} of {origin}, {", ".join(sizes)}, seed {seed}',
        seed=seed,
        samples=len(images),
    )
    batch = [x for x in images[:profile_samples] if x.shape == images[0].shape]
    found.without_sensitivity = _why_not(model, found, batch, profile_samples)
    if not found.without_sensitivity:
        targets = list(labels[: len(batch)])
        known = bool(targets) and None not in targets
        if not known:
            with torch.no_grad():
                targets = model(torch.cat(batch)).argmax(1).tolist()
        found.sensitivity, found.images = measure_sensitivity(
            model,
            torch.cat(batch),
            torch.tensor(targets).to(batch[0].device),
            classes,
            steps,
            seed,
            progress,
        )
        found.sensitivity['labels'] = 'given' if known else 'predicted'
    return found


@torch.no_grad()
def _run(
    model: Any,
    blocks: Blocks,
    images: Sequence[Tensor],
    directions: Mapping[str, Sequence[Direction]],
    seen: Mapping[str, Observed],
    broken: Rows,
    progress: Progress,
) -> str:
    """Run the model on all images; why it stopped, if it did.

    A full state matrix that is not finite cannot be diagonalized, which the
    model does before its first layer.
    """

    def look(name: str, mixer: Any, tokens: Tensor) -> None:
        traced = trace_mixer(mixer, tokens)
        seen[name].add(traced)
        for one, tensors in zip(
            directions[name], traced.directions, strict=True
        ):
            one.add(tensors['delta'])

    bar = progress.add_task('images', total=len(images))
    with watch_mixers(blocks, look):
        for image in images:
            try:
                model(image, mode='tensor')
            except (ValueError, RuntimeError) as error:
                if not broken:
                    raise
                return str(error)
            progress.advance(bar)
    return ''


def _first_nonfinite(seen: Mapping[str, Observed]) -> Row | None:
    """The first tensor that is not finite, in the order of computation."""
    for layer, (name, observed) in enumerate(seen.items()):
        if observed.nonfinite is not None:
            keys = ('direction', 'tensor', 'count')
            found = dict(zip(keys, observed.nonfinite, strict=True))
            return dict(layer=layer, name=name, **found)
    return None


@torch.enable_grad()
def _gradient_rows(model: Any, blocks: Blocks, image: Tensor) -> Rows:
    """Norm of the gradient with respect to each mixer's tokens.

    Of the largest logit; of a segmentor, of its mean over the pixels.
    """
    leaf = image.detach().requires_grad_()  # also if weights are frozen
    logits, tokens = run_to_mixers(model, blocks, leaf)
    found = torch.autograd.grad(
        logits.amax(1).mean(), list(tokens.values()), materialize_grads=True
    )
    return [
        dict(layer=layer, token=token, value=value)
        for layer, gradient in enumerate(found)
        for token, value in enumerate(gradient[0].norm(dim=-1).tolist())
    ]


def _why_not(
    model: Any, found: StabilityReport, batch: Sequence[Tensor], wanted: int
) -> str:
    """Reason not to measure the sensitivity; empty for none."""
    if hasattr(model, 'decode_head'):
        return (
            'Not measured: the model is a segmentor, whose logits are as many '
            'as its pixels; the profile is defined for one vector of logits '
            'per image.'
        )
    if not wanted:
        return 'Not measured: --profile-samples 0.'
    if not found.finite:
        return (
            'Not measured: weights or tensors are not finite, so that every '
            'number would be infinite.'
        )
    if len(batch) < 2:
        return (
            f'Not measured: it needs two images of one size, got {len(batch)}.'
        )
    return ''


def _state_matrix_facts(blocks: Blocks) -> Row:
    """Kind and sizes of the first state matrix."""
    matrix = next(iter(blocks.values())).mixer.ssm.state_matrix
    return dict(
        state_matrix=type(matrix.parametrization).__name__,
        channels=matrix.d_inner,
        modes=matrix.d_state * matrix.multiplicity,
    )
