"""Divergences in distributed training."""

import os
import subprocess
import sys
from pathlib import Path

from divergence_runs import ROOT, first_in

SCRIPT = """
import math
import sys
from pathlib import Path

import torch.distributed as dist
from mmengine.config import Config
from divergence_runs import (
    DivergenceHook, Spy, batches, infinite_gradient, make_runner, write_nan,
)
from torch.utils.data import DataLoader

from mmstabvim.compat import prepare_cpu_distributed


def run(action):
    cfg = Config(dict(launcher='pytorch'))
    prepare_cpu_distributed(cfg)
    rank = dist.get_rank()
    cfg.model_wrapper_cfg.broadcast_buffers = True
    cfg.model_wrapper_cfg.find_unused_parameters = True
    folder = Path(sys.argv[1], action)
    runner = make_runner(
        folder,
        DivergenceHook(
            action=action, checkpoint_interval=2, activation_interval=1
        ),
        train_dataloader=DataLoader(batches(16)[rank::2], batch_size=4),
        iters=8,
        launcher='pytorch',
        experiment_name=action,
        cfg=cfg,
    )
    block = runner.model.module.block[1]
    if rank == 1 and action == 'rollback':
        # both ranks have it after the gradients are averaged
        block.bias.register_hook(infinite_gradient(runner, {5}))
    elif rank == 1:
        # clamped away: only activations show it, on this rank alone
        block.register_forward_hook(write_nan(runner, {5}, math.inf))
    lines = []
    weight = runner.model.module.first.weight
    runner.register_hook(Spy(lambda r: lines.append(
        f'{r.iter} {r.optim_wrapper.get_lr()["lr"][0]} '
        + weight.detach().sum().item().hex()
    )))
    try:
        runner.train()
    except RuntimeError as error:
        lines.append(f'stopped: {error}')
    (folder / f'rank{rank}.txt').write_text('\\n'.join(lines))


run('rollback')
run('stop')
"""


def test_two_processes_decide_alike(tmp_path):
    """A divergence on one rank takes back, or stops, both."""
    script = tmp_path / 'run.py'
    script.write_text(SCRIPT)
    command = [sys.executable, '-m', 'torch.distributed.run']
    command += ['--nproc_per_node=2', '--master_port=29651', str(script)]
    path = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]
    )
    done = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1'),
        timeout=240,  # ranks that disagree wait for each other
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for action in ('rollback', 'stop'):
        ranks = [
            (tmp_path / action / f'rank{r}.txt').read_text() for r in (0, 1)
        ]
        assert ranks[0] == ranks[1]
        lines = ranks[0].splitlines()
        (path,) = (tmp_path / action).glob('*/divergence_report.md')
        report = path.read_text()
        assert 'Iteration 6,' in report
        assert 'Rank 1 of 2 processes' in report
        assert path.with_name('divergence_iter_6.pth').exists()
        if action == 'stop':
            assert first_in(report) == 'output of `block.1` (Linear)'
            assert len(lines) == 6
            assert 'stopped: training diverged at iteration 6' in lines[-1]
            continue
        assert first_in(report) == (
            'gradient of parameter bias of `block.1` (Linear)'
        )
        rates = [float(line.split()[1]) for line in lines]
        assert rates == [0.01] * 5 + [0.005] * 3
        # back to what iteration 4 has left
        assert lines[5].split()[2] == lines[3].split()[2]
