"""Keys of a configuration: what each accepts, and how it is told, checked and written.

A section is a frozen dataclass whose fields are made by ``key``; a tree is a dataclass of
sections. Nothing here knows which sections there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple

from .errors import ConfigError
from .wording import UNPRINTABLE, describe, nearest, suggest, toml

# What a deck may hold under a field of each annotation.
KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "float | str": "a number",
    "int | str": "a whole number",
    "tuple[str, ...]": "a list of texts",
    "tuple[int, ...]": "a list of whole numbers",
    "Mapping[str, Any]": "a table",
}
INT_MAX = 2**63 - 1
# What a word stands for that is nearer to another choice.
_MEANT = {"gpu": "cuda"}
DEPTH_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a key means and which values it takes, beyond its type.

    Attributes:
        name: in its section, with dots, if not that of its field.
        formerly: the name that it had there in earlier versions.
    """

    text: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    required: bool = False
    name: str = ""
    formerly: str = ""

    def bounds(self) -> str:
        """The range in words: ``of at least 0 and below 1``; empty if there is none."""
        words = [
            f"{word} {bound:.15g}"
            for word, bound in (
                ("of at least", self.minimum),
                ("above", self.above),
                ("up to", self.maximum),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " and ".join(words)

    def admits(self, number: float) -> bool:
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
            and (self.below is None or number < self.below)
        )


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its dotted name, the name and annotation of its dataclass field, its default and
    its rule."""

    name: str
    field: str
    kind: str
    default: Any
    rule: Rule

    @property
    def leaf(self) -> str:
        """The name within its section."""
        return self.name.partition(".")[2]

    @property
    def help(self) -> str:
        return self.rule.text

    def accepts(self) -> str:
        """The values it takes, in words: ``a number above 0``, ``one of fp32, bf16``."""
        number = f"{KINDS[self.kind]} {self.rule.bounds()}".rstrip()
        choices = ", ".join(self.rule.choices)
        if self.kind == "str" and choices:
            return f"one of {choices}" if len(self.rule.choices) > 1 else choices
        return f"{choices} or {number}" if choices else number

    def check(self, value: object) -> Any:
        """Return the value in the type of the field; ValueError tells in words what is wrong."""
        if self.kind == "bool" and isinstance(value, bool):
            return value
        if self.kind == "Mapping[str, Any]" and isinstance(value, dict):
            check_plain(value)
            return value
        if self.kind == "tuple[str, ...]" and isinstance(value, str | list | tuple):
            return self._check_list(value)
        if self.kind == "tuple[int, ...]" and not isinstance(value, bool):
            return self._check_numbers(value)
        if "str" in self.kind.split(" | ") and isinstance(value, str):
            return self._check_text(value)
        # A bool is an int to Python, but not to whoever wrote the deck.
        if not isinstance(value, bool):
            if self.kind.startswith("int") and isinstance(value, int):
                return self._check_number(value)
            if self.kind.startswith("float") and isinstance(value, int | float):
                return self._check_number(_as_float(value))
        raise ValueError(f"must be {self.accepts()}, not {describe(value)}")

    def _check_number(self, number: Any) -> Any:
        if isinstance(number, int) and abs(number) > INT_MAX:
            raise ValueError(f"does not fit into 64 bits: {describe(number)}")
        if not math.isfinite(number) or not self.rule.admits(number):
            raise ValueError(f"must be {self.accepts()}, not {describe(number)}")
        return number

    def _check_list(self, value: str | list[Any] | tuple[Any, ...]) -> tuple[str, ...]:
        """A list of texts; on a command line also ``a,b``."""
        items = value.split(",") if isinstance(value, str) else value
        wrong = next((item for item in items if not isinstance(item, str)), None)
        if wrong is not None:
            raise ValueError(f"must be {self.accepts()}, and one of them is {describe(wrong)}")
        texts = tuple(self._check_text(item.strip()) for item in items)
        if self.rule.required and not texts:
            raise ValueError("must not be empty")
        return texts

    def _check_numbers(self, value: object) -> tuple[int, ...]:
        """A list of whole numbers, or one alone; on a command line also ``0,1``."""
        items: Any = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, str):
            texts = [item.strip() for item in value.split(",")]
            items = [int(text) if text.isdecimal() and len(text) < 20 else text for text in texts]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int):
                raise ValueError(f"must be {self.accepts()}, and one of them is {describe(item)}")
        return tuple(self._check_number(item) for item in items)

    def _check_text(self, text: str) -> str:
        if self.rule.choices and text not in self.rule.choices:
            meant = _MEANT.get(text.lower(), "")
            hint = suggest(meant if meant in self.rule.choices else text, self.rule.choices)
            raise ValueError(f"must be {self.accepts()}, not {describe(text)}{hint}")
        if self.rule.required and not text.strip():
            raise ValueError("must not be empty")
        check_plain(text)
        return text


def key(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    required: bool = False,
    name: str = "",
    formerly: str = "",
) -> Any:
    """A field of a section: its default, its text, and the values it takes.

    ``minimum`` and ``maximum`` are allowed values, ``above`` and ``below`` are not;
    ``required`` forbids an empty text. A dict as default makes a table of free keys. ``name``
    and ``formerly`` as in ``Rule``.
    """
    rule = Rule(
        text=text,
        choices=choices,
        minimum=minimum,
        maximum=maximum,
        above=above,
        below=below,
        required=required,
        name=name,
        formerly=formerly,
    )
    metadata = {"rule": rule}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def sections(tree: type[Any]) -> Iterator[tuple[str, type[Any]]]:
    """(name, dataclass) of each section of a tree, in order."""
    for entry in fields(tree):
        kind: Any = entry.default_factory
        yield entry.name, kind


def keys_of(name: str, kind: type[Any]) -> Iterator[Key]:
    """The keys of one section, in order, with dotted names."""
    for entry in fields(kind):
        assert entry.type in KINDS, f"{name}.{entry.name}: no rule for type {entry.type}"
        rule: Rule = entry.metadata["rule"]
        dotted = f"{name}.{rule.name or entry.name.removesuffix('_')}"
        yield Key(dotted, entry.name, str(entry.type), _default(entry), rule)


def _default(entry: Field[Any]) -> Any:
    return entry.default_factory() if callable(entry.default_factory) else entry.default


class Fault(NamedTuple):
    """The path of a key, and in words what is wrong with it."""

    path: tuple[str, ...]
    text: str


def check_table(
    tree: type[Any],
    table: Mapping[str, Any],
    typed: str | None = None,
    *,
    old_names: bool = False,
) -> tuple[dict[str, Any], list[Fault]]:
    """Check a nested table against a tree.

    Args:
        typed: the value as typed on a command line, where 2024 is as good a text as any.
        old_names: take keys by the names that they had in earlier versions.

    Returns:
        Dotted key -> value in the type of its field, for the keys that are right, and what is
        wrong with the others.
    """
    known = {name: {k.name: k for k in keys_of(name, kind)} for name, kind in sections(tree)}
    values: dict[str, Any] = {}
    faults: list[Fault] = []

    def report(path: tuple[str, ...], text: str) -> None:
        faults.append(Fault(path, text))

    for name, body in table.items():
        if name not in known:
            thing = "section" if isinstance(body, dict) else "key"
            hint = suggest_key((name,), known) if thing == "key" else suggest(name, known)
            report((name,), f"no such {thing}" + (hint or f"; there are {', '.join(known)}"))
        elif not isinstance(body, dict):
            report((name,), f"is a section, not a key; write [{name}] and its keys under it")
        else:
            for path, value in _leaves(body, (name,), known[name]):
                found = known[name].get(".".join(path)) or (old_names and _renamed(path, known))
                if not found:
                    report(path, _unknown(path, known))
                    continue
                if typed is not None and found.kind == "str" and not isinstance(value, str):
                    value = typed
                try:
                    values[found.name] = found.check(value)
                except ValueError as error:
                    report(path, str(error))
    return values, faults


def _leaves(
    body: Mapping[str, Any], path: tuple[str, ...], keys: Mapping[str, Key]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The paths of a table's keys, down to where the section has no more tables."""
    for leaf, value in body.items():
        inner = (*path, leaf)
        table = any(each.startswith(f"{'.'.join(inner)}.") for each in keys)
        if table and isinstance(value, dict):
            yield from _leaves(value, inner, keys)
        else:
            yield inner, value


def _renamed(path: tuple[str, ...], known: Mapping[str, Mapping[str, Key]]) -> Key | None:
    """The key that had this name in earlier versions."""
    named = [each for each in known[path[0]].values() if each.rule.formerly == ".".join(path[1:])]
    return named[0] if named else None


def _unknown(path: tuple[str, ...], known: Mapping[str, Mapping[str, Key]]) -> str:
    """What to do about a key that there is not."""
    if now := _renamed(path, known):
        return f"is called {now.name} now; write that"
    tables = [each for each in known[path[0]] if each.startswith(f"{'.'.join(path)}.")]
    if tables:
        return f"is a table; its keys are {', '.join(tables)}"
    return "no such key" + (suggest_key(path, known) or f"; --explain {path[0]} lists them")


def dump(config: Any) -> str:
    """A tree as TOML, with the text of each section and key as a comment."""
    blocks: list[str] = []
    for name, kind in sections(type(config)):
        lines = [f"# {kind.__doc__}", f"[{name}]"]
        for found in keys_of(name, kind):
            choices = f" ({', '.join(found.rule.choices)})" if found.rule.choices else ""
            lines += _wrap(found.help + choices, "# ")
            lines.append(f"{found.leaf} = {toml(getattr(getattr(config, name), found.field))}")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def explain(tree: type[Any], name: str) -> str:
    """The text of a key, of a section's keys, or of all; ConfigError if there is no such."""
    blocks: list[str] = []
    names: list[str] = []
    for part, kind in sections(tree):
        own = list(keys_of(part, kind))
        names += [part, *(found.name for found in own)]
        if name in ("", part):
            blocks.append(f"[{part}] {kind.__doc__}")
        for found in own:
            before = found.rule.formerly
            if before and name in (before, f"{part}.{before}"):
                blocks.append(f"{part}.{before} is called {found.name} now.")
                name = found.name
            tables = [each.rpartition(".")[0] for each in (found.name, found.leaf)]
            if name in ("", part, found.name, found.leaf, *tables):
                head = f"{found.name} = {toml(found.default)}    ({found.accepts()})"
                blocks.append("\n".join([head, *_wrap(found.help, "    ")]))
    if not blocks:
        hint = (
            suggest(name, names) or f"; there are {', '.join(part for part, _ in sections(tree))}"
        )
        raise ConfigError(f"{name}: no such key or section{hint}")
    return "\n\n".join(blocks)


def _wrap(text: str, indent: str) -> list[str]:
    import textwrap  # late: only dump and explain need it

    return textwrap.wrap(
        text, 96, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def suggest_key(path: tuple[str, ...], known: Mapping[str, Mapping[str, Key]]) -> str:
    """A did-you-mean for a key that its section lacks: from there, or from another section."""
    leaf = ".".join(path[1:]) or path[0]
    everywhere = {name.partition(".")[2]: name for group in known.values() for name in group}
    found = everywhere.get(leaf, "")
    if not found and len(path) > 1:
        near = nearest(leaf, [name.partition(".")[2] for name in known[path[0]]])
        found = f"{path[0]}.{near}" if near else ""
    if not found:
        found = everywhere.get(nearest(leaf, everywhere, 0.75), "")
    return f"; did you mean {found}?" if found else ""


def check_plain(value: object, depth: int = 0) -> None:
    """ValueError unless a value is of texts, finite numbers, booleans, lists and tables."""
    if depth > DEPTH_MAX:
        raise ValueError(f"is nested deeper than {DEPTH_MAX} levels")
    if isinstance(value, dict):
        for name, item in value.items():
            check_plain(name, depth + 1)
            check_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, depth + 1)
    elif isinstance(value, str):
        if UNPRINTABLE.search(value):
            raise ValueError(f"holds a control character or invalid text: {describe(value)}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be finite, not {value}")
    elif isinstance(value, int) and abs(value) > INT_MAX:
        raise ValueError(f"does not fit into 64 bits: {describe(value)}")
    elif not isinstance(value, bool | int | float):
        raise ValueError(f"cannot hold {describe(value)}")


def _as_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf
