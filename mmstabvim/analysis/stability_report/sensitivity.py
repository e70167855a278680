"""The sensitivity profile, cheaply: few images, the largest logits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from mmstabvim.stability import (
    SensitivityProfile,
    attribution_condition_number,
    attribution_instability,
    attributions,
    effective_rank,
    evaluated,
    frechet_distance,
    gaussian_changes,
    hessian_extremes,
    input_jacobian,
    largest_gain,
    parameter_jacobian,
    singular_values,
    spectral_entropy,
    tangent_kernel,
)
from mmstabvim.stability.sensitivity.profile import MAX_NUMEL

Row = dict[str, Any]
Rows = list[Row]

DRAWS, STD = 2, 0.02
"""Changes of each image for the instability of attributions."""

ALL, SOME = 10, 5
"""Classes up to which all are kept, and how many else."""


class LargestLogits(nn.Module):
    """Classifier cut to the classes with the largest logits.

    Args:
        model (nn.Module): Gives logits (batch, classes).
        images (Tensor): (batch, ...), which decide.
        count (int, optional): Classes that are kept, the ones with the
            largest logit on any image. Defaults to None, for all of 10 or
            fewer and else for 5.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, count: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            logits = model(images)
        self.total = logits.shape[1]
        if count is None:
            count = self.total if self.total <= ALL else SOME
        count = min(count, self.total)
        # of the images' device; classes in their order
        self.kept = logits.amax(0).topk(count).indices.sort().values

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, kept)."""
        return self.model(x)[:, self.kept]


def measure_sensitivity(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    count: int | None,
    steps: int,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Any], Rows]:
    """Measure profile, index, entropy, condition number, instability.

    Args:
        model (nn.Module): A classifier in evaluation mode.
        images (Tensor): (batch, ...), two or more.
        labels (Tensor): (batch,).
        count (int, optional): Classes that are kept.
        steps (int): Of Lanczos' method.
        seed (int): Of the changes and of Lanczos' start.
        progress (Progress): Gets a bar.

    Returns:
        tuple[dict, Rows]: Numbers over all images, and a row for each.
    """
    bar = progress.add_task('sensitivity', total=3 + len(images))

    def advance() -> None:
        progress.advance(bar)

    with evaluated(model):
        few = LargestLogits(model, images, count)
        jacobian = input_jacobian(few, images)
        advance()
        rows = spectrum_rows(jacobian)
        instability, distance = changed_attributions(
            few, images, labels_of(few, images), seed
        )
        advance()
        values = singular_values(jacobian)[:, 0].cpu()
        options: dict[str, Any] = dict(steps=steps, seed=seed)
        profile = measure_profile(
            few, images, labels, values, options, advance
        )
    found = {name: mean(rows, name) for name in rows[0]}
    kept = few.kept[labels_of(few, images)].tolist()
    for i, row in enumerate(rows):
        row.update(prediction=kept[i], instability=float(instability[i]))
        for name in ('input_jacobian', 'parameter_jacobian', 'hessian'):
            row[name] = float(getattr(profile, name)[i])
    found |= profile.values()
    found |= dict(
        instability=mean(rows, 'instability'),
        frechet_distance=distance,
        hessian_max=float(profile.hessian_max.max()),
        hessian_min=float(profile.hessian_min.min()),
        hessian_error=profile.errors['hessian'],
        index=profile.index(),
        finite=float(profile.finite),
        samples=len(images),
        classes=len(few.kept),
        total_classes=few.total,
    )
    return found, rows


def mean(rows: Rows, name: str) -> float:
    """Mean of a column."""
    return sum(row[name] for row in rows) / len(rows)


@torch.no_grad()
def labels_of(few: LargestLogits, images: Tensor) -> Tensor:
    """Predictions, counted among the classes that are kept."""
    return few(images).argmax(1)


def spectrum_rows(jacobian: Tensor) -> Rows:
    """Quantities of the singular values of each image's Jacobian."""
    values = singular_values(jacobian)
    columns = dict(
        entropy=spectral_entropy(values),
        effective_rank=effective_rank(values),
        condition_number=attribution_condition_number(values),
        typical_gain=jacobian.double().square().mean(2).sum(1),
    )
    lists = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, line, strict=True)) for line in lists]


def changed_attributions(
    few: LargestLogits, images: Tensor, classes: Tensor, seed: int
) -> tuple[Tensor, float]:
    """Instability of each image, and the Fréchet distance of the sets."""
    changes = gaussian_changes(images, STD, DRAWS, seed)
    instability = attribution_instability(few, images, changes, classes)
    sets = [
        attributions(few, x, classes).flatten(1)
        for x in (images, images + changes[0])
    ]
    return instability, float(frechet_distance(*sets))


def measure_profile(
    few: LargestLogits,
    images: Tensor,
    labels: Tensor,
    norms: Tensor,
    options: dict[str, Any],
    advance: Callable[[], None],
) -> SensitivityProfile:
    """Jacobians of the logits that are kept; Hessians of the whole loss.

    ``norms`` are those of the input Jacobians, (batch,).
    """
    parameters = [p for p in few.model.parameters() if p.requires_grad]
    gains, kernel = parameter_gains(few, images, parameters, options)
    advance()
    ends = []
    for pair in zip(images.split(1), labels.split(1), strict=True):
        loss = partial(cross_entropy, few.model, *pair)
        ends.append(hessian_extremes(loss, parameters, **options))
        advance()
    return SensitivityProfile(
        norms,
        gains,
        kernel,
        torch.tensor([e.norm for e in ends]).double(),
        torch.tensor([e.largest for e in ends]).double(),
        torch.tensor([e.smallest for e in ends]).double(),
        dict(hessian=max(e.norm_error for e in ends)),
    )


def cross_entropy(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """Loss of one image, over all classes."""
    return F.cross_entropy(model(image), label)


def parameter_gains(
    few: LargestLogits,
    images: Tensor,
    parameters: Sequence[Tensor],
    options: dict[str, Any],
) -> tuple[Tensor, float]:
    """Norms of the parameter Jacobians, and their kernel's eigenvalue.

    Exact; by Lanczos' method where the Jacobian is too large to be formed.
    """
    count, classes = len(images), len(few.kept)
    if count * classes * sum(p.numel() for p in parameters) > MAX_NUMEL:
        squares = [
            largest_gain(partial(few, image), parameters, **options)[0]
            for image in images.split(1)
        ]
        whole = largest_gain(partial(few, images), parameters, **options)[0]
        return torch.tensor(squares).double().clamp(min=0).sqrt(), whole
    kernel = tangent_kernel(parameter_jacobian(few, images, parameters)).cpu()
    blocks = kernel.reshape(count, classes, count, classes)
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    squares = torch.linalg.eigvalsh(own)[:, -1].clamp(min=0)
    return squares.sqrt(), float(torch.linalg.eigvalsh(kernel)[-1])
