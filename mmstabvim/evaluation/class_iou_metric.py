"""Intersection over union of every class, as numbers in the log."""

from mmseg.evaluation import IoUMetric

from mmstabvim.registry import METRICS


@METRICS.register_module()
class ClassIoUMetric(IoUMetric):
    """MMSegmentation's ``IoUMetric`` that also returns each class's value.

    That one prints a table of the classes and returns their means only. Here
    ``IoU/<class>``, in percent, is returned too: it is logged, drawn over
    training, and can be asked for in a report. A class that is neither in
    the masks nor predicted has NaN, or ``nan_to_num`` where that is given.

    The arguments are those of ``IoUMetric``.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the means and each class's intersection over union.

        Args:
            results (list): For each image intersection, union, predicted and
                true area of each class, pixels.

        Returns:
            dict[str, float]: In percent; nothing with ``format_only``, the
            means alone where ``iou_metrics`` does not have ``'mIoU'``.
        """
        metrics = dict(super().compute_metrics(results))
        if self.format_only or 'mIoU' not in self.metrics:
            return metrics
        areas = [sum(parts) for parts in zip(*results, strict=True)]
        values = self.total_area_to_metrics(
            *areas, metrics=['mIoU'], nan_to_num=self.nan_to_num
        )
        for name, value in zip(
            self.dataset_meta['classes'], values['IoU'].tolist(), strict=True
        ):
            metrics[f'IoU/{name}'] = round(100 * value, 2)
        return metrics
