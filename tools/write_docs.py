"""Write what of docs/ is made from the code and from the reports of measurements.

    python tools/write_docs.py            docs/deck.md, and the tables between marks in other pages
    python tools/write_docs.py --check    writes nothing; status 1 if a page is not up to date

A page marks a table by `<!-- table: NAME -->` and `<!-- end -->`; what is between is replaced.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.documents import deck, figures

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def fill(text: str, tables: Mapping[str, Callable[[], str]], where: str) -> str:
    """The text with every marked table made anew.

    Raises:
        SystemExit: a mark names no table.
    """

    def made(match: re.Match[str]) -> str:
        if match[2] not in tables:
            sys.exit(f"{where}: no table {match[2]!r}; there are {', '.join(tables)}")
        return f"{match[1]}{tables[match[2]]()}{match[3]}"

    return _MARKED.sub(made, text)


def pages(folder: Path) -> dict[Path, str]:
    """Each page of ``folder`` as it should be."""
    wanted = {
        path: fill(path.read_text(encoding="utf-8"), figures.TABLES, path.name)
        for path in sorted(folder.glob("*.md"))
    }
    wanted[folder / "deck.md"] = deck.page()
    return wanted


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="write_docs.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only tell what is not up to date")
    options = parser.parse_args(words)
    status = 0
    for path, text in pages(DOCS).items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            print(f"{path.relative_to(ROOT)} is not up to date: run python tools/write_docs.py")
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    return status


if __name__ == "__main__":
    sys.exit(main())
