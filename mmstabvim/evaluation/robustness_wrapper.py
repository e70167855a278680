"""Wrapper that tests a model with a sweep of corruptions."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseTTAModel
from torch import Tensor, nn

from mmstabvim.evaluation.corruptions import (
    CORRUPTIONS,
    LEVELS,
    Corruption,
    FourierNoise,
    Size,
    make_corruption,
)
from mmstabvim.evaluation.fourier_modes import (
    Frequency,
    Grid,
    is_silent,
    mode_frequencies,
    rms_contrast,
)
from mmstabvim.evaluation.predictions import (
    Prediction,
    classifier_predictions,
    difference,
    score,
    segmentor_prediction,
    truth_of,
)
from mmstabvim.hook_handles import HookHandles
from mmstabvim.registry import MODELS
from mmstabvim.stability.inputs import check_choice

FIELD = 'robustness'
"""Key of a data sample with the wrapper's findings."""

CLEAN = dict(kind='clean', frequency=None, phase=None)


@MODELS.register_module()
class RobustnessWrapper(BaseTTAModel):
    """Test a model on each image, clean and with every corruption.

    It stands around a classifier of MMPretrain or a segmentor of
    MMSegmentation as the wrappers for test-time augmentation do, and loads
    the checkpoint of the model inside. It returns the predictions for the
    clean images, so other metrics are not affected; beside them it puts the
    field that ``mmstabvim.RobustnessMetric`` reads.

    Fourier modes of all frequencies and phases are swept. Other corruptions
    of the same energy serve as comparison.

    Args:
        module (dict | nn.Module): The model.
        frequencies (int | Sequence[Frequency], optional): Cycles per token;
            a number takes about so many of ``k / length``, evenly spaced
            from 0 to 1/2, of the first batch's images; pairs are plane waves
            (cycles per column, cycles per row). Defaults to None, for all of
            ``k / length``.
        phases (int | Sequence[float]): In radians; a number draws so many
            for each frequency. Modes that are zero everywhere are left out.
            Defaults to cosine and sine, 0 and pi/2.
        level (str): Level of the modes: ``'token'``, constant within each
            patch; ``'pixel'``, along the raster of pixels; ``'embed'``, on
            the embedded patches. Defaults to ``'token'``.
        amplitude (float): Root mean square of a corruption, relative to
            the contrast of each image. Defaults to 0.1.
        relative (bool): Set False for an amplitude that is a share of
            ``value_range``. Defaults to True.
        clip (bool): Keep pixels within 0 and ``value_range``. Defaults to
            False, as clipping adds harmonics.
        value_range (float): Largest pixel value before normalization.
            Defaults to 255.0.
        corruptions (Sequence[str | dict]): Names of ``CORRUPTIONS``, or dicts
            with ``type`` and options. Defaults to all.
        patch_size (int, optional): Side of a patch, for a backbone without
            ``patch_embed.projection``. Defaults to None.
        ignore_index (int): Label of pixels that do not count. Defaults to
            255.
        seed (int): Seed of phases, noise and direction. Defaults to 0.
        data_preprocessor (dict | nn.Module, optional): Preprocessor of the
            model, where it is a setting beside it. Defaults to None.

    Raises:
        ValueError: If an argument is out of range, the patches cannot be
            found, or a segmentor works on sliding windows, which have grids
            of their own (but for ``level='embed'``).

    Source: arXiv:2310.01698.
    """

    def __init__(
        self,
        module: dict | nn.Module,
        frequencies: int | Sequence[Frequency] | None = None,
        phases: int | Sequence[float] = (0.0, math.pi / 2),
        level: str = 'token',
        amplitude: float = 0.1,
        relative: bool = True,
        clip: bool = False,
        value_range: float = 255.0,
        corruptions: Sequence[str | dict[str, Any]] = CORRUPTIONS,
        patch_size: int | None = None,
        ignore_index: int = 255,
        seed: int = 0,
        data_preprocessor: dict | nn.Module | None = None,
    ) -> None:
        super().__init__(module, data_preprocessor)
        check_choice('level', level, LEVELS)
        size = Size(amplitude, relative, value_range, clip)
        self.frequencies, self.phases, self.level = frequencies, phases, level
        self.size, self.seed, self.ignore_index = size, seed, ignore_index
        self.patch_size = patch_size
        self.corruptions = [
            make_corruption(size=size, seed=seed, **_as_options(corruption))
            for corruption in corruptions
        ]
        self.sweep: list[Corruption] | None = None
        self.on_pass: Callable[[int, int], None] | None = None
        self._check_windows()

    def _windows(self) -> Sequence[int] | None:
        """Return height and width of the windows that a segmentor slides."""
        test_cfg = getattr(self.module, 'test_cfg', None)
        if not isinstance(test_cfg, dict) or test_cfg.get('mode') != 'slide':
            return None
        return test_cfg['crop_size']

    def _check_windows(self) -> None:
        if self._windows() is not None and self.level != 'embed':
            raise ValueError(
                f'level={self.level!r} needs a segmentor that sees whole '
                "images, got test_cfg.mode='slide': set "
                "model.test_cfg.mode='whole', or level='embed'"
            )

    def merge_preds(self, data_samples_list: Any) -> Any:
        """Refuse: nothing is merged."""
        raise NotImplementedError('RobustnessWrapper merges no predictions')

    def val_step(self, data: dict) -> list:
        """Do the same as :meth:`test_step`."""
        return self.test_step(data)

    @torch.no_grad()
    def test_step(self, data: dict) -> list:
        """Predict a batch, clean and with every corruption.

        Args:
            data (dict): Batch of a data loader, ``inputs`` and
                ``data_samples``.

        Returns:
            list: Data samples with the predictions for the clean images and
            a field ``robustness``: a dict of ``modes`` (list of dicts, the
            first one the clean image) and arrays with one line for each.
        """
        device = self.module.data_preprocessor.device
        images = [image.to(device).float() for image in data['inputs']]
        prepared = self._prepare(data, images)
        samples = self.module(**prepared, mode='predict')
        dense = 'pred_sem_seg' in samples[0]
        clean = self._answers(prepared, dense, samples)
        truths = [truth_of(sample) for sample in samples]
        grid = self._grid(prepared['inputs'].shape[-2:])
        sweep = self._sweep_for(grid)
        records = [
            [self._record(answer, answer, truth, 0.0)]
            for answer, truth in zip(clean, truths, strict=True)
        ]
        for number, corruption in enumerate(sweep, 1):
            changed = [corruption(image, grid) for image in images]
            prepared = self._prepare(data, changed)
            with self._in_embedding(corruption) as ratios:
                found = self._answers(prepared, dense)
            sizes = ratios[0] if ratios else _ratios(images, changed)
            together = zip(clean, found, truths, sizes.tolist(), strict=True)
            for record, answers in zip(records, together, strict=True):
                record.append(self._record(*answers))
            if self.on_pass is not None:
                self.on_pass(number, len(sweep))
        self._attach(samples, records, sweep)
        return samples

    def _attach(
        self, samples: list, records: list[list[dict]], sweep: list
    ) -> None:
        """Attach the records to each sample, as columns."""
        modes = [CLEAN, *(corruption.describe() for corruption in sweep)]
        for sample, record in zip(samples, records, strict=True):
            columns = {k: np.array([r[k] for r in record]) for k in record[0]}
            sample.set_field(dict(modes=modes, **columns), FIELD)

    def _prepare(self, data: dict, images: list[Tensor]) -> dict:
        """Normalize a batch with these images in it."""
        stacked = isinstance(data['inputs'], Tensor)
        inputs = torch.stack(images) if stacked else images
        changed = dict(data, inputs=inputs)
        return self.module.data_preprocessor(changed, False)

    def _answers(
        self, prepared: dict, dense: bool, samples: list | None = None
    ) -> list[Prediction]:
        """Predict each image of a prepared batch."""
        if not dense:
            inputs = prepared['inputs']
            return classifier_predictions(self.module(inputs, mode='tensor'))
        if samples is None:
            samples = self.module(**prepared, mode='predict')
        return [segmentor_prediction(sample) for sample in samples]

    @contextmanager
    def _in_embedding(self, corruption: Corruption) -> Iterator[list[Tensor]]:
        """Let a mode of level ``'embed'`` act on the tokens.

        Yields a list that gets the sizes relative to the tokens' spread.
        """
        ratios: list[Tensor] = []
        if not isinstance(corruption, FourierNoise) or self.level != 'embed':
            yield ratios
            return

        def corrupt(_module: nn.Module, _args: Any, output: Any) -> Any:
            tokens, grid = output
            tokens, ratio = corruption.add_to_tokens(tokens, tuple(grid))
            ratios.append(ratio)
            return tokens, grid

        with HookHandles() as handles:
            handles.add(self._patch_embed().register_forward_hook(corrupt))
            yield ratios

    def _patch_embed(self) -> Any:
        """Find the patch embedding of the backbone."""
        backbone = getattr(self.module, 'backbone', None)
        found = getattr(backbone, 'patch_embed', None)
        if not isinstance(getattr(found, 'projection', None), nn.Conv2d):
            raise ValueError(
                f'level={self.level!r} needs a backbone with '
                f'patch_embed.projection, got {type(backbone).__name__}; '
                "level='token' can do with patch_size"
            )
        return found

    def _grid(self, size: Sequence[int]) -> Grid:
        """Return the grid of the network's input for images of this size."""
        height, width = self._windows() or size
        if self.level == 'pixel':
            return Grid(height, width)
        if self.level == 'token' and self.patch_size is not None:
            patch = (self.patch_size, self.patch_size)
            stride = patch
        else:
            projection = self._patch_embed().projection
            patch, stride = projection.kernel_size, projection.stride
        rows, columns = (
            max(-(-(n - p) // s), 0) + 1
            for n, p, s in zip((height, width), patch, stride, strict=True)
        )
        return Grid(rows, columns, stride)

    def _sweep_for(self, grid: Grid) -> list[Corruption]:
        """Return the sweep, which is made for the first batch."""
        if self.sweep is None:
            self.sweep = [*self._modes(grid), *self.corruptions]
        return self.sweep

    def _modes(self, grid: Grid) -> Iterator[FourierNoise]:
        """Yield each frequency with each phase, but no mode that is zero."""
        generator = torch.Generator().manual_seed(self.seed)
        frequencies = self.frequencies
        if frequencies is None or isinstance(frequencies, int):
            frequencies = mode_frequencies(grid.length, frequencies)
        for given in frequencies:
            frequency = _as_frequency(given)
            phases = self.phases
            if isinstance(phases, int):
                drawn = torch.rand(phases, generator=generator)
                phases = (2 * math.pi * drawn).tolist()
            for phase in phases:
                if not is_silent(grid, frequency, phase):
                    yield FourierNoise(
                        self.size, frequency, phase, self.level, self.seed
                    )

    def _record(
        self,
        clean: Prediction,
        answer: Prediction,
        truth: Tensor,
        relative_rms: float,
    ) -> dict[str, Any]:
        """Collect all numbers about one image and one corruption."""
        return dict(
            relative_rms=relative_rms,
            **difference(clean, answer),
            **score(answer, truth, self.ignore_index),
        )


def _ratios(old: list[Tensor], new: list[Tensor]) -> Tensor:
    """Measure the changes of images relative to their contrast."""
    return torch.stack(
        [
            (after - before).square().mean().sqrt() / rms_contrast(before)
            for before, after in zip(old, new, strict=True)
        ]
    )


def _as_frequency(given: Any) -> Frequency:
    """Convert a number, or a pair, which a config may have as a list."""
    if isinstance(given, (int, float)):
        return float(given)
    across, down = given
    return float(across), float(down)


def _as_options(corruption: str | dict[str, Any]) -> dict[str, Any]:
    """Turn a corruption of a config into arguments of its builder."""
    if isinstance(corruption, str):
        return dict(name=corruption)
    options = dict(corruption)
    return dict(name=options.pop('type'), **options)
