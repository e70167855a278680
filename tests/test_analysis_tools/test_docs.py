"""The page that lists the tools."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_tool_is_listed():
    """With a line and a command of its own, and nothing that is not there."""
    page = (ROOT / 'docs/analysis_tools.md').read_text()
    rows = re.findall(r'^\| `(\w+\.py)` \| .+ \| `(\w+\.py)[ `]', page, re.M)
    assert all(name == command for name, command in rows)
    tools = {
        path.name for path in (ROOT / 'tools/analysis_tools').glob('*.py')
    }
    assert {name for name, _ in rows} == tools
