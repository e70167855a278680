"""Vision Mamba, a bidirectional state-space backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmstabvim.layers import (
    DropPath,
    PatchEmbed,
    RMSNorm,
    RotaryEmbedding2d,
    VisionMambaBlock,
)
from mmstabvim.layers.position_embedding import (
    guess_grid,
    join_tokens,
    num_cls_tokens,
    resize_position_embedding,
    split_tokens,
)
from mmstabvim.layers.state_matrix import (
    decompose_together,
    state_matrices,
)
from mmstabvim.layers.vision_mamba_block import add_residual
from mmstabvim.models.backbones.vision_mamba_init import INIT_RECIPES
from mmstabvim.registry import MODELS
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


@MODELS.register_module()
class VisionMamba(BaseModule):
    """Vision Mamba (Vim) for MMPretrain, MMSegmentation or plain PyTorch.

    The image becomes a row-major sequence of patches, class tokens are put at
    their place, position embedding is added, and blocks with a bidirectional
    selective scan follow.

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, ``'base'``, or a dict with
            ``embed_dims`` (channels), ``num_layers`` and optionally
            ``d_state`` (16), ``d_conv`` (4), ``expand`` (2), ``dt_rank``
            (``'auto'``: ``ceil(embed_dims / 16)``). Defaults to ``'tiny'``.
        img_size (int | tuple[int, int]): Height and width for which the
            position embedding is made, pixels; other sizes interpolate it.
            Defaults to 224.
        patch_size (int): Side of a patch, pixels. Defaults to 16.
        patch_stride (int, optional): Distance of two patches, pixels;
            ``patch_size`` if None. Defaults to None.
        in_channels (int): Channels of the image. Defaults to 3.
        cls_token (str | None): Place of the class token: ``'middle'`` (index
            ``num_patches // 2``, the published models), ``'head'``,
            ``'double'`` (first and last) or None. Defaults to ``'middle'``.
        out_type (str): Form of the outputs. ``'cls_token'``: (batch,
            embed_dims), the mean of the two if double; ``'avg_featmap'``:
            (batch, embed_dims), mean over patches; ``'featmap'``: (batch,
            embed_dims, rows, columns); ``'raw'``: (batch, length,
            embed_dims). Defaults to ``'cls_token'``.
        out_indices (int | Sequence[int]): Blocks whose outputs are returned;
            negative ones count from the end. Defaults to -1.
        drop_rate (float): Dropout after the position embedding. Defaults to
            0.0.
        drop_path_rate (float): Largest stochastic depth rate; grows linearly
            with the depth. Defaults to 0.0.
        with_cp (bool): Recompute each block in the backward pass to save
            memory. Defaults to False.
        frozen_stages (int): 0 freezes the embeddings, n > 0 also the first n
            blocks (and the final norm if all), -1 nothing. Defaults to -1.
        final_norm (bool): Normalize the outputs; every output with the norm
            that follows the last block. Defaults to True.
        with_pos_embed (bool): Absolute position embedding. Defaults to True.
        interpolate_mode (str): Its interpolation. Defaults to ``'bicubic'``.
        rotary (dict, optional): Two-dimensional rotary embedding before each
            block: ``base_size`` (14; positions that a side spans) and
            ``residual`` (True; rotate the residual stream too). Defaults to
            None: without.
        state_matrix (dict, optional): Parametrization of the state matrix:
            ``type`` is ``'neg_exp'`` (as published), ``'signed'``,
            ``'complex'`` or ``'full'``, the rest its options (see
            :mod:`mmstabvim.layers.state_matrix`). ``dict(type='neg_exp')`` if
            None. Defaults to None.
        b_disc (str): Discretization of B, ``'euler'`` as published, or
            ``'zoh'``. Defaults to ``'euler'``.
        scan_backend (str): Backend of the scan. Defaults to ``'auto'``.
        init_recipe (str): ``'default'``, or ``'official'`` with the published
            code's accidents (see :mod:`.vision_mamba_init`). Defaults to
            ``'default'``.
        debug (bool): Raise on a non-finite image instead of computing with
            it. Defaults to False.
        init_cfg (dict, optional): mmengine's initialization, for example
            ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')``.

    Raises:
        TypeError: If an argument or the image has a wrong type.
        ValueError: If an argument is out of range, or a checkpoint has
            another width.

    Source: arXiv:2401.09417.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = 'tiny',
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        patch_stride: int | None = None,
        in_channels: int = 3,
        cls_token: str | None = 'middle',
        out_type: str = 'cls_token',
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        frozen_stages: int = -1,
        final_norm: bool = True,
        with_pos_embed: bool = True,
        interpolate_mode: str = 'bicubic',
        rotary: dict[str, Any] | None = None,
        state_matrix: dict[str, Any] | None = None,
        b_disc: str = 'euler',
        scan_backend: str = 'auto',
        init_recipe: str = 'default',
        debug: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        arch = _resolve_arch(arch)
        self.embed_dims, self.num_layers = (
            arch.pop('embed_dims'),
            arch.pop('num_layers'),
        )
        self.num_extra_tokens = num_cls_tokens(cls_token)
        check_choice('out_type', out_type, OUT_TYPES)
        check_choice('init_recipe', init_recipe, tuple(INIT_RECIPES))
        if out_type == 'cls_token' and cls_token is None:
            raise ValueError(
                "out_type 'cls_token' needs a class token, but cls_token is "
                'None'
            )
        if not -1 <= frozen_stages <= self.num_layers:
            raise ValueError(
                f'frozen_stages must be from -1 to {self.num_layers}, got '
                f'{frozen_stages}'
            )
        self.cls_token_place, self.out_type = cls_token, out_type
        self.out_indices = _resolve_indices(out_indices, self.num_layers)
        self.with_cp, self.frozen_stages = with_cp, frozen_stages
        self.interpolate_mode, self.debug = interpolate_mode, debug

        self.patch_embed = PatchEmbed(
            in_channels,
            self.embed_dims,
            patch_size,
            patch_stride or patch_size,
        )
        self.grid = self.patch_embed.grid_size(*_pair('img_size', img_size))
        length = self.grid[0] * self.grid[1] + self.num_extra_tokens
        self.cls_token = self.pos_embed = None
        if self.num_extra_tokens:
            self.cls_token = nn.Parameter(
                torch.zeros(1, self.num_extra_tokens, self.embed_dims)
            )
        if with_pos_embed:
            self.pos_embed = nn.Parameter(
                torch.zeros(1, length, self.embed_dims)
            )
        self.dropout = nn.Dropout(drop_rate)
        self.rotary, self.rotate_residual = None, False
        if rotary is not None:
            self.rotary, self.rotate_residual = _build_rotary(
                self.embed_dims, **rotary
            )
        # the incoming output of block i is that of block i - 1
        rates = torch.linspace(
            0, drop_path_rate, self.num_layers, device='cpu'
        )
        self.layers = nn.ModuleList(
            VisionMambaBlock(
                self.embed_dims,
                drop_path=rate,
                state_matrix=state_matrix,
                b_disc=b_disc,
                backend=scan_backend,
                **arch,
            )
            for rate in [0.0, *rates][: self.num_layers]
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm = RMSNorm(self.embed_dims) if final_norm else nn.Identity()
        INIT_RECIPES[init_recipe](self)
        self._freeze()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of a batch of images.

        Args:
            image (Tensor): (batch, in_channels, height, width), floating.

        Returns:
            tuple[Tensor, ...]: One feature for each of ``out_indices``, in
            the form given by ``out_type``.
        """
        self._check_image(image)
        decompose_together(state_matrices(self.layers).values())
        hidden, grid = self._embed(image)
        residual, outputs = None, []
        for i, block in enumerate(self.layers):
            hidden, residual = self._rotate(hidden, residual, grid)
            hidden, residual = self._run(block, hidden, residual)
            if i in self.out_indices:
                branch = hidden
                if i == self.num_layers - 1:
                    branch = self.drop_path(hidden)
                stream = self.norm(add_residual(branch, residual))
                outputs.append(self._format(stream, grid))
        return tuple(outputs)

    def _embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of an image, (batch, length, embed_dims), and their grid."""
        tokens, grid = self.patch_embed(image)
        if self.cls_token is not None:
            cls_token = self.cls_token.expand(len(tokens), -1, -1)
            tokens = join_tokens(
                cls_token.to(tokens.dtype), tokens, self.cls_token_place
            )
        if self.pos_embed is not None:
            tokens = tokens + resize_position_embedding(
                self.pos_embed,
                self.grid,
                grid,
                self.cls_token_place,
                self.interpolate_mode,
            )
        return self.dropout(tokens), grid

    def _rotate(
        self, hidden: Tensor, residual: Tensor | None, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        if self.rotary is not None:
            hidden = self.rotary(hidden, grid, self.cls_token_place)
            if residual is not None and self.rotate_residual:
                residual = self.rotary(residual, grid, self.cls_token_place)
        return hidden, residual

    def _run(
        self, block: nn.Module, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(block, hidden, residual, use_reentrant=False)
        return block(hidden, residual)

    def _format(self, stream: Tensor, grid: tuple[int, int]) -> Tensor:
        """Bring (batch, length, embed_dims) into the form of out_type."""
        if self.out_type == 'raw':
            return stream
        tokens, patches = split_tokens(stream, self.cls_token_place)
        if self.out_type == 'cls_token':
            return tokens.mean(dim=1)
        if self.out_type == 'avg_featmap':
            return patches.mean(dim=1)
        return patches.transpose(1, 2).unflatten(2, grid).contiguous()

    def _check_image(self, image: Tensor) -> None:
        if not image.is_floating_point():
            raise TypeError(
                f'image must have a floating dtype, got {image.dtype}'
            )
        channels = self.patch_embed.projection.in_channels
        if image.dim() != 4 or image.shape[1] != channels:
            raise ValueError(
                f'image must be (batch, {channels}, height, width), got '
                f'{tuple(image.shape)}'
            )
        if self.debug and not torch.isfinite(image).all():
            finite = torch.isfinite(image).flatten(1).all(dim=1)
            raise ValueError(
                'image must be finite, got NaN or infinity in the batch '
                f'entries {(~finite).nonzero().flatten().tolist()}'
            )

    def _freeze(self) -> None:
        """Stop the gradients of the frozen parts, set them to evaluation."""
        if self.frozen_stages < 0:
            return
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                parameter.requires_grad_(False)
        self.dropout.eval()
        modules = [self.patch_embed, *self.layers[: self.frozen_stages]]
        if self.frozen_stages == self.num_layers:
            modules += [self.norm, self.drop_path]
        for module in modules:
            module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'VisionMamba':
        """Set the mode; frozen parts stay in evaluation."""
        super().train(mode)
        if mode:
            self._freeze()
        return self

    def get_layer_depth(
        self, param_name: str, prefix: str = ''
    ) -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rate decay.

        Args:
            param_name (str): Name, as of ``model.named_parameters()``.
            prefix (str): What precedes the backbone's own names, for example
                ``'backbone.'``. Defaults to ``''``.

        Returns:
            tuple[int, int]: The depth (0 for the embeddings, i + 1 for block
            i, the last for everything else) and the number of depths,
            ``num_layers + 2``.
        """
        depths = self.num_layers + 2
        if not param_name.startswith(prefix):
            return depths - 1, depths
        name = param_name[len(prefix) :]
        if name.split('.')[0] in ('cls_token', 'pos_embed', 'patch_embed'):
            return 0, depths
        if name.startswith('layers.'):
            return int(name.split('.')[1]) + 1, depths
        return depths - 1, depths

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Check the width and fit the position embedding before loading."""
        self._check_width(state_dict, prefix)
        self._fit_position_embedding(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_width(self, state_dict: dict[str, Any], prefix: str) -> None:
        weight = state_dict.get(f'{prefix}patch_embed.projection.weight')
        if weight is not None and weight.shape[0] != self.embed_dims:
            raise ValueError(
                f'the checkpoint has embed_dims {weight.shape[0]}, the model '
                f'{self.embed_dims}: choose the arch of the checkpoint'
            )

    def _fit_position_embedding(
        self, state_dict: dict[str, Any], prefix: str
    ) -> None:
        """Resize a checkpoint's position embedding to this model's grid."""
        key, cls_key = f'{prefix}pos_embed', f'{prefix}cls_token'
        if self.pos_embed is None or key not in state_dict:
            return
        pos_embed = state_dict[key]
        extra = state_dict[cls_key].shape[1] if cls_key in state_dict else 0
        place = self.cls_token_place
        if extra != self.num_extra_tokens:
            if self.num_extra_tokens:
                return  # load_state_dict reports the missing class token
            place = {1: 'middle', 2: 'double'}[extra]
        old_grid = guess_grid(pos_embed.shape[1] - extra, self.grid)
        resized = resize_position_embedding(
            pos_embed, old_grid, self.grid, place, self.interpolate_mode
        )
        if old_grid != self.grid:
            print_log(
                f'position embedding resized from {old_grid} to {self.grid}',
                logger='current',
            )
        if place != self.cls_token_place:
            resized = split_tokens(resized, place)[1]
            del state_dict[cls_key]
        state_dict[key] = resized


def _resolve_arch(arch: str | dict[str, Any]) -> dict[str, Any]:
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


def _resolve_indices(
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


def _build_rotary(
    embed_dims: int, base_size: int = 14, residual: bool = True
) -> tuple[RotaryEmbedding2d, bool]:
    return RotaryEmbedding2d(embed_dims, base_size), residual


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(
            f'{name} must be a positive int or (height, width), got {value!r}'
        )
    return pair
