"""Load weights into a model: find, rename, fill, count."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.loading.file import (
    SOURCE,
    find_weights,
    metadata_of,
    name_source,
    select,
    take_source,
)
from mmstabvim.loading.module import fill, unwrap, weights_of
from mmstabvim.loading.names import (
    fit_prefix,
    from_elsewhere,
    without_compiled,
)
from mmstabvim.loading.report import LoadReport, compare, refuse_misfit


def load_weights(
    model: nn.Module,
    file: Any,
    prefix: str | None = None,
    strict: bool = False,
) -> LoadReport:
    """Load a checkpoint file into a model, whatever tool has written it.

    Names may carry ``module.``, ``_orig_mod.``, ``model.``, ``backbone.`` or
    another common prefix, or lack it; a model whose class knows the names of
    another project (:class:`mmstabvim.VisionMamba` those of the official
    Vim) gets them converted in memory. Only tensors are read.

    Args:
        model (nn.Module): Changed in place; may be wrapped.
        file (str | os.PathLike | BinaryIO): Written by ``torch.save``, or
            safetensors.
        prefix (str, optional): Part of the file to load, such as
            ``'backbone.'`` or a key such as ``'model_ema'``. Defaults to
            None: all of it.
        strict (bool): Refuse anything that does not fit. Defaults to False.

    Returns:
        LoadReport: Outcome, readable as text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or if nothing or less than
            half of the backbone is in it.
        RuntimeError: With ``strict``, if anything does not fit.

    Example:
        >>> from mmstabvim import VisionMamba, load_weights
        >>> backbone = VisionMamba('tiny')
        >>> load_weights(backbone, 'vim_t_midclstok.pth')  # doctest: +SKIP
    """
    checkpoint = name_source(load_checkpoint_tensors(file), file)
    if prefix is not None:
        checkpoint = select(checkpoint, prefix)
    return load_into(model, checkpoint, strict)


def load_into(
    model: nn.Module, checkpoint: Mapping[str, Any], strict: bool
) -> LoadReport:
    """Find, rename and load weights, then count them.

    Args:
        model (nn.Module): Changed in place; may be wrapped.
        checkpoint (Mapping[str, Any]): Content of a file, or weights by name.
        strict (bool): Refuse anything that does not fit.

    Returns:
        LoadReport: Outcome.
    """
    target = unwrap(model)
    own = weights_of(target)
    report = LoadReport(type(target).__name__, total=len(own))
    take_source(report, metadata_of(checkpoint))
    try:
        weights, notes = find_weights(checkpoint)
        report.notes += notes
        metadata = metadata_of(weights)
        if weights is not checkpoint:
            take_source(report, metadata)
        metadata.pop(SOURCE, None)
        state = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
        state, metadata = without_compiled(state, metadata, report)
        state = from_elsewhere(target, state, report)
        state, metadata = fit_prefix(target, state, metadata, report)
        before = dict(state)
        errors = fill(target, state, metadata)
    except ValueError as error:
        raise ValueError(f'{report.source}: {error}') from error
    compare(report, own, before, state)
    refuse_misfit(report, target, own, before)
    if strict and not (report.complete and not errors):
        raise RuntimeError(f'strict loading: {report}')
    return report
