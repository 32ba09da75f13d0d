"""Overrides that are wrong, and text of any kind: it loads or is told off in one line."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpcsync import config
from hpcsync.errors import ConfigError
from tests.decks import problems

KEYS = list(config.keys())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr", "'train.lr': is no override; write section.key=value, with no space around"),
        ("", "'': is no override; write section.key=value"),
        ("=3", "'=3': has no key; write section.key=value"),
        ("train.=3", "'train.=3': has no key; write section.key=value"),
        ("train.stepz=3", "train.stepz: no such key; did you mean train.steps?"),
        ("lr=3", "lr: no such key; did you mean train.lr?"),
        ("train.lr.x=3", "train.lr: must be a number of at least 0, not a table"),
        ("train.lr=", "train.lr: must be a number of at least 0, not the text ''"),
        ("train.lr=[1,", "train.lr: must be a number of at least 0, not the text '[1,'"),
        ("train.lr=1\nx=2", "train.lr: must be a number of at least 0, not the text '1\\nx=2'"),
        ("comm.overlap=True", "comm.overlap: must be true or false, not the text 'True'"),
        ("train=3", "train: is a section, not a key; write [train] and its keys under it"),
        ("extends=other.toml", "extends: belongs in a deck; name the deck instead"),
        ("data.path=\udcff", "data.path: holds a control character or invalid text: the text"),
    ],
)
def test_an_override_that_is_none(override: str, expected: str) -> None:
    (problem,) = problems(None, [override])
    assert problem.startswith(f"command line: {expected}")


def test_an_override_that_is_given_twice() -> None:
    assert problems(None, ["train.lr=1", "comm.overlap=false", "train.lr=2"]) == [
        "command line: train.lr: is given twice, 'train.lr=1' and 'train.lr=2'; keep one"
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("runs/a b", "runs/a b"),
        ("a=b#c", "a=b#c"),
        ('"quoted"', "quoted"),
        ("2024", "2024"),
        ("1e3", "1e3"),
        ("true", "true"),
        ("2024-01-01", "2024-01-01"),
        (" x ", "x"),
        ("", ""),
    ],
)
def test_a_text_needs_no_quotes_on_the_command_line(value: str, expected: str) -> None:
    assert config.load(None, [f"data.path={value}"]).data.path == expected


LINES = [
    "[train]",
    "[comm]",
    "[model.options]",
    "[[data]]",
    "lr = 1e-3",
    "lr = nan",
    "steps = 3",
    "options = { a = 1, 'b c' = [1, { d = 2 }] }",
    "path = '''",
    "'''",
    'name = """x""""',
    "extends = 'x.toml'",
    "train.lr = 3",
    "a.b.c = [ # x",
    "]",
    "# comment",
]


@given(
    text=st.lists(st.sampled_from(LINES) | st.text(string.printable, max_size=12), max_size=12).map(
        "\n".join
    )
)
@example(text='[train]\nlr = """\n')
@example(text="a = 1\n[a]\n")
def test_any_text_loads_or_is_told_off(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("deck") / "d.toml"
    path.write_text(text, encoding="utf-8")
    loads_or_tells(path, [])


@given(data=st.binary(max_size=40))
def test_any_bytes_load_or_are_told_off(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("deck") / "d.toml"
    path.write_bytes(data)
    loads_or_tells(path, [])


@given(
    overrides=st.lists(
        st.text(max_size=12)
        | st.builds(
            "{}={}".format,
            st.sampled_from([key.name for key in KEYS]),
            st.text(max_size=12) | st.sampled_from(["1", "-1", "0.5", "true", "[]", "{a=1}"]),
        ),
        max_size=5,
    )
)
def test_any_overrides_load_or_are_told_off(overrides: list[str]) -> None:
    loads_or_tells(None, overrides)


def loads_or_tells(path: Path | None, overrides: list[str]) -> None:
    try:
        assert config.dump(config.load(path, overrides))
    except ConfigError as error:
        told = error.problems
    else:
        return
    assert told
    for problem in told:
        assert "\n" not in problem
        assert problem.startswith(("deck: ", "command line: ", str(path)))
