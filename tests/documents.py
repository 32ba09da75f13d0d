"""What the pages for people hold: blocks of shell and of files, links, quotes.

```sh            commands that a laptop can run, in order, from the folder of the checkout
```sh apart      commands that a test has no place for, as they fetch, need root or take long
```sh cluster    commands for a batch system: their files, options and decks are checked
```python        whose first line is `# NAME.py`: that file, before the commands below it
```toml          whose first line is `# NAME.toml`: likewise
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.S | re.M)
_FILE = re.compile(r"# ([\w./-]+\.(?:py|toml))\n")


def pages() -> list[Path]:
    """README and all of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: what stands behind its fence, its text, and the line of its first line."""

    kind: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name of the file that the block is."""
        found = _FILE.match(self.text)
        return found[1] if found and self.kind in ("python", "toml") else None

    def commands(self) -> list[str]:
        """Commands without comments; one that goes on behind a backslash is one."""
        joined = self.text.replace("\\\n", " ")
        lines = (line.split(" # ")[0].strip() for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1].strip(), match[2], text.count("\n", 0, match.start(2)) + 1)
        for match in _FENCED.finditer(text)
    ]


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(file, anchor) of each link of a page that stays in the checkout."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", head).strip().lower() for head in heads)
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in plain}


def messages() -> list[str]:
    """Texts that the code may print: strings of Python, with a tab for each value that is filled
    in, and lines of shell scripts."""
    found: list[str] = []
    for path in sorted((ROOT / "hpcsync").rglob("*.py")) + sorted((ROOT / "tools").rglob("*.py")):
        found += _strings(ast.parse(path.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "slurm").rglob("*")):
        if path.is_file():
            found += path.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    return found


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
            text = _text(node)
            if text:
                yield text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "\t" for part in node.values)
    if isinstance(node, ast.BinOp):
        return f"{_text(node.left) or chr(9)}{_text(node.right) or chr(9)}"
    return ""


def quoted(quote: str, texts: list[str]) -> bool:
    """Whether one text holds the parts of a quote between its dots, in order."""
    parts = [re.escape(part.strip()) for part in re.split(r"\.\.\.", quote) if part.strip()]
    pattern = re.compile(".*?".join(parts), re.S)
    return any(pattern.search(text) for text in texts)
