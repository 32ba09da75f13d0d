"""Decks: TOML files with a line for every key, ``extends``, and overrides as typed.

Nothing here knows which keys there are; ``schema`` checks them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .toml_lines import KEY, KeyPath, key_lines
from .wording import dotted, nearest, suggest

SIZE_MAX = 1 << 20
SYNTAX_ERRORS_MAX = 20

_STATEMENT = re.compile(rf"[ \t]*{KEY.pattern}[ \t]*=[ \t]*(?P<value>[^\n#]*)")
_BAREWORD = re.compile(r"[A-Za-z_./~][^\"'=,\[\]{}]*")
_WHERE = re.compile(r" \(at (?:line (?P<line>\d+), column \d+|end of document)\)$")


@dataclass(frozen=True, slots=True)
class Source:
    """Where values come from: one deck or one override.

    Attributes:
        label: the file as the user would name it, or ``command line``.
        table: the values, as nested tables.
        lines: path of a key -> its line, from 1.
        typed: the value of an override as typed.
    """

    label: str
    table: dict[str, Any]
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    typed: str | None = None

    def where(self, path: KeyPath) -> str:
        """``file:line`` of a key, or of the nearest table around it that has a line."""
        line = self.line(path)
        return f"{self.label}:{line}" if line else self.label

    def line(self, path: KeyPath) -> int:
        """The line of a key, or of the nearest table around it; 0 if none is known."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines[path] if path else 0


def read_chain(name: str, problems: list[str]) -> list[Source]:
    """Read a deck and those it extends.

    Args:
        name: a path, or the bare name of a deck in inputs/.
        problems: each fault found is appended as one line.

    Returns:
        What could be read, the base first: later sources have the last word.
    """
    chain: list[Source] = []
    seen: list[str] = []
    path, cited = find(name), "deck"
    while True:
        text, fault = _read_text(path)
        if fault:
            problems.append(f"{cited}: {path}: {fault}")
            break
        real = os.path.realpath(path)
        if real in seen:
            names = " -> ".join([*(source.label for source in reversed(chain)), path])
            problems.append(f"{cited}: goes in a circle: {names}; remove one of them")
            break
        seen.append(real)
        source = parse(text, path, problems)
        chain.insert(0, source)
        base = source.table.pop("extends", None)
        if base is None:
            break
        cited = f"{source.where(('extends',))}: extends"
        if not isinstance(base, str) or not base or "\0" in base:
            problems.append(f'{cited}: must be the path of a deck, as in extends = "other.toml"')
            break
        path = os.path.join(os.path.dirname(path), base)
    return chain


def find(name: str) -> str:
    """The path of a deck: as given, or by its bare name in inputs/ of hpcsync."""
    if not os.path.isfile(name) and os.path.basename(name) == name:
        for folder in _inputs():
            for candidate in (name, f"{name}.toml"):
                path = os.path.join(folder, candidate)
                if name and os.path.isfile(path):
                    relative = os.path.relpath(path)
                    return path if relative.startswith(os.pardir) else relative
    return name


def _inputs() -> list[str]:
    """Folders of decks: of the checkout, and where an installed hpcsync keeps them."""
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [
        os.path.join(checkout, "inputs"),
        os.path.join(sys.prefix, "share", "hpcsync", "inputs"),
    ]


def _decks(folder: str) -> list[str]:
    try:
        return sorted(entry for entry in os.listdir(folder or ".") if entry.endswith(".toml"))
    except (OSError, ValueError):
        return []


def _read_text(path: str) -> tuple[str, str]:
    """(text, "") of a deck, or ("", what is wrong with the file)."""
    try:
        with open(path, "rb") as file:
            data = file.read(SIZE_MAX + 1)
    except FileNotFoundError:
        return "", "no such file" + _suggest_deck(path)
    except IsADirectoryError:
        decks = ", ".join(_decks(path)[:8])
        return "", f"is a folder; name a deck in it{': ' + decks if decks else ''}"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return "", f"cannot be read ({reason}); check the path and its permissions"
    if len(data) > SIZE_MAX:
        return "", f"is larger than {SIZE_MAX >> 20} MiB; a deck is a short TOML file"
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n"), ""
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return "", f"line {line} is not UTF-8 text; save the deck as UTF-8"


def _suggest_deck(path: str) -> str:
    folder, name = os.path.split(path)
    near = nearest(name, _decks(folder))
    if near:
        return f"; did you mean {os.path.join(folder, near)}?"
    names = [deck.removesuffix(".toml") for inputs in _inputs() for deck in _decks(inputs)]
    known = f"; decks of hpcsync: {', '.join(dict.fromkeys(names))}" if names else ""
    return (suggest(name.removesuffix(".toml"), names) or known) if not folder else ""


def parse(text: str, label: str, problems: list[str]) -> Source:
    """Parse a deck's text; each line that is not TOML is reported and left out.

    A fault whose end is not known (an open string or bracket, a broken section header) ends the
    search, and then nothing of the deck is used: what follows would only be blamed wrongly.
    """
    import tomllib  # late: a run without a deck needs it not

    lines = text.split("\n")
    for _ in range(SYNTAX_ERRORS_MAX):
        try:
            table = tomllib.loads("\n".join(lines))
            return Source(label, table, key_lines("\n".join(lines)))
        except RecursionError:
            problems.append(f"{label}: is nested too deeply")
            break
        # Besides its own error tomllib lets some of int() and of date() through.
        except ValueError as error:
            match = _WHERE.search(str(error))
            reason = _WHERE.sub("", str(error))
            number = int(match["line"]) if match and match["line"] else len(lines)
            number = min(number, len(lines))
            where = f"{label}:{number}" if match else label
            statement = _STATEMENT.match(lines[number - 1])
            problems.append(f"{where}: not valid TOML: {_explain(reason, statement)}")
            if not match or not statement or reason.startswith(("Unclosed", "Unterminated")):
                break
            lines[number - 1] = ""
    return Source(label, {})


def _explain(reason: str, statement: re.Match[str] | None) -> str:
    """tomllib's reason, and the fix where the line shows which mistake it is."""
    value = statement["value"].strip() if statement else ""
    reason = reason[:1].lower() + reason[1:]
    if "overwrite" in reason or "declare" in reason or "mutate" in reason:
        return f"{reason}; the key or section stands twice: keep one"
    if value.lower() in ("true", "false"):
        return f"{reason}; write {value.lower()} in lower case"
    if _BAREWORD.fullmatch(value) and reason == "invalid value":
        return f'{reason}; a text needs quotes: "{value}"'
    return reason


def read_overrides(overrides: Sequence[str], problems: list[str]) -> list[Source]:
    """Parse ``section.key=value`` arguments; a value that is not TOML is a text."""
    sources: list[Source] = []
    given: dict[KeyPath, str] = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        path = tuple(part.strip() for part in name.split("."))
        if not equals:
            hint = "write section.key=value, with no space around the ="
            problems.append(f"command line: {override!r}: is no override; {hint}")
        elif not all(path):
            problems.append(f"command line: {override!r}: has no key; write section.key=value")
        elif path == ("extends",):
            problems.append("command line: extends: belongs in a deck; name the deck instead")
        elif path in given:
            twice = f"{given[path]!r} and {override!r}"
            problems.append(f"command line: {dotted(path)}: is given twice, {twice}; keep one")
        else:
            given[path] = override
            table: Any = parse_value(value)
            for part in reversed(path):
                table = {part: table}
            sources.append(Source("command line", table, typed=value.strip()))
    return sources


def parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none: ``1e-3``, ``[1, 2]``, ``bf16``."""
    import tomllib

    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text.strip()
    return table["value"] if len(table) == 1 and "\n" not in text else text
