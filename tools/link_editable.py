"""Put an editable install where OpenMMLab's ``mim`` looks for it.

``mim`` looks for a package's configs, tools and model index in the folder of
the installed packages, and there an editable install has no more than its
metadata. This makes a link to the source tree there. ``make setup`` runs it;
after a ``pip install -e .`` of your own, run it with that Python.
"""

import argparse
import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / 'mmstabvim'


def link_editable(site: Path) -> str:
    """Link the package into a folder of installed packages.

    Args:
        site (Path): Folder with the metadata that pip has left.

    Returns:
        str: Outcome, for the user.

    Raises:
        SystemExit: If the package is not installed there.
    """
    records = list(site.glob('mmstabvim-*.dist-info/RECORD'))
    if not records:
        raise SystemExit(
            f'mmstabvim is not installed in {site}. Cure: pip install -e .'
        )
    link = site / PACKAGE.name
    if link.exists() and not link.is_symlink():
        return f'{link} is no editable install: mim finds it as it is'
    link.unlink(missing_ok=True)
    link.symlink_to(PACKAGE, target_is_directory=True)
    _record(records[0], link.name)
    return f'{link} -> {PACKAGE}'


def _record(record: Path, name: str) -> None:
    """Let pip remove the link with the install, and never write through."""
    line = f'{name},,\n'
    if line not in record.read_text().splitlines(keepends=True):
        with record.open('a') as file:
            file.write(line)


def main(args: list[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(args)
    print(link_editable(Path(sysconfig.get_path('purelib'))))


if __name__ == '__main__':
    main()
