"""Vision Mamba, a bidirectional state-space backbone."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmstabvim.layers import (
    DropPath,
    PatchEmbed,
    RMSNorm,
    VisionMambaBlock,
)
from mmstabvim.layers.position_embedding import (
    join_tokens,
    num_cls_tokens,
    resize_position_embedding,
    split_tokens,
)
from mmstabvim.layers.state_matrix import decompose_all, state_matrices
from mmstabvim.layers.vision_mamba_block import add_residual
from mmstabvim.models.backbones.vision_mamba_arguments import (
    OUT_TYPES,
    build_rotary,
    check_feature,
    check_out_type,
    resolve_arch,
    resolve_indices,
    resolve_pair,
)
from mmstabvim.models.backbones.vision_mamba_init import INIT_RECIPES
from mmstabvim.models.backbones.vision_mamba_loading import (
    convert_foreign,
    fit_checkpoint,
    token_layout,
)
from mmstabvim.registry import MODELS
from mmstabvim.stability.inputs import check_choice

__all__ = ['OUT_TYPES', 'VisionMamba']


@MODELS.register_module()
class VisionMamba(BaseModule):
    """Vision Mamba (Vim) for MMPretrain, MMSegmentation or plain PyTorch.

    The image becomes a row-major sequence of patches, class tokens are put at
    their place, position embedding is added, and blocks with a bidirectional
    selective scan follow.

    Images of any size are taken: one that the patches do not cover is padded
    with zeros at the bottom and at the right, so with patches that do not
    overlap a map has ``ceil(height / patch_size)`` rows and ``ceil(width /
    patch_size)`` columns, for instance 45 x 63 for 713 x 1000 pixels. From
    a checkpoint, the position embedding is brought to ``img_size`` and a
    class token that the model does not have is left out.

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
        feature (str): What is returned of block i. ``'normed'``: the residual
            stream after it, normalized. The two conventions of the published
            segmentation code: ``'mixer_output'``, what the block's mixer
            returns, before it is added to the stream; ``'residual'``, the
            stream after the block, not normalized, and of the last block what
            ``last_layer`` says. Defaults to ``'normed'``.
        last_layer (str): What is returned of the last block under the latter
            two: ``'none'``, its mixer's output; ``'add'``, the stream after
            it; ``'add_norm'``, that stream normalized. The published code
            heeds it under ``'residual'`` only, and does not drop the last
            block by stochastic depth there. Defaults to ``'none'``.
        drop_rate (float): Dropout after the position embedding. Defaults to
            0.0.
        drop_path_rate (float): Largest stochastic depth rate; grows linearly
            with the depth. Defaults to 0.0.
        with_cp (bool): Recompute each block in the backward pass to save
            memory. Defaults to False.
        frozen_stages (int): 0 freezes the embeddings, n > 0 also the first n
            blocks (and the final norm if all), -1 nothing. Defaults to -1.
        final_norm (bool): Normalize the outputs; every output with the norm
            that follows the last block. Where ``feature`` does not use the
            norm, its weight is kept for checkpoints but does not learn.
            Defaults to True.
        with_pos_embed (bool): Absolute position embedding. Defaults to True.
        interpolate_mode (str): Its interpolation. Defaults to ``'bicubic'``.
        rotary (dict, optional): Two-dimensional rotary embedding before each
            block: ``base_size`` (14; positions that a side spans) and
            ``residual`` (True; rotate the residual stream too). Defaults to
            None: without.
        state_matrix (dict, optional): Parametrization of the state matrix:
            ``type`` is ``'neg_exp'`` (as published), ``'signed'``,
            ``'complex'`` or ``'full'``, ``init`` the eigenvalues with which
            it starts (docs/initialization.md), the rest its options (see
            :mod:`mmstabvim.layers.state_matrix`). ``dict(type='neg_exp')`` if
            None. Defaults to None.
        b_disc (str): Discretization of B, ``'euler'`` as published, or
            ``'zoh'``. Defaults to ``'euler'``.
        backend (str): Backend of the operators: ``'auto'``,
            ``'reference'``, ``'cpu'``, ``'fused'`` or ``'triton'``. Defaults
            to ``'auto'``.
        init_recipe (str): ``'default'``, or ``'official'`` with the published
            code's accidents (see :mod:`.vision_mamba_init`). Defaults to
            ``'default'``.
        debug (bool): Raise on a non-finite image instead of computing with
            it. Defaults to False.
        checkpoint_cls_token (str): ``'middle'`` or ``'head'``: place of the
            class token in a checkpoint that has one, where the model has none
            and the checkpoint does not tell (one of this project does, in its
            metadata). Defaults to ``'middle'``.
        init_cfg (dict, optional): mmengine's initialization, for example
            ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')``.
        scan_backend (str, optional): Former name of ``backend``. Defaults to
            None.

    Raises:
        TypeError: If an argument or the image has a wrong type.
        ValueError: If an argument is out of range or contradicts another
            one, or if a checkpoint has another width, patch size, number of
            blocks or layout of tokens.

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
        feature: str = 'normed',
        last_layer: str = 'none',
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
        backend: str = 'auto',
        init_recipe: str = 'default',
        debug: bool = False,
        checkpoint_cls_token: str = 'middle',
        init_cfg: dict[str, Any] | None = None,
        scan_backend: str | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if scan_backend is not None:
            warnings.warn(
                'scan_backend is called backend now: use backend='
                f'{scan_backend!r}',
                FutureWarning,
                stacklevel=2,
            )
            backend = scan_backend
        arch = resolve_arch(arch)
        self.embed_dims, self.num_layers = (
            arch.pop('embed_dims'),
            arch.pop('num_layers'),
        )
        self.num_extra_tokens = num_cls_tokens(cls_token)
        check_out_type(out_type, cls_token)
        check_choice('init_recipe', init_recipe, tuple(INIT_RECIPES))
        check_choice(
            'checkpoint_cls_token', checkpoint_cls_token, ('middle', 'head')
        )
        if not -1 <= frozen_stages <= self.num_layers:
            raise ValueError(
                f'frozen_stages must be from -1 to {self.num_layers}, got '
                f'{frozen_stages}'
            )
        self.cls_token_place, self.out_type = cls_token, out_type
        self.checkpoint_cls_token = checkpoint_cls_token
        self.out_indices = resolve_indices(out_indices, self.num_layers)
        with_last = self.num_layers - 1 in self.out_indices
        check_feature(feature, last_layer, final_norm, with_last)
        self.feature, self.last_layer = feature, last_layer
        self.with_cp, self.frozen_stages = with_cp, frozen_stages
        self.interpolate_mode, self.debug = interpolate_mode, debug

        self.patch_embed = PatchEmbed(
            in_channels,
            self.embed_dims,
            patch_size,
            patch_stride or patch_size,
        )
        self.grid = self.patch_embed.grid_size(
            *resolve_pair('img_size', img_size)
        )
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
            self.rotary, self.rotate_residual = build_rotary(
                self.embed_dims, **rotary
            )
        # the incoming output of block i is that of block i - 1
        last = max(self.num_layers - 1, 1)
        rates = [drop_path_rate * i / last for i in range(self.num_layers)]
        self.layers = nn.ModuleList(
            VisionMambaBlock(
                self.embed_dims,
                drop_path=rate,
                state_matrix=state_matrix,
                b_disc=b_disc,
                backend=backend,
                **arch,
            )
            for rate in [0.0, *rates][: self.num_layers]
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm: nn.Module = nn.Identity()
        if final_norm:
            self.norm = RMSNorm(self.embed_dims, backend=backend)
        if feature != 'normed' and last_layer != 'add_norm':
            # kept for checkpoints; DDP wants no weight without gradient
            self.norm.requires_grad_(False)
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
        decompose_all(state_matrices(self.layers))
        hidden, grid = self._embed(image)
        residual: Tensor | None = None
        outputs: list[Tensor] = []
        for i, block in enumerate(self.layers):
            hidden, residual = self._rotate(hidden, residual, grid)
            hidden, residual = self._run(block, hidden, residual)
            outputs += self._features(i, hidden, residual)
        dtype = self.patch_embed.projection.weight.dtype
        return tuple(self._format(x.to(dtype), grid) for x in outputs)

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

    def _features(
        self, index: int, hidden: Tensor, residual: Tensor
    ) -> list[Tensor]:
        """Sequences to return that are known after block ``index``."""
        found = []
        if self.feature == 'residual' and index - 1 in self.out_indices:
            found.append(residual)
        if index not in self.out_indices:
            return found
        last = index == self.num_layers - 1
        if self.feature == 'normed':
            branch = self.drop_path(hidden) if last else hidden
            found.append(self.norm(add_residual(branch, residual)))
        elif last and self.last_layer != 'none':
            stream = add_residual(hidden, residual)
            add_norm = self.last_layer == 'add_norm'
            found.append(self.norm(stream) if add_norm else stream)
        elif last or self.feature == 'mixer_output':
            found.append(hidden)
        return found

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

    def convert_foreign_state(
        self, state: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str], list[str]] | None:
        """Rename weights of the official Vim or of an earlier version.

        Args:
            state (dict[str, Tensor]): Weights of any model.

        Returns:
            tuple | None: Weights named as in a classifier or segmentor with
            this backbone, names not used, and notes; None for other weights.
        """
        return convert_foreign(self, state)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Record the layout of the tokens in the metadata."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, '_metadata', {})
        if prefix[:-1] in metadata:
            metadata[prefix[:-1]] |= token_layout(self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        """Fit the position embedding, refuse another kind of model."""
        fit_checkpoint(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, *args
        )
