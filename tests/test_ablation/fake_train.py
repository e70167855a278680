"""Stands in for tools/train.py: same options, same files, no training.

Its config says what it does: ``model.behaviour`` is ``'ok'``, ``'fail'``,
``'nan'`` (and nothing after it for a minute), ``'back'`` (one NaN, then on),
``'stubborn'`` or ``'report'``; ``model.pause`` is the seconds of a step.
"""

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path


def say(text):
    sys.stdout.write(f'{text}\n')
    sys.stdout.flush()


def read_args():
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    parser.add_argument('--work-dir', type=Path)
    parser.add_argument('--resume', action='store_true')
    parser.add_argument('--seed', type=int)
    parser.add_argument('--amp', action='store_true')
    parser.add_argument('--amp-dtype')
    parser.add_argument('--cfg-options', nargs='+', default=[])
    return parser.parse_args()


def settings(args):
    found = runpy.run_path(args.config)
    for option in args.cfg_options:
        name, _, value = option.partition('=')
        *path, last = name.split('.')
        part = found
        for key in path:
            part = part[key]
        part[last] = value
    return found


def checkpoint(folder):
    path = folder / 'checkpoint'
    return path, int(path.read_text()) if path.exists() else 0


def main():
    args = read_args()
    cfg = settings(args)
    model = cfg['model']
    behaviour, pause = model['behaviour'], float(model['pause'])
    worker = subprocess.Popen(['sleep', '60'])
    (args.work_dir / 'worker').write_text(str(worker.pid))
    path, start = checkpoint(args.work_dir)
    seen = ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')
    say(json.dumps({name: os.environ.get(name) for name in seen}))
    say(f'amp {args.amp_dtype} from {start}')
    if behaviour == 'stubborn':
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run = args.work_dir / f'run_{start:02d}'
    (run / 'vis_data').mkdir(parents=True)
    with open(run / 'vis_data' / 'scalars.json', 'a') as log:
        for step in range(start + 1, 5):
            if behaviour == 'fail' and step == 3:
                raise RuntimeError('no more data')
            if behaviour == 'report' and step == 3:
                report = run / 'divergence_report.md'
                report.write_text('- Loss not finite.\n- Iteration 3, epoch 1')
                raise RuntimeError(f'diverged, see {report}')
            strange = behaviour in ('nan', 'back') and step == 3
            loss = float('nan') if strange else 1 / step
            line = dict(loss=loss, time=0.1 * step, iter=step, step=step)
            log.write(json.dumps(line) + '\n')
            score = {'accuracy/top1': 10.0 * step + args.seed}
            score |= {'data_time': 0.1, 'step': step}
            log.write(json.dumps(score) + '\n')
            log.flush()
            say(f'Epoch(train)  [{step}][1/1]  loss: {loss}')
            path.write_text(str(step))
            stays = behaviour == 'stubborn' or loss != loss
            time.sleep(60 if stays and behaviour != 'back' else pause)
    worker.kill()


if __name__ == '__main__':
    sys.exit(main())
