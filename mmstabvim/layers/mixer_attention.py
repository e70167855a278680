"""Hidden attention of a mixer's scans on given tokens."""

import functools

import torch
from torch import Tensor

from mmstabvim.layers.mamba_mixer import MambaMixer
from mmstabvim.layers.mixer_ranges import trace_mixer
from mmstabvim.layers.state_matrix import ScanMatrices
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
    """Compute how much each token takes from each other one.

    In the scan alone, ``y = alpha u + D u``: u are the tokens after
    ``in_proj``, convolution and SiLU, each direction's own; gate and
    ``out_proj`` come after it.

    Args:
        mixer (MambaMixer): The mixer.
        normed (Tensor): (batch, length, d_model), what it reads.
        how (str, optional): Reduction over the channels, as in
            :func:`aggregate_attention`; None keeps every channel, (batch,
            d_inner, length, length). Defaults to ``'abs'``.
        with_skip (bool): Add D to the diagonal. Defaults to False.

    Returns:
        list[Tensor]: (batch, length, length) of each direction, output token
        before source token, without gradient.

    Source: arXiv:2403.01590.
    """
    traced = trace_mixer(mixer, normed).directions
    ssm = mixer.ssm
    B, C = (torch.stack([found[name] for found in traced]) for name in 'BC')
    system = ssm.state_matrix.scan_matrices(B, C)
    if system is None:  # no eigenbasis: as the scan does
        matrix = ssm.state_matrix
        A = matrix.by_direction(matrix.dense())
        system = ScanMatrices(A, B.unsqueeze(-2), C.unsqueeze(-2))
    skips = ssm.by_direction(ssm.D)
    found = []
    for k, reverse in enumerate(ssm.order.reverse):
        A, B, C = (part[k] for part in system)
        D = skips[k] if with_skip else None
        delta = traced[k]['delta']
        attention = hidden_attention
        if how is not None:
            attention = functools.partial(aggregate_attention, how=how)
        found.append(attention(delta, A, B, C, D, reverse, ssm.b_disc))
    return found
