"""The benchmark scripts run, and print the tables that they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
