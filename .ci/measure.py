"""Print sizes of the tree as a Markdown table: `python .ci/measure.py [PATH]`.

PATH is a checkout, by default this one.
"""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

OPENINGS = ('What ', 'Whether ', 'Of ', 'As ', 'How ', 'Where ')


def tracked(root: Path, *patterns: str) -> list[Path]:
    """Files that git knows."""
    names = subprocess.run(
        ['git', 'ls-files', '-z', *patterns],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = (root / name for name in names.split('\0') if name)
    return [path for path in paths if path.is_file()]


def lines(paths: list[Path]) -> int:
    """Lines of text files."""
    return sum(len(path.read_text().splitlines()) for path in paths)


def functions(paths: list[Path]) -> list[ast.FunctionDef]:
    """Functions and methods, nested ones too."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [
        node
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
    ]


def docstrings(paths: list[Path]) -> list[str]:
    """Docstrings of modules, classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = [
        ast.get_docstring(node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
    ]
    return [text for text in found if text]


def import_circles(root: Path) -> int:
    """Modules of the package that import each other, at whatever distance."""
    package = tracked(root, 'mmstabvim/**/*.py', 'mmstabvim/*.py')
    names = {_module(root, path): path for path in package}
    graph = {name: _imports(path, names) for name, path in names.items()}
    reach: dict[str, set[str]] = {}
    for name in graph:
        seen, todo = set(), [name]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        reach[name] = seen
    return sum(name in seen for name, seen in reach.items())


def _module(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that are imported when this one is."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f'{node.module}.{a.name}' for a in node.names}
            inside = {name for name in members if name in known}
            found |= inside or {node.module}
    return {name for name in found if name in known}


def measure(root: Path) -> dict[str, str]:
    """Collect all numbers of a checkout."""
    code = tracked(
        root,
        *(f'{p}/*.{e}' for p in ('mmstabvim', 'tools') for e in ('py', 'cpp')),
    )
    python = [path for path in code if path.suffix == '.py']
    thin = [
        path
        for path in python
        if path.is_relative_to(root / 'tools')
        and not {'benchmarks', 'reproduce'} & set(path.parts)
        and not path.name.startswith('reproduce_')
    ]
    sizes = [f.end_lineno - f.lineno + 1 for f in functions(python)]
    texts = docstrings(python)
    docs = sum(path.stat().st_size for path in tracked(root, 'docs'))
    tests = tracked(root, 'tests/*.py')
    return {
        'lines, package and tools (Python, C++)': f'{lines(code):,}',
        'lines, tools without benchmarks and reproduce': f'{lines(thin):,}',
        'lines, tests': f'{lines(tests):,}',
        'config files (Python)': str(len(tracked(root, 'configs/*.py'))),
        'docs, MB': f'{docs / 1e6:.1f}',
        'function length, median / 90th percentile': (
            f'{statistics.median(sizes):g} / '
            f'{statistics.quantiles(sizes, n=10)[-1]:g}'
        ),
        'docstrings that begin with What, Whether, Of, As, How, Where': str(
            sum(text.startswith(OPENINGS) for text in texts)
        ),
        'modules in import circles': str(import_circles(root)),
    }


def main() -> None:
    """Print one row for each number."""
    roots = [Path(p).resolve() for p in sys.argv[1:]]
    roots = roots or [Path(__file__).resolve().parents[1]]
    tables = [measure(root) for root in roots]
    print('| |' + ' |' * len(tables))  # noqa: T201
    print('| --- |' + ' --- |' * len(tables))  # noqa: T201
    for name in tables[0]:
        cells = ' | '.join(table[name] for table in tables)
        print(f'| {name} | {cells} |')  # noqa: T201


if __name__ == '__main__':
    main()
