"""The benchmark scripts run, and print the tables that they promise."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import load_tool

FOLDER = Path(__file__).parents[1] / 'tools/benchmarks'
ARGUMENTS = {
    'bench_selective_scan.py': ['--shape', '1,9,16,2', '--rounds', '1'],
    'bench_stabilizers.py': ['--batch', '1', '--size', '32', '--rounds', '1'],
}


@pytest.mark.parametrize('script', ARGUMENTS)
def test_prints_a_table(script, tmp_path):
    """Every row is as wide as its header; the JSON holds the same runs."""
    numbers = tmp_path / 'numbers.json'
    done = subprocess.run(
        [
            sys.executable,
            str(FOLDER / script),
            *ARGUMENTS[script],
            '--threads=1',
            f'--json={numbers}',
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tables = [
        block.strip().split('\n')
        for block in done.stdout.split('\n\n')
        if block.strip().startswith('|')
    ]
    assert tables
    for header, rule, *rows in tables:
        assert set(rule) == {'|', '-'}
        assert len(rows) >= 2
        assert {row.count('|') for row in rows} == {header.count('|')}
    report = json.loads(numbers.read_text())
    assert 'torch' in report['machine']
    assert len(report['results']) >= len(tables[0]) - 2


def test_rules_on_weights_are_timed_apart_from_the_step(monkeypatch):
    """Once at the start and once a round, not within the step."""
    tool = load_tool('benchmarks/bench_stabilizers')
    calls = []
    monkeypatch.setattr(
        tool.StableRankHook, 'project', lambda self: calls.append(self)
    )
    args = SimpleNamespace(
        arch=dict(embed_dims=16, num_layers=1, d_state=4),
        batch=1,
        size=32,
        device='cpu',
        rounds=2,
        clock='cpu',
        rule=['spectral norm', 'stable rank', tool.REPARAM],
    )
    times = tool.measure_rules(args)
    assert list(times) == ['step', *args.rule]
    assert [len(values) for values in times.values()] == [2] * 4
    assert len(calls) == 1 + 3
    # the layers of the published model, each with its weight
    (hook,) = set(calls)
    assert sum(len(group.parts) for group in hook._groups) == 8


def test_shares_of_the_step():
    """Medians; of a reparametrized step what it takes longer."""
    tool = load_tool('benchmarks/bench_stabilizers')
    times = {
        'step': [3.0, 2.0, 9.0],
        'stable rank': [0.3, 0.1, 0.9],
        tool.REPARAM: [3.3, 3.6, 3.1],
    }
    share, line = tool.rule_line('stable rank', times)
    assert share == pytest.approx(0.1)
    assert line == '| stable rank | 3.00 | 300.0 | 10.00% |'
    share, line = tool.rule_line(tool.REPARAM, times)
    assert share == pytest.approx(0.1)
    times = dict(step=[4.0], projection=[0.3], loss=[0.1])
    share, line = tool.matrix_line('full', times)
    assert share == pytest.approx(0.1)
    assert line == '| full | 4.00 | 300.0 | 100.0 | 10.00% |'


def test_cpu_time_does_not_run_while_the_process_waits():
    tool = load_tool('benchmarks/bench_stabilizers')
    seconds = {
        clock: tool.timed(
            lambda: time.sleep(0.2), SimpleNamespace(clock=clock, device='cpu')
        )
        for clock in tool.CLOCKS
    }
    assert seconds['wall'] >= 0.2
    assert seconds['cpu'] < 0.1
