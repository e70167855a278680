"""Learning rates that decay from the head down to the embeddings."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import StringIO
from typing import Any

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import nn

from mmstabvim.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Give each block of the backbone the learning rate of its depth.

    A parameter at depth d of D has the configured learning rate times
    ``layer_decay_rate ** (D - 1 - d)``: the embeddings (d = 0) have the
    lowest one, block i has depth i + 1, and what follows the last block, neck
    and heads included, has the full one. The backbone tells the depth
    through ``get_layer_depth(param_name, prefix)``, as ``VisionMamba`` and
    MMPretrain's transformers do; classifiers and segmentors both serve, as
    does a bare backbone. MMPretrain's constructor asks the whole model, so it
    takes classifiers only, and it ignores ``lr_mult``.

    Parameters with equal settings share a group (``layer_depth`` and
    ``lr_scale`` are among its keys), frozen ones are in none. The groups are
    logged as one table.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper, with
            ``lr`` in its ``optimizer``.
        paramwise_cfg (dict): ``layer_decay_rate`` (float), in (0, 1]; 1
            decays nothing. The rest is that of mmengine's
            ``DefaultOptimWrapperConstructor``; ``lr_mult`` and
            ``bias_lr_mult`` multiply the rate of the depth.

    Raises:
        ValueError: If ``layer_decay_rate`` or ``lr`` is absent or out of
            range, or the backbone cannot tell depths.

    Source: arXiv:2106.08254, appendix (layer-wise decay in fine-tuning).
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                "paramwise_cfg['layer_decay_rate'] must be a number in "
                f'(0, 1], got {rate!r}'
            )
        if self.base_lr is None:
            raise ValueError(
                "optim_wrapper['optimizer'] must have a learning rate lr, "
                f'got {self.optimizer_cfg}'
            )

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: bool | None = None,
    ) -> None:
        """Add the groups of ``module`` to ``params``.

        Args:
            params (list[dict]): Changed in place.
            module (nn.Module): The model, or a part of it.
            prefix (str): Name of the part; empty for the model. Defaults to
                ``''``.
            is_dcn_module (bool, optional): True inside a deformable
                convolution. Defaults to None.
        """
        if prefix:  # mmengine walks the parts
            super().add_params(params, module, prefix, is_dcn_module)
            return
        with _without_parameter_lines():
            super().add_params(params, module)
        groups = self._merge(params, module)
        params[:] = [group for group, _ in groups]
        print_log(_format_groups(groups, module), logger='current')

    def _merge(
        self, singles: list[dict[str, Any]], model: nn.Module
    ) -> list[tuple[dict[str, Any], list[str]]]:
        """Scale mmengine's groups of one parameter, join the equal ones.

        Returns:
            list[tuple[dict, list[str]]]: Each group with the names of its
            parameters, by depth.
        """
        depth_of = _depth_function(model)
        names = {p: name for name, p in model.named_parameters()}
        merged: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for single in singles:
            (parameter,) = single['params']
            name = names.pop(parameter, None)
            if name is None:  # tied: it has a group already
                continue
            settings = self._settings(single, *depth_of(name))
            key = repr(sorted(settings.items()))
            group, members = merged.setdefault(
                key, ({'params': [], **settings}, [])
            )
            group['params'].append(parameter)
            members.append(name)
        return sorted(merged.values(), key=lambda g: g[0]['layer_depth'])

    def _settings(
        self, single: dict[str, Any], depth: int, depths: int
    ) -> dict[str, Any]:
        """Return the settings of a group, without its parameters."""
        scale = self.paramwise_cfg['layer_decay_rate'] ** (depths - 1 - depth)
        settings = dict(single, layer_depth=depth, lr_scale=scale)
        # mmengine leaves the multipliers of a custom key in its groups
        for key in ('params', 'lr_mult', 'decay_mult'):
            settings.pop(key, None)
        settings['lr'] = single.get('lr', self.base_lr) * scale
        if self.base_wd is not None:
            settings.setdefault('weight_decay', self.base_wd)
        return settings


def _depth_function(model: nn.Module) -> Callable[[str], tuple[int, int]]:
    """Return the function that gives the depth of a parameter."""
    backbone: Any = getattr(model, 'backbone', None)
    prefix = 'backbone.'
    if backbone is None:  # the model is one
        backbone, prefix = model, ''
    if not hasattr(backbone, 'get_layer_depth'):
        raise ValueError(
            'layer decay wants a backbone with get_layer_depth(param_name, '
            f'prefix), got {type(backbone).__name__}'
        )
    return partial(backbone.get_layer_depth, prefix=prefix)


@contextmanager
def _without_parameter_lines() -> Iterator[None]:
    """Keep mmengine's line for every parameter out of the log."""

    def is_other(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not text.startswith('paramwise_options') and not text.endswith(
            'requires_grad=False'
        )

    logger = MMLogger.get_current_instance()
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _format_groups(
    groups: list[tuple[dict[str, Any], list[str]]], model: nn.Module
) -> str:
    """Tabulate the groups and the frozen parameters."""
    table = Table(box=MARKDOWN)  # ASCII only, for log files
    for column in ('depth', 'scale', 'lr', 'decay', 'tensors', 'parameters'):
        table.add_column(column, justify='right')
    table.add_column('of')
    for group, names in groups:
        table.add_row(
            str(group['layer_depth']),
            f'{group["lr_scale"]:.3g}',
            f'{group["lr"]:.3g}',
            f'{group.get("weight_decay", 0):.3g}',
            *_count(dict(zip(names, group['params'], strict=True))),
        )
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    if frozen:
        table.add_row('frozen', '', '', '', *_count(frozen))
    text = StringIO()
    Console(file=text, width=160).print(table)
    return f'Groups of the optimizer:\n{text.getvalue().strip()}'


def _count(parameters: dict[str, nn.Parameter]) -> tuple[str, str, str]:
    """Count tensors and elements, and list the parts that hold them."""
    parts = {
        '.'.join(name.split('.')[: 2 if name.startswith('backbone.') else 1])
        for name in parameters
    }
    elements = sum(p.numel() for p in parameters.values())
    return str(len(parameters)), f'{elements:,}', ', '.join(sorted(parts))
