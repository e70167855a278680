"""Predictions of a model for one image, and their comparison."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """Prediction of a classifier or a segmentor for one image.

    Attributes:
        logits (Tensor): (classes,) or (classes, height, width).
        labels (Tensor): () or (height, width), predicted classes.
    """

    logits: Tensor
    labels: Tensor


def classifier_predictions(logits: Any) -> list[Prediction]:
    """Split the logits of a batch.

    Args:
        logits (Tensor): (batch, classes).

    Returns:
        list[Prediction]: One per image.

    Raises:
        TypeError: If ``logits`` are none.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = getattr(logits, 'shape', type(logits).__name__)
        raise TypeError(
            f'the classifier must return logits (batch, classes), got {got}'
        )
    logits = logits.float()
    return [Prediction(row, row.argmax()) for row in logits]


def segmentor_prediction(sample: Any) -> Prediction:
    """Read the prediction of a segmentor from a sample.

    Args:
        sample (SegDataSample): After ``predict``.

    Returns:
        Prediction: At the size of the original image.
    """
    logits = sample.seg_logits.data.float()
    return Prediction(logits, sample.pred_sem_seg.data[0].long())


def truth_of(sample: Any) -> Tensor:
    """Return the annotation of a sample.

    Args:
        sample (DataSample | SegDataSample): Sample of the dataset.

    Returns:
        Tensor: () or (height, width).

    Raises:
        ValueError: If there is none, or several labels.
    """
    if 'gt_sem_seg' in sample:
        return sample.gt_sem_seg.data[0].long()
    label = sample.get('gt_label')
    if label is None or torch.as_tensor(label).numel() != 1:
        raise ValueError(
            'a sample must have one gt_label or a gt_sem_seg, got '
            f'{sorted(sample.keys())}'
        )
    return torch.as_tensor(label).reshape(()).long()


def difference(clean: Prediction, other: Prediction) -> dict[str, float]:
    """Measure the distance of a prediction from the clean image's.

    Args:
        clean (Prediction): Prediction for the clean image.
        other (Prediction): Prediction for a corrupted one.

    Returns:
        dict[str, float]: ``flips``, 0 or 1, for a segmentor the share of
        pixels; ``shift``, Euclidean distance of the logits, for a segmentor
        the mean over pixels.
    """
    flips = (clean.labels != other.labels).double().mean()
    shift = torch.linalg.vector_norm(other.logits - clean.logits, dim=0)
    return dict(flips=float(flips), shift=float(shift.double().mean()))


def score(
    answer: Prediction, truth: Tensor, ignore_index: int
) -> dict[str, Any]:
    """Compare a prediction with the annotation.

    Args:
        answer (Prediction): Prediction for the clean or a corrupted image.
        truth (Tensor): Annotation, see :func:`truth_of`.
        ignore_index (int): Pixels with this label do not count.

    Returns:
        dict[str, Any]: ``correct`` and ``counted`` pixels (or images) and,
        for a segmentor, the areas ``intersect`` and ``union`` of each class,
        (classes,) in pixels.
    """
    truth = truth.to(answer.labels.device)
    if truth.dim() == 0:
        return dict(correct=int(answer.labels == truth), counted=1)
    counted = truth != ignore_index
    label, found = truth[counted], answer.labels[counted]
    # a lone channel is a foreground's
    classes = max(len(answer.logits), 2)
    hit, true, said = (
        torch.bincount(labels, minlength=classes)[:classes]
        for labels in (label[label == found], label, found)
    )
    return dict(
        correct=int(hit.sum()),
        counted=len(label),
        intersect=hit.cpu().numpy(),
        union=(true + said - hit).cpu().numpy(),
    )
