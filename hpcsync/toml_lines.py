"""What tomllib lacks: the line of each key of a text.

tomllib tells the line of a syntax error only. So a text that it has accepted is walked once
more by a small scanner, which therefore need check nothing.
"""

from __future__ import annotations

import re
from typing import Any

KeyPath = tuple[str, ...]

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
KEY = re.compile(rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*")
_BLANK = re.compile(r"(?:[ \t\n]+|#[^\n]*)*")
_STRING = re.compile(
    r'''"""(?:\\.|[^\\])*?""""{0,2}|\'\'\'.*?\'\'\''{0,2}|"(?:\\.|[^"\\\n])*"|'[^'\n]*\'''',
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of each key and table of a valid TOML text (lines end in LF).

    Of a key that stands several times (arrays of tables) the first counts.
    """
    return _Scanner(text).scan()


class _Scanner:
    """Finds keys in TOML that tomllib has accepted, so nothing is checked again."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self._counted = (0, 1)

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self.at < len(self.text):
            self._skip(_BLANK)
            if self.text.startswith("[", self.at):
                while self.text[self.at] in "[ \t":
                    self.at += 1
                table = self._key(())
                self._to_line_end()
            elif self.at < len(self.text):
                self._pair(table)
                self._to_line_end()
        return self.lines

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[0]

    def _to_line_end(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end + 1

    def _key(self, table: KeyPath) -> KeyPath:
        """Read a key and note the line of it and of the tables that it implies."""
        start, line = self._counted
        line += self.text.count("\n", start, self.at)
        self._counted = (self.at, line)
        path = (*table, *_split_key(self._skip(KEY)))
        for length in range(len(table) + 1, len(path) + 1):
            self.lines.setdefault(path[:length], line)
        return path

    def _pair(self, table: KeyPath) -> None:
        path = self._key(table)
        self.at = self.text.index("=", self.at) + 1
        self._skip(_BLANK)
        if self.text[self.at] == "{":
            self._inline_table(path)
        elif self.text[self.at] == "[":
            self._array()
        elif not self._skip(_STRING):
            self._skip(_SCALAR)

    def _inline_table(self, path: KeyPath) -> None:
        self.at += 1
        self._skip(_BLANK)
        while self.text[self.at] != "}":
            self._pair(path)
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
                self._skip(_BLANK)
        self.at += 1

    def _array(self) -> None:
        """Skip an array, whatever it holds: its tables have no keys of their own here."""
        depth = 0
        while True:
            character = self.text[self.at]
            if character in "[{":
                depth += 1
            elif character in "]}":
                depth -= 1
            elif character in "\"'":
                self._skip(_STRING)
                continue
            elif character == "#":
                self._skip(_BLANK)
                continue
            self.at += 1
            if depth == 0:
                return


def _split_key(text: str) -> KeyPath:
    if '"' not in text and "'" not in text:
        return tuple(part.strip() for part in text.split("."))
    import tomllib

    parts: list[str] = []
    node: Any = tomllib.loads(f"{text} = 0")
    while isinstance(node, dict):
        ((part, node),) = node.items()
        parts.append(part)
    return tuple(parts)
