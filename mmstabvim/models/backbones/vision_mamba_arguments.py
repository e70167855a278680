"""Arguments of :class:`.vision_mamba.VisionMamba`: sizes, forms, checks."""

from collections.abc import Sequence
from typing import Any

from mmstabvim.layers import RotaryEmbedding2d
from mmstabvim.stability.inputs import check_choice

ARCHS: dict[str, dict[str, Any]] = {
    'tiny': dict(embed_dims=192, num_layers=24, d_state=16),
    'small': dict(embed_dims=384, num_layers=24, d_state=16),
    'base': dict(embed_dims=768, num_layers=24, d_state=16),
}
ARCH_KEYS = {
    'embed_dims',
    'num_layers',
    'd_state',
    'd_conv',
    'expand',
    'dt_rank',
}
OUT_TYPES = ('cls_token', 'avg_featmap', 'featmap', 'raw')
FEATURES = ('normed', 'mixer_output', 'residual')
LAST_LAYERS = ('none', 'add', 'add_norm')


def resolve_arch(arch: str | dict[str, Any]) -> dict[str, Any]:
    """Sizes of the model as a new dict."""
    if isinstance(arch, str):
        check_choice('arch', arch, tuple(ARCHS))
        return dict(ARCHS[arch])
    if not isinstance(arch, dict):
        raise TypeError(f'arch must be a str or a dict, got {arch!r}')
    missing = {'embed_dims', 'num_layers'} - arch.keys()
    unknown = arch.keys() - ARCH_KEYS
    if missing or unknown:
        raise ValueError(
            f'arch must have embed_dims and num_layers, and may have '
            f'{sorted(ARCH_KEYS)}, got {arch!r}'
        )
    sizes = {k: v for k, v in arch.items() if k != 'dt_rank'}
    if any(not isinstance(v, int) or v < 1 for v in sizes.values()):
        raise ValueError(f'arch must hold positive integers, got {arch!r}')
    return dict(arch)


def resolve_indices(
    out_indices: int | Sequence[int], num_layers: int
) -> list[int]:
    """Indices from the front, in increasing order."""
    given = [out_indices] if isinstance(out_indices, int) else out_indices
    resolved = [i + num_layers if i < 0 else i for i in given]
    if (
        not resolved
        or any(not 0 <= i < num_layers for i in resolved)
        or sorted(set(resolved)) != resolved
    ):
        raise ValueError(
            f'out_indices must increase within 0 ... {num_layers - 1} (or '
            f'count from the end with -1 ... -{num_layers}), got '
            f'{out_indices!r}'
        )
    return resolved


def resolve_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one int for both, or from the pair."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(
            f'{name} must be a positive int or (height, width), got {value!r}'
        )
    return pair


def build_rotary(
    embed_dims: int, base_size: int = 14, residual: bool = True
) -> tuple[RotaryEmbedding2d, bool]:
    """Rotary embedding, and whether the residual stream turns too."""
    return RotaryEmbedding2d(embed_dims, base_size), residual


def check_out_type(out_type: str, cls_token: str | None) -> None:
    """Raise ValueError where a class token is wanted that is not there."""
    check_choice('out_type', out_type, OUT_TYPES)
    if out_type == 'cls_token' and cls_token is None:
        raise ValueError(
            "out_type 'cls_token' needs a class token, but cls_token is None"
        )


def check_feature(
    feature: str, last_layer: str, final_norm: bool, with_last: bool
) -> None:
    """Raise ValueError where ``last_layer`` contradicts another argument.

    Args:
        feature (str): See :class:`.vision_mamba.VisionMamba`.
        last_layer (str): See there.
        final_norm (bool): See there.
        with_last (bool): Whether ``out_indices`` has the last block.
    """
    check_choice('feature', feature, FEATURES)
    check_choice('last_layer', last_layer, LAST_LAYERS)
    if last_layer == 'none':
        return
    if feature == 'normed':
        contradiction = "feature 'normed' treats the last block as the others"
    elif not with_last:
        contradiction = 'out_indices does not have the last block'
    elif last_layer == 'add_norm' and not final_norm:
        contradiction = 'final_norm is False'
    else:
        return
    raise ValueError(
        f"last_layer must be 'none' here, got {last_layer!r}: {contradiction}"
    )
