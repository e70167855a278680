"""Maps at several strides from a backbone that has one stride."""

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmstabvim.registry import MODELS


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Feature pyramid of a backbone whose maps all have the same stride.

    Scale k is ``fpn{k}`` and acts on its own map, so the parameters have the
    names of the published segmentation checkpoints. A map is enlarged by
    transposed convolutions with kernel and stride 2, norm and activation
    between two of them, left as it is, or reduced by max-pooling. Pooling
    keeps what remains at the bottom and at the right: a map of 45 x 63 tokens
    with stride 16 becomes 23 x 32 with stride 32. (The published code drops
    the rest; the two agree where the pooling divides the map, as at its
    512 x 512 pixels.)

    Args:
        in_channels (int): Channels of the maps, those of the results too:
            the backbone's ``embed_dims``.
        stride (int): Stride of the maps, pixels: the backbone's
            ``patch_stride``, or ``patch_size`` without one. Defaults to 16.
        out_strides (int | Sequence[int]): Strides wanted, pixels; each is
            ``stride`` times or divided by a power of two. Defaults to
            ``(4, 8, 16, 32)``.
        norm_cfg (dict, optional): Norm between two transposed convolutions,
            such as ``SyncBN``, ``BN`` or ``LN2d``; None is without. Defaults
            to ``dict(type='SyncBN')``, as published.
        act_cfg (dict): Activation there. Defaults to ``dict(type='GELU')``,
            as published.
        init_cfg (dict, optional): MMEngine's initialization.

    Raises:
        ValueError: If an argument is out of range, or the maps do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        stride: int = 16,
        out_strides: int | Sequence[int] = (4, 8, 16, 32),
        norm_cfg: dict[str, Any] | None = dict(type='SyncBN'),  # noqa: B006
        act_cfg: dict[str, Any] = dict(type='GELU'),  # noqa: B006
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if isinstance(out_strides, int):
            out_strides = [out_strides]
        _check_sizes(in_channels, stride, out_strides)
        self.in_channels, self.stride = in_channels, stride
        self.out_strides = tuple(out_strides)
        for k, wanted in enumerate(self.out_strides, start=1):
            scale = _scale(in_channels, stride, wanted, norm_cfg, act_cfg)
            self.add_module(f'fpn{k}', scale)

    def forward(self, maps: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
        """Bring the maps of a backbone to the strides wanted.

        Args:
            maps (Sequence[Tensor] | Tensor): One map for each of
                ``out_strides``, or a single one for all: (batch,
                in_channels, rows, columns), floating.

        Returns:
            tuple[Tensor, ...]: (batch, in_channels, rows * stride /
            out_stride, columns * stride / out_stride), rounded up.
        """
        maps = [maps] if isinstance(maps, Tensor) else list(maps)
        self._check_maps(maps)
        if len(maps) == 1:
            maps = maps * len(self.out_strides)
        return tuple(
            self.get_submodule(f'fpn{k}')(x)
            for k, x in enumerate(maps, start=1)
        )

    def check_count(self, count: int) -> None:
        """Raise ValueError unless a backbone's maps can be so many."""
        wanted = len(self.out_strides)
        if count not in (1, wanted):
            raise ValueError(
                f"the backbone's out_indices must give 1 map, or {wanted}, "
                f'one for each of out_strides {self.out_strides}, got {count}'
            )

    def _check_maps(self, maps: list[Tensor]) -> None:
        self.check_count(len(maps))
        for x in maps:
            if x.dim() != 4:
                raise ValueError(
                    'maps must be (batch, in_channels, rows, columns): set '
                    "the backbone's out_type to 'featmap'; got "
                    f'{tuple(x.shape)}'
                )
            if x.shape[1] != self.in_channels:
                raise ValueError(
                    f'in_channels is {self.in_channels}, got a map with '
                    f'{x.shape[1]} channels, {tuple(x.shape)}'
                )


def _check_sizes(
    in_channels: int, stride: int, out_strides: Sequence[int]
) -> None:
    for name, value in (('in_channels', in_channels), ('stride', stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f'{name} must be a positive int, got {value!r}')
    if not out_strides or not all(_ratio(stride, s) for s in out_strides):
        raise ValueError(
            f'out_strides must be {stride} (stride) times or divided by a '
            f'power of two, for instance {_possible(stride)}, got '
            f'{out_strides!r}'
        )


def _possible(stride: int) -> tuple[int, ...]:
    """Strides that ``stride`` can be brought to."""
    finer = [stride // n for n in (4, 2) if stride % n == 0]
    return (*finer, stride, 2 * stride)


def _ratio(stride: int, wanted: int) -> int:
    """Larger stride by the smaller one; 0 unless that is a power of two."""
    if not isinstance(wanted, int) or wanted < 1:
        return 0
    ratio, rest = divmod(max(stride, wanted), min(stride, wanted))
    return 0 if rest or ratio & (ratio - 1) else ratio


def _scale(
    channels: int,
    stride: int,
    wanted: int,
    norm_cfg: dict[str, Any] | None,
    act_cfg: dict[str, Any],
) -> nn.Module:
    """Build the layers from ``stride`` to the stride wanted."""
    ratio = _ratio(stride, wanted)
    if ratio == 1:
        return nn.Identity()
    if wanted > stride:
        return nn.MaxPool2d(ratio, ratio, ceil_mode=True)
    layers: list[nn.Module] = []
    while ratio > 1:
        if layers:
            layers += [_norm(norm_cfg, channels), _activation(act_cfg)]
        layers.append(nn.ConvTranspose2d(channels, channels, 2, stride=2))
        ratio //= 2
    return nn.Sequential(*layers)


def _norm(cfg: dict[str, Any] | None, channels: int) -> nn.Module:
    if cfg is None:
        return nn.Identity()
    from mmcv.cnn import build_norm_layer

    if cfg.get('type') == 'LN2d':
        # MMPretrain's, which MMSegmentation's scope does not find
        cfg = dict(cfg, type='mmpretrain.LN2d')
    try:
        return build_norm_layer(cfg, channels)[1]
    except KeyError as error:
        raise ValueError(
            "norm_cfg must be such as dict(type='SyncBN'), 'BN' or 'LN2d', "
            f'got {cfg!r}: {error}'
        ) from error


def _activation(cfg: dict[str, Any]) -> nn.Module:
    from mmcv.cnn import build_activation_layer

    return build_activation_layer(cfg)
