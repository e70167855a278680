"""Accuracy, flips and shifts for each corruption of a sweep."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric

from mmstabvim.evaluation.robustness_summary import Rows, score_name, summarize
from mmstabvim.evaluation.robustness_wrapper import FIELD
from mmstabvim.registry import METRICS

_SUMS = ('flips', 'shift', 'correct', 'counted', 'intersect', 'union')


@METRICS.register_module()
class RobustnessMetric(BaseMetric):
    """Condense the results of ``mmstabvim.RobustnessWrapper``.

    A metric alone sees the predictions of one pass; so the wrapper makes the
    passes, and this metric reads its field ``robustness`` of each sample.
    All values are in percent, but the shift of the logits.

    In a distributed test the samples that fill up the last batches count
    twice.

    After an evaluation the attribute ``rows`` has one line for each
    corruption, see :meth:`make_rows`.

    Args:
        collect_device (str): Argument of ``BaseMetric``. Defaults to
            ``'cpu'``.
        prefix (str, optional): Prefix of the names. Defaults to None, for
            ``'robustness'``.
    """

    default_prefix = 'robustness'

    def __init__(
        self, collect_device: str = 'cpu', prefix: str | None = None
    ) -> None:
        super().__init__(collect_device, prefix)
        self.rows: Rows = []

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Add a batch to the sums, of which there is one per process.

        Args:
            data_batch (Any): Not used.
            data_samples (Sequence[dict]): With the field ``robustness``.

        Raises:
            ValueError: If that is missing, or the sweep changed.
        """
        for sample in data_samples:
            if FIELD not in sample:
                raise ValueError(
                    'RobustnessMetric needs a model inside '
                    'mmstabvim.RobustnessWrapper, got a sample with '
                    f'{sorted(sample)}'
                )
            self.results[:] = [_add(self.results, _totals(sample[FIELD]))]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Condense the sums of all processes.

        Args:
            results (list): One dict for each.

        Returns:
            dict[str, float]: See
            :func:`mmstabvim.evaluation.robustness_summary.summarize`.
        """
        total: list[dict] = []
        for result in results:
            total = [_add(total, result)]
        self.rows = self.make_rows(total[0])
        return summarize(self.rows, score_name(self.rows))

    @staticmethod
    def make_rows(total: dict[str, Any]) -> Rows:
        """Make a row for the clean images and one for each corruption.

        Args:
            total (dict): Sums over images.

        Returns:
            Rows: ``kind, frequency, phase, images``; ``relative_rms``, size
            relative to the contrast, mean over the images that have some;
            ``top1``, or ``mIoU`` and ``aAcc``, in percent; ``flip_rate`` in
            percent; ``logit_shift``.
        """
        images = total['images']
        rows = []
        for i, mode in enumerate(total['modes']):
            row = dict(mode, images=images)
            row['relative_rms'] = total['relative'][i] / total['has'][i]
            accuracy = 100 * total['correct'][i] / total['counted'][i]
            if 'union' in total:
                row['mIoU'] = _mean_iou(
                    total['intersect'][i], total['union'][i]
                )
                row['aAcc'] = accuracy
            else:
                row['top1'] = accuracy
            row['flip_rate'] = 100 * total['flips'][i] / images
            row['logit_shift'] = total['shift'][i] / images
            rows.append(
                {
                    key: value.item() if hasattr(value, 'item') else value
                    for key, value in row.items()
                }
            )
        return rows


def _totals(record: dict[str, Any]) -> dict[str, Any]:
    """Return the quantities that are summed over images."""
    relative = record['relative_rms']
    # a plain image has no contrast to compare with
    known = np.isfinite(relative)
    sums = {name: record[name] for name in _SUMS if name in record}
    return dict(
        sums,
        modes=record['modes'],
        images=1,
        relative=np.where(known, relative, 0.0),
        has=known.astype(float),
    )


def _add(totals: list[dict], new: dict[str, Any]) -> dict[str, Any]:
    """Add the sums of an image to the total, if there is one."""
    if not totals:
        return new
    (old,) = totals
    if old['modes'] != new['modes']:
        raise ValueError(
            'all samples must have the same corruptions, got '
            f'{len(old["modes"])} and {len(new["modes"])}'
        )
    sums = {k: old[k] + new[k] for k in old if k != 'modes'}
    return dict(sums, modes=old['modes'])


def _mean_iou(intersect: np.ndarray, union: np.ndarray) -> float:
    """Average over the classes in the masks or predictions, percent."""
    there = union > 0
    return float(100 * (intersect[there] / union[there]).mean())
