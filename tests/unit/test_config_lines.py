"""The scanner gives every key of a valid TOML text the line that it stands on."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.toml_lines import KeyPath, key_lines
from hpcsync.wording import toml, toml_key

TRICKY = '''# head
title = "a # b = c"
[ servers . "alpha.x" ]  # [no.header]
ip = '[1] = "2"'
text = """
[fake]
key = 1 \\""" still
"""
raw = \'\'\'
# = [
it\'s\'\'\'\'
dates = [ 1979-05-27 07:32:00, # ] = [
  { a = "}]" }, [ "\\"]" ], ]
when = 1979-05-27 07:32:00
nested = { x.y = 1, "z w" = { q = [ { no = 1 } ] }, e = {} }
dotted . deep."\\u0061" = 1
[[fruit]]
name = ""
[[fruit]]
name = """"quoted""""
other = 1
[fruit.kind]
red = true'''


def test_lines_of_a_tricky_text() -> None:
    tomllib.loads(TRICKY)
    alpha = ("servers", "alpha.x")
    assert key_lines(TRICKY) == {
        ("title",): 2,
        ("servers",): 3,
        alpha: 3,
        (*alpha, "ip"): 4,
        (*alpha, "text"): 5,
        (*alpha, "raw"): 9,
        (*alpha, "dates"): 12,
        (*alpha, "when"): 14,
        (*alpha, "nested"): 15,
        (*alpha, "nested", "x"): 15,
        (*alpha, "nested", "x", "y"): 15,
        (*alpha, "nested", "z w"): 15,
        (*alpha, "nested", "z w", "q"): 15,
        (*alpha, "nested", "e"): 15,
        (*alpha, "dotted"): 16,
        (*alpha, "dotted", "deep"): 16,
        (*alpha, "dotted", "deep", "a"): 16,
        ("fruit",): 17,
        ("fruit", "name"): 18,
        ("fruit", "other"): 21,
        ("fruit", "kind"): 22,
        ("fruit", "kind", "red"): 23,
    }


@pytest.mark.parametrize("text", ["", "\n\n", "# only", "a=1", "a = ''", "[a]", "a={}\n#"])
def test_lines_of_next_to_nothing(text: str) -> None:
    assert set(key_lines(text)) == set(paths(tomllib.loads(text)))


def paths(table: dict[str, Any], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, value in table.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, name))


names = st.sampled_from(["a", "b-1", "_"]) | st.text("a\"'=.[]# \\", max_size=4)
strings = st.text("ab\"'=.[]{}#, \\", max_size=8)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[KeyPath, int]]:
    """A TOML text in many styles, and the line of each of its keys."""
    lines: list[str] = []
    where: dict[KeyPath, int] = {}

    def filler() -> None:
        lines.extend(draw(st.lists(st.sampled_from(["", "  ", "# a = [1", "\t# '"]), max_size=2)))

    def value(path: KeyPath) -> str:
        kind = draw(st.sampled_from(["number", "text", "long", "raw", "array", "table"]))
        if kind == "long":
            inner = draw(strings).replace("\\", "").replace('"', "'")
            return f'"""\n{inner}\nx = 1 \\""" [y]\n"""'
        if kind == "raw":
            return f"'''\n{draw(strings).replace(chr(39), '')}\n[z]\n'''"
        if kind == "array":
            return f"[ # ]\n {toml(draw(strings))},\n  {{ k = '[' }}, 1e3, \n]"
        if kind == "table":
            inside = draw(st.lists(names, max_size=3, unique=True))
            for name in inside:
                where[(*path, name)] = len(lines) + 1
            pairs = (f"{key(name)} = {toml(draw(strings))}" for name in inside)
            return f"{{{' , '.join(pairs)} }}"
        return toml(draw(strings) if kind == "text" else draw(st.integers(0, 99)))

    def key(name: str) -> str:
        quoted = name and "'" not in name and draw(st.booleans())
        return f"'{name}'" if quoted else toml_key(name)

    def pairs(table: KeyPath) -> None:
        for name in draw(st.lists(names.map(lambda name: f"k{name}"), max_size=4, unique=True)):
            filler()
            path = (*table, name)
            where[path] = len(lines) + 1
            text = f"{draw(st.sampled_from(['', '  ']))}{key(name)} = {value(path)}"
            lines.extend(f"{text}{draw(st.sampled_from(['', ' # = [']))}".split("\n"))

    pairs(())
    for name in draw(st.lists(names.map(lambda name: f"t{name}"), max_size=3, unique=True)):
        filler()
        where[(name,)] = len(lines) + 1
        lines.append(f"[ {key(name)} ]  # x")
        pairs((name,))
    return "\n".join(lines), where


@given(documents())
def test_every_key_has_its_line(document: tuple[str, dict[KeyPath, int]]) -> None:
    text, where = document
    assert set(where) == set(paths(tomllib.loads(text)))
    assert key_lines(text) == where
