"""Hidden attention of a mixer's scans on given tokens."""

from typing import cast

import torch
from torch import Tensor

from mmstabvim.layers.mamba_mixer import MambaMixer
from mmstabvim.layers.mixer_ranges import Ranges, trace_mixer
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.stability.ranges.hidden_attention import (
    aggregate_attention,
    hidden_attention,
)


@torch.no_grad()
def mixer_attention(
    mixer: MambaMixer,
    normed: Tensor,
    how: str | None = 'abs',
    with_skip: bool = False,
) -> list[Tensor]:
    """What each token takes from each other one in the scans of a mixer.

    About the scan alone, ``y = alpha u + D u``: u are the tokens after
    ``in_proj``, convolution and SiLU, each direction's own; gate and
    ``out_proj`` come after it.

    Args:
        mixer (MambaMixer): The mixer.
        normed (Tensor): (batch, length, d_model), what it reads.
        how (str, optional): Over the channels, as in
            :func:`aggregate_attention`; None keeps every channel, (batch,
            d_inner, length, length). Defaults to ``'abs'``.
        with_skip (bool): Add D to the diagonal. Defaults to False.

    Returns:
        list[Tensor]: (batch, length, length) of each direction, output token
        before source token, without gradient.

    Source: arXiv:2403.01590.
    """
    traced = trace_mixer(mixer, normed).directions
    return [
        _direction_attention(direction, tensors, how, with_skip)
        for direction, tensors in zip(
            cast(list[SelectiveSSM], list(mixer.directions)),
            traced,
            strict=True,
        )
    ]


def _direction_attention(
    direction: SelectiveSSM, traced: Ranges, how: str | None, with_skip: bool
) -> Tensor:
    B, C = traced['B'], traced['C']
    system = direction.state_matrix.scan_matrices(B, C)
    if system is None:  # no eigenbasis: as the scan does
        A = direction.state_matrix.dense()
        B, C = B[:, :, None], C[:, :, None]
    else:
        A, B, C = system
    D = direction.D if with_skip else None
    given = traced['delta'], A, B, C, D, direction.reverse, direction.b_disc
    if how is None:
        return hidden_attention(*given)
    return aggregate_attention(*given, how=how)
