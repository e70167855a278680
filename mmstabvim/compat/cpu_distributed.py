"""Distributed training on a CPU."""

import atexit
import gc
import os
from typing import Any

import torch
from mmengine.logging import print_log


def prepare_cpu_distributed(cfg: Any) -> None:
    """Let ``launcher='pytorch'`` work without a GPU; for the tools.

    Starts the gloo process group, which the Runner then finds, and sets
    ``cfg`` accordingly. Does nothing with a GPU, another launcher, or outside
    of torchrun. mmengine 0.10.7 and 0.11.0rc3 always call
    ``torch.cuda.set_device``; ends when they ask first.

    Args:
        cfg (Config): The whole config, changed in place: ``env_cfg``,
            ``model_wrapper_cfg``, and every SyncBN becomes BN, since CPUs
            have none.
    """
    torchrun = {'RANK', 'WORLD_SIZE'} <= os.environ.keys()
    if cfg.get('launcher') != 'pytorch' or not torchrun:
        return
    if torch.cuda.is_available():
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
        atexit.register(_leave_process_group)
    cfg.env_cfg = _with_gloo(cfg.get('env_cfg') or {})
    cfg.model_wrapper_cfg = _wrapper_without_device(cfg)
    replaced = _replace_sync_bn(list(cfg.values()))
    replaced += cfg.pop('sync_bn', None) is not None
    if replaced:
        print_log(
            f'No GPU: {replaced} x SyncBN turned into BN in the config, so '
            'statistics are those of each process.',
            logger='current',
        )


def _leave_process_group() -> None:
    """End gloo's threads: one that meets the end of Python aborts it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # they end with the last model that refers to the group
    gc.collect()


def _with_gloo(env_cfg: dict) -> dict:
    """Return ``env_cfg`` with gloo as the backend."""
    dist_cfg = {**(env_cfg.get('dist_cfg') or {}), 'backend': 'gloo'}
    return {**env_cfg, 'dist_cfg': dist_cfg}


def _wrapper_without_device(cfg: Any) -> dict:
    """Return the model wrapper's config, the user's where there is one."""
    wrapper = cfg.get('model_wrapper_cfg')
    if wrapper is None:
        wrapper = {
            'broadcast_buffers': False,
            'find_unused_parameters': cfg.get('find_unused_parameters', False),
        }
    wrapper = {'type': 'MMDistributedDataParallel', **wrapper}
    if wrapper['type'] == 'MMDistributedDataParallel':
        # Without the key mmengine names a GPU.
        wrapper.setdefault('device_ids', None)
    return wrapper


def _replace_sync_bn(node: Any) -> int:
    """Turn every SyncBN below ``node`` into BN and count them."""
    if isinstance(node, (list, tuple)):
        return sum(_replace_sync_bn(child) for child in node)
    if not isinstance(node, dict):
        return 0
    count = 0
    if node.get('type') in ('SyncBN', 'MMSyncBN'):
        node['type'] = 'BN'
        count = 1
    return count + sum(_replace_sync_bn(child) for child in node.values())
