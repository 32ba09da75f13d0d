"""How values and names are told: in messages to the user, and as TOML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Control characters, and halves of characters that UTF-8 cannot hold.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def suggest(word: str, candidates: Iterable[str]) -> str:
    """``; did you mean X?`` with the candidate nearest to a misspelt word, or nothing."""
    near = nearest(word, candidates)
    return f"; did you mean {near}?" if near else ""


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """The candidate nearest to a word, whatever their case; empty if none is near."""
    import difflib  # late: only a mistake needs it

    folded = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower()[:80], folded, 1, cutoff)
    return folded[found[0]] if found else ""


def describe(value: object) -> str:
    """A value in a message: short, and with its type where that may be what is wrong."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        short = value if len(value) <= 40 else value[:37] + "..."
        return f"the text {ascii(short) if UNPRINTABLE.search(short) else repr(short)}"
    if isinstance(value, int):
        return str(value) if abs(value) <= 10**20 else "a number of more than 20 digits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return "a date or time"


def toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, Mapping):
        items = ", ".join(f"{toml_key(name)} = {toml(item)}" for name, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value)


def dotted(path: Iterable[str]) -> str:
    """The path of a key as it is written: ``train.lr``."""
    return ".".join(map(toml_key, path))


def toml_key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _quote(name)


def _quote(text: str) -> str:
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", plain) + '"'


def ranges(numbers: Sequence[int]) -> str:
    """``0-3, 8``: ascending numbers as runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
