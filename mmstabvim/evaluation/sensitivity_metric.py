"""Sensitivity of a classifier, measured on some images of an evaluation."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.evaluator import BaseMetric
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from mmstabvim.registry import METRICS
from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.sensitivity.attribution import (
    ATTRIBUTIONS,
    attribution_instability,
    attributions,
    check_logits,
    frechet_distance,
    gaussian_changes,
    predicted_classes,
    prepare_attributions,
)
from mmstabvim.stability.sensitivity.entropy import (
    attribution_condition_number,
    effective_rank,
    spectral_entropy,
)
from mmstabvim.stability.sensitivity.jacobian import (
    input_jacobian,
    singular_values,
    typical_gain,
)
from mmstabvim.stability.sensitivity.profile import (
    COMBINATIONS,
    PROFILE_METHODS,
    evaluated,
    sensitivity_profile,
)

Rows = list[dict[str, Any]]
Function = Callable[[Tensor], Tensor]
TARGETS = ('prediction', 'label')


@METRICS.register_module()
class SensitivityMetric(BaseMetric):
    """Sensitivity of a classifier to small changes of images and parameters.

    A metric of MMEngine sees no model, so a config needs the hook that hands
    it over::

        custom_hooks = [dict(type='mmstabvim.ModelForMetricsHook')]
        test_evaluator = [
            dict(type='Accuracy'),
            dict(type='mmstabvim.SensitivityMetric', samples=32),
        ]

    In Python, :meth:`measure` does the same for a model and its images. The
    first images of the evaluation are taken; the main process measures all of
    them while others wait. Images are as the model sees them, normalized, and
    the model is in evaluation mode and in its own precision, without autocast.

    Returned, with ``sensitivity/`` in front:

    - ``input_jacobian``, ``parameter_jacobian``, ``hessian``: spectral norms,
      the largest over the images (``quantile``); ``tangent_kernel``: largest
      eigenvalue over all images; ``hessian_max`` and ``hessian_min``: the
      extreme eigenvalues of any image's loss; ``index``: the largest of the
      four, or their sum. ``*_error`` beside those that are estimated.
    - ``entropy``, ``effective_rank``, ``condition_number``, ``typical_gain``
      (``||J||_F**2 / d``): means over the images. With more than
      ``max_classes`` classes, those of the Jacobian of the ``max_classes``
      largest logits, but for ``typical_gain``, which is then estimated with a
      standard error.
    - ``instability``: mean relative change of attributions under Gaussian
      changes of the images; ``frechet_distance`` between the attributions
      before and after.
    - ``samples`` and ``classes`` that entered, ``finite``: 1 if all numbers
      of the index are.

    After an evaluation the attribute ``rows`` has a line per image.

    Args:
        samples (int): Number of images, >= 2. Defaults to 16.
        profile (bool): Measure the four norms and the index, which takes most
            of the time. Defaults to True.
        parameters (Sequence[str], optional): Prefixes of the names of the
            parameters that count. Defaults to None, all that are trained.
        method (str): ``'auto'``, ``'difference'`` or ``'double_backward'``,
            see :func:`mmstabvim.stability.sensitivity_profile`. Defaults to
            ``'auto'``.
        steps (int): Steps of Lanczos' method. Defaults to 20.
        max_classes (int): Classes up to which Jacobians are decomposed, >= 1.
            Defaults to 20.
        quantile (float): Over the images, 1 for the largest. Defaults to 1.0.
        combine (str): ``'max'`` or ``'sum'``. Defaults to ``'max'``.
        per_sample (bool): Divide the kernel's eigenvalue by the number of
            images. Defaults to False.
        power (float): Power of the singular values that are weights in the
            entropy, 1 or 2. Defaults to 1.0.
        base (float): Base of the entropy's logarithm. Defaults to e.
        target (str): Logit that is attributed to the image: ``'prediction'``,
            that of the class predicted for the unchanged image, or
            ``'label'``. Defaults to ``'prediction'``.
        attribution (str): See :func:`mmstabvim.stability.attributions`.
            Defaults to ``'gradient'``.
        std (float): Standard deviation of the changes, in units of normalized
            images. Defaults to 0.02.
        draws (int): Number of changes of each image. Defaults to 4.
        pool (int, optional): Side of squares over which attributions are
            averaged before the distance. Defaults to None.
        unit (bool): Give attributions norm 1 before the distance. Defaults to
            False.
        batch_size (int): Images that are differentiated at once. Defaults to
            16.
        seed (int): Seed of the changes and random starts. Defaults to 0.
        show_progress (bool): Show a bar. Defaults to True.
        collect_device (str): Argument of ``BaseMetric``. Defaults to
            ``'cpu'``.
        prefix (str, optional): Prefix of the names. Defaults to None, for
            ``'sensitivity'``.

    Raises:
        ValueError: If an argument is out of range.

    Source: arXiv:2602.01136.
    """

    default_prefix = 'sensitivity'
    needs_model = True

    def __init__(
        self,
        samples: int = 16,
        profile: bool = True,
        parameters: Sequence[str] | None = None,
        method: str = 'auto',
        steps: int = 20,
        max_classes: int = 20,
        quantile: float = 1.0,
        combine: str = 'max',
        per_sample: bool = False,
        power: float = 1.0,
        base: float = math.e,
        target: str = 'prediction',
        attribution: str = 'gradient',
        std: float = 0.02,
        draws: int = 4,
        pool: int | None = None,
        unit: bool = False,
        batch_size: int = 16,
        seed: int = 0,
        show_progress: bool = True,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device, prefix)
        check_choice('method', method, PROFILE_METHODS)
        check_choice('combine', combine, COMBINATIONS)
        check_choice('target', target, TARGETS)
        check_choice('attribution', attribution, ATTRIBUTIONS)
        _check_least('samples', samples, 2)
        for name, value in dict(
            steps=steps,
            max_classes=max_classes,
            draws=draws,
            batch_size=batch_size,
        ).items():
            _check_least(name, value, 1)
        if not 0 <= quantile <= 1:
            raise ValueError(f'quantile must be in [0, 1], got {quantile!r}')
        self.samples, self.profile = samples, profile
        self.parameters, self.seed = parameters, seed
        self.lanczos: dict[str, Any] = dict(
            method=method, steps=steps, seed=seed
        )
        self.max_classes, self.batch_size = max_classes, batch_size
        self.quantile, self.combine = quantile, combine
        self.per_sample, self.power, self.base = per_sample, power, base
        self.attribution, self.std, self.draws = attribution, std, draws
        self.target = target
        self.pool, self.unit = pool, unit
        self.show_progress = show_progress
        self.model: Any = None
        self.rows: Rows = []

    # ------------------------------------------------------ in an evaluation

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep the first images of the evaluation, normalized.

        Args:
            data_batch (dict): Batch of the data loader.
            data_samples (Sequence[dict]): With ``gt_label``.

        Raises:
            RuntimeError: If no hook handed the model over.
            ValueError: If a sample has not one label.
        """
        share = math.ceil(self.samples / get_world_size())
        count = min(share - len(self.results), len(data_samples))
        if count < 1:
            return
        if self.model is None:
            raise RuntimeError(
                'SensitivityMetric has no model: add '
                "dict(type='mmstabvim.ModelForMetricsHook') to custom_hooks"
            )
        batch = {name: data_batch[name][:count] for name in data_batch}
        images = self.model.data_preprocessor(batch, False)['inputs']
        labels = [_label(sample) for sample in data_samples[:count]]
        # a view would be sent with all of its batch
        images = [image.clone() for image in images.cpu()]
        self.results += zip(images, labels, strict=True)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Measure on the images of all processes.

        Args:
            results (list): Images and labels.

        Returns:
            dict[str, float]: See the class.
        """
        images, labels = zip(*results[: self.samples], strict=True)
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                'images must have one size, got '
                f'{sorted({tuple(image.shape) for image in images})}'
            )
        return self.measure(
            self.model, torch.stack(images), torch.tensor(labels)
        )

    # ------------------------------------------------------------- in Python

    def measure(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """Measure a model on given images.

        Args:
            model (nn.Module): Called with images it gives logits (batch,
                classes), as any classifier of MMPretrain does. Its parameters
                and modes are the same afterwards.
            images (Tensor): (batch, ...), batch >= 2, normalized.
            labels (Tensor): (batch,), integers.
            progress (Progress, optional): Bars are added to it and taken
                away. Defaults to None, for one of its own.

        Returns:
            dict[str, float]: See the class, without ``sensitivity/``.

        Raises:
            ValueError: If the model gives no such logits, or there are too
                few images or labels.
        """
        if len(images) < 2 or labels.shape != images.shape[:1]:
            raise ValueError(
                'images and labels must be two or more, got '
                f'{tuple(images.shape)} and {tuple(labels.shape)}'
            )
        chosen = self._chosen(model)
        images, labels = images.to(chosen[0]), labels.to(chosen[0].device)

        def function(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return check_logits(model(x), x)

        with (
            evaluated(model),
            torch.enable_grad(),
            self._bars(progress) as bars,
        ):
            found, self.rows = self._spectra(function, images, bars)
            found.update(self._attributions(function, images, labels, bars))
            if self.profile:
                found.update(
                    self._profile(function, images, labels, chosen, bars)
                )
        return found

    @contextmanager
    def _bars(self, progress: Progress | None) -> Iterator[Progress]:
        """Add bars to a display that is given, or to a new one."""
        if progress is None:
            console = Console(stderr=True)
            with Progress(
                console=console, disable=not self.show_progress
            ) as own:
                yield own
            return
        known = set(progress.task_ids)
        try:
            yield progress
        finally:
            for task in set(progress.task_ids) - known:
                progress.remove_task(task)

    def _chosen(self, model: nn.Module) -> list[nn.Parameter]:
        """List the parameters that count."""
        prefixes = tuple(self.parameters or ('',))
        chosen = [
            p
            for name, p in model.named_parameters()
            if p.requires_grad and name.startswith(prefixes)
        ]
        if not chosen:
            raise ValueError(
                f'parameters: no trained parameter of {type(model).__name__} '
                f'starts with one of {prefixes}'
            )
        return chosen

    def _spectra(
        self, function: Function, images: Tensor, progress: Progress
    ) -> tuple[dict[str, float], Rows]:
        """Measure the singular values of the input Jacobians."""
        rows: Rows = []
        classes = 0
        task = progress.add_task('input Jacobians', total=len(images))
        for batch in images.split(self.batch_size):
            with torch.no_grad():
                logits = function(batch)
            classes = min(logits.shape[1], self.max_classes)
            top = logits.topk(classes).indices
            jacobian = input_jacobian(function, batch, top)
            columns = self._columns(singular_values(jacobian))
            if classes < logits.shape[1]:
                gain = typical_gain(function, batch, seed=self.seed)
                columns['typical_gain'] = gain.values
                columns['typical_gain_error'] = gain.errors
            else:
                square = jacobian.double().square().mean(2).sum(1)
                columns['typical_gain'] = square
            columns['prediction'] = logits.argmax(1)
            lists = [column.tolist() for column in columns.values()]
            rows += [
                dict(zip(columns, line, strict=True))
                for line in zip(*lists, strict=True)
            ]
            progress.advance(task, len(batch))
        names = [n for n in rows[0] if n != 'prediction']
        means = {n: _mean([row[n] for row in rows]) for n in names}
        if 'typical_gain_error' in means:
            errors = [row['typical_gain_error'] for row in rows]
            means['typical_gain_error'] = math.hypot(*errors) / len(rows)
        means.update(samples=len(images), classes=classes)
        return means, rows

    def _columns(self, values: Tensor) -> dict[str, Tensor]:
        """Compute a number per image from singular values (batch, count)."""
        return dict(
            entropy=spectral_entropy(values, self.power, self.base),
            effective_rank=effective_rank(values, self.power),
            condition_number=attribution_condition_number(values),
        )

    def _attributions(
        self,
        function: Function,
        images: Tensor,
        labels: Tensor,
        progress: Progress,
    ) -> dict[str, float]:
        """Measure instability, and the distance after the first change."""
        changes = gaussian_changes(images, self.std, self.draws, self.seed)
        clean: list[Tensor] = []
        moved: list[Tensor] = []
        shares = []
        task = progress.add_task('attributions', total=len(images))
        size = self.batch_size
        parts = images.split(size), changes.split(size, 1), labels.split(size)
        for x, change, classes in zip(*parts, strict=True):
            if self.target == 'prediction':
                classes = predicted_classes(function, x)
            options = (classes, self.attribution)
            shares.append(
                attribution_instability(function, x, change, *options)
            )
            for kept, y in ((clean, x), (moved, x + change[0])):
                values = attributions(function, y, *options)
                kept.append(prepare_attributions(values, self.pool, self.unit))
            progress.advance(task, len(x))
        instability = torch.cat(shares).tolist()
        for row, value in zip(self.rows, instability, strict=True):
            row['instability'] = value
        sets = torch.cat(clean), torch.cat(moved)
        finite = all(bool(torch.isfinite(s).all()) for s in sets)
        return dict(
            instability=_mean(instability),
            frechet_distance=(
                float(frechet_distance(*sets)) if finite else math.inf
            ),
        )

    def _profile(
        self,
        function: Function,
        images: Tensor,
        labels: Tensor,
        parameters: Sequence[Tensor],
        progress: Progress,
    ) -> dict[str, float]:
        """Measure the four norms and the index."""
        task = progress.add_task('Hessians', total=len(images))
        found = sensitivity_profile(
            function,
            images,
            labels,
            parameters,
            max_classes=self.max_classes,
            watch=lambda: progress.advance(task),
            **self.lanczos,
        )
        for name in ('input_jacobian', 'parameter_jacobian', 'hessian'):
            column = getattr(found, name).tolist()
            for row, value in zip(self.rows, column, strict=True):
                row[name] = value
        errors = {
            f'{name}_error': error
            for name, error in found.errors.items()
            if error > 0
        }
        options = (self.quantile, self.combine, self.per_sample)
        return dict(
            **found.values(self.quantile, self.per_sample),
            **errors,
            hessian_max=float(found.hessian_max.max()),
            hessian_min=float(found.hessian_min.min()),
            index=found.index(*options),
            finite=float(found.finite),
        )


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')


def _label(sample: dict) -> int:
    """Return the one label of a sample."""
    label = sample.get('gt_label')
    if not isinstance(label, Tensor) or label.numel() != 1:
        raise ValueError(f'each sample must have one gt_label, got {label!r}')
    return int(label)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
