"""Decks that cannot be read, are not TOML, or build on others: each fault is one line that says
where, what and the way out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcsync import config
from tests.decks import fault, problems


def test_a_missing_deck(here: Path) -> None:
    (here / "mine.toml").touch()
    assert problems("mine.tml") == ["deck: mine.tml: no such file; did you mean mine.toml?"]
    assert problems("laptpo") == ["deck: laptpo: no such file; did you mean laptop?"]
    assert problems("sub/x.toml") == ["deck: sub/x.toml: no such file"]
    (problem,) = problems("quux")
    assert problem.startswith("deck: quux: no such file; decks of hpcsync: cpu_cluster, default")


def test_a_name_in_the_current_folder_goes_before_inputs(here: Path) -> None:
    (here / "laptop.toml").write_text("[train]\nsteps = 7\n")
    assert config.load("laptop.toml").train.steps == 7
    (here / "digits").mkdir()
    assert config.load("digits").data.name == "digits"


def test_a_folder_for_a_deck(here: Path) -> None:
    (here / "decks").mkdir()
    assert problems("decks") == ["deck: decks: is a folder; name a deck in it"]
    (here / "decks" / "a.toml").touch()
    assert problems("decks") == ["deck: decks: is a folder; name a deck in it: a.toml"]


def test_an_unreadable_deck(here: Path) -> None:
    (here / "secret.toml").touch(mode=0)
    with nobody():
        (problem,) = problems(here / "secret.toml")
    assert "secret.toml: cannot be read (Permission denied); check the path" in problem


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Drop root's right to read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "d.toml/inside", ""])
def test_a_path_that_no_file_can_have(here: Path, name: str) -> None:
    (here / "d.toml").touch()
    (problem,) = problems(name)
    assert problem.startswith("deck: ")


def test_a_deck_that_is_not_text(here: Path) -> None:
    (here / "d.toml").write_bytes(b"[train]\nsteps = 3\n# \xff\n")
    assert problems("d.toml") == ["deck: d.toml: line 3 is not UTF-8 text; save the deck as UTF-8"]


def test_a_file_that_never_ends() -> None:
    assert problems("/dev/zero") == [
        "deck: /dev/zero: is larger than 1 MiB; a deck is a short TOML file"
    ]


@pytest.mark.parametrize("text", ["\ufeff[train]\nsteps = 3\n", "[train]\r\nsteps = 3\r\n"])
def test_what_other_systems_write(here: Path, text: str) -> None:
    (here / "d.toml").write_bytes(text.encode())
    assert config.load("d.toml").train.steps == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[data]\nname = digits\n",
            '2: not valid TOML: invalid value; a text needs quotes: "digits"',
        ),
        (
            "[data]\npath = ~/x # a\n",
            '2: not valid TOML: invalid value; a text needs quotes: "~/x"',
        ),
        (
            "[comm]\n\noverlap = False\n",
            "3: not valid TOML: invalid value; write false in lower case",
        ),
        ("[train\nlr = 1\n", "1: not valid TOML: "),
        ("[train]\nlr\n", "2: not valid TOML: "),
        ("[train]\nlr = \n", "2: not valid TOML: "),
        ("[train]\nlr = 1,\n", "2: not valid TOML: "),
        ('[data]\n\npath = "x\n', "3: not valid TOML: "),
        ("[model]\noptions = { a = [1, 2 }\n", "2: not valid TOML: "),
        ("[train]\nlr = 1\nlr = 2\n", "3: not valid TOML: cannot overwrite a value; the key or "),
        ("[train]\nlr = 1\n[train]\n", "3: not valid TOML: cannot declare "),
        ("[data]\npath = '''x\n\n", "4: not valid TOML: "),
    ],
)
def test_a_syntax_error_has_its_line(here: Path, text: str, expected: str) -> None:
    assert fault(text).startswith(expected)


def test_syntax_errors_do_not_hide_each_other_nor_what_else_is_wrong(here: Path) -> None:
    (here / "d.toml").write_text(
        "[train]\nlr = fast\nstep = 3\nwarmup = ten\n[comm]\noverlap = 1\n"
    )
    assert [problem.split(": ")[0] for problem in problems("d.toml")] == [
        "d.toml:2",
        "d.toml:4",
        "d.toml:3",
        "d.toml:6",
    ]


def test_a_deck_nested_without_end(here: Path) -> None:
    (here / "d.toml").write_text("[model]\noptions = " + "{ a = " * 5000)
    (problem,) = problems("d.toml")
    assert problem.startswith("d.toml: is nested too deeply")
    (here / "d.toml").write_text("[model]\noptions.a = " + "[" * 50 + "]" * 50)
    assert problems("d.toml") == ["d.toml:2: model.options: is nested deeper than 16 levels"]


def test_a_number_longer_than_python_reads(here: Path) -> None:
    (here / "d.toml").write_text("[run]\nseed = " + "9" * 5000)
    (problem,) = problems("d.toml")
    assert problem.startswith("d.toml: not valid TOML: ")


def test_a_deck_has_the_last_word_over_its_base(here: Path) -> None:
    (here / "deep").mkdir()
    (here / "deep" / "base.toml").write_text(
        'extends = "../root.toml"\n[train]\nsteps = 5\n'
        "[model.options]\na = 1\nb = { c = 2, d = 3 }\n"
    )
    (here / "root.toml").write_text("[train]\nsteps = 3\nlr = 0.5\nwarmup = 4\n")
    (here / "d.toml").write_text(
        'extends = "deep/base.toml"\n[train]\nlr = 0.25\n[model.options]\nb.c = 4\n'
    )
    one = config.load("d.toml", ["model.options.e=x", "train.warmup=1"])
    assert (one.train.steps, one.train.lr, one.train.warmup) == (5, 0.25, 1)
    assert one.model.options == {"a": 1, "b": {"c": 4, "d": 3}, "e": "x"}


def test_a_base_that_is_missing_is_told_with_the_line_that_asks_for_it(here: Path) -> None:
    (here / "other.toml").touch()
    (here / "d.toml").write_text('# head\nextends = "othr.toml"\n[train]\nstep = 3\n')
    assert problems("d.toml") == [
        "d.toml:2: extends: othr.toml: no such file; did you mean other.toml?",
        "d.toml:4: train.step: no such key; did you mean train.steps?",
    ]


@pytest.mark.parametrize("value", ["3", '""', "[]", '"a\\u0000b"', "{ a = 1 }"])
def test_extends_that_is_no_path(here: Path, value: str) -> None:
    expected = '1: extends: must be the path of a deck, as in extends = "other.toml"'
    assert fault(f"extends = {value}\n") == expected


def test_extends_in_a_circle(here: Path) -> None:
    (here / "a.toml").write_text('extends = "b.toml"\n')
    (here / "b.toml").write_text('\nextends = "./a.toml"\n')
    assert problems("a.toml") == [
        "b.toml:2: extends: goes in a circle: a.toml -> b.toml -> ./a.toml; remove one of them"
    ]
    (here / "c.toml").write_text('extends = "c.toml"\n')
    (problem,) = problems("c.toml")
    assert "goes in a circle: c.toml -> c.toml" in problem
