"""What users get wrong: each fault is one line that says where, what and the way out."""

from __future__ import annotations

import contextlib
import os
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpcsync import config
from hpcsync.errors import ConfigError

KEYS = list(config.keys())


def problems(deck: str | Path | None, overrides: Sequence[str] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load(deck, overrides)
    assert all("\n" not in problem for problem in caught.value.problems)
    return list(caught.value.problems)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fault(text: str) -> str:
    """The one problem of a deck with this text, without the name of the deck."""
    Path("d.toml").write_text(text, encoding="utf-8")
    (problem,) = problems("d.toml")
    assert problem.startswith("d.toml:")
    return problem.removeprefix("d.toml:")


# Files


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


# Syntax


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


# Keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nstesp = 3\n", "2: train.stesp: no such key; did you mean train.steps?"),
        ("[train]\nSteps = 3\n", "2: train.Steps: no such key; did you mean train.steps?"),
        ("train.stesp = 3\n", "1: train.stesp: no such key; did you mean train.steps?"),
        ('"train" . "st\\u0065sp" = 3\n', "1: train.stesp: no such key; did you mean train.steps?"),
        (
            "train = { lr = 1, stesp = 3 }\n",
            "1: train.stesp: no such key; did you mean train.steps?",
        ),
        ("[train]\noverlap = true\n", "2: train.overlap: no such key; did you mean comm.overlap?"),
        ("[log]\nbuckets_mb = 1\n", "2: log.buckets_mb: no such key; did you mean comm.bucket_mb?"),
        ("[log]\nquux = 1\n", "2: log.quux: no such key; --explain log lists them"),
        ("\n[trian]\nsteps = 3\n", "2: trian: no such section; did you mean train?"),
        ("[quux]\n", "1: quux: no such section; there are run, train, model, data, topology, "),
        ('[log]\n"a\\nb" = 1\n', '2: log."a\\u000ab": no such key; --explain log lists them'),
        ("steps = 3\n", "1: steps: no such key; did you mean train.steps?"),
        ("train = 3\n", "1: train: is a section, not a key; write [train] and its keys under it"),
        ("[[train]]\nlr = 1\n", "1: train: is a section, not a key; write [train] "),
        ("[model]\n[model.heads]\nx = 1\n", "2: model.heads: must be a whole number of at least 1"),
    ],
)
def test_a_key_that_is_not_there(here: Path, text: str, expected: str) -> None:
    assert fault(text).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nsteps = '9'", "2: train.steps: must be a whole number of at least 1, not the "),
        ("[train]\nsteps = 9.0", "2: train.steps: must be a whole number of at least 1, not 9.0"),
        ("[train]\nsteps = true", "2: train.steps: must be a whole number of at least 1, not true"),
        ("[train]\nlr = false", "2: train.lr: must be a number of at least 0, not false"),
        ("[train]\nlr = []", "2: train.lr: must be a number of at least 0, not a list"),
        ("[train]\nlr = 2020-01-01", "2: train.lr: must be a number of at least 0, not a date or"),
        ("[comm]\noverlap = 1", "2: comm.overlap: must be true or false, not 1"),
        ("[data]\npath = 7", "2: data.path: must be a text, not 7"),
        ("[model]\noptions = 7", "2: model.options: must be a table, not 7"),
        ("[model]\noptions.a = nan", "2: model.options: must be finite, not nan"),
        ("[model]\noptions.a = 07:32:00", "2: model.options: cannot hold a date or time"),
        ("[data]\npath = 'a\tb'", "2: data.path: holds a control character or invalid text: the "),
        ("[data]\nname = ' '", "2: data.name: must not be empty"),
        ("[train]\nsteps = 0", "2: train.steps: must be a whole number of at least 1, not 0"),
        ("[train]\nbeta1 = 1", "2: train.beta1: must be a number of at least 0 and below 1, not 1"),
        ("[train]\nlr = inf", "2: train.lr: must be a number of at least 0, not inf"),
        ("[train]\nlr = nan", "2: train.lr: must be a number of at least 0, not nan"),
        ("[train]\nlr = 1" + "0" * 400, "2: train.lr: must be a number of at least 0, not inf"),
        ("[run]\nseed = 9223372036854775808", "2: run.seed: does not fit into 64 bits: 92233720"),
        ("[train]\nloss_scale = 0", "2: train.loss_scale: must be none, dynamic or a number above"),
        ("[train]\nloss_scale = 'dinamic'", "2: train.loss_scale: must be none, dynamic or a numb"),
        (
            "[train]\nprecision = 'bf17'",
            "2: train.precision: must be one of fp32, bf16, not the text 'bf17'; "
            "did you mean bf16?",
        ),
        (
            "[compress]\ncodec = 'int7'",
            "2: compress.codec: unknown codec 'int7'; did you mean int8?",
        ),
        ("[compress]\nallow = 3", "2: compress.allow: must be a list of texts, not 3"),
        (
            "[metrics]\nhttp_ranks = [0, true]",
            "2: metrics.http_ranks: must be a list of whole numbers of at least 0, and one of them "
            "is true",
        ),
        (
            "[metrics]\nhttp_ranks = [-1]",
            "2: metrics.http_ranks: must be a list of whole numbers of at least 0, not -1",
        ),
        (
            "[metrics]\nhttp_ranks = true",
            "2: metrics.http_ranks: must be a list of whole numbers of at least 0, not true",
        ),
    ],
)
def test_a_value_that_a_key_does_not_take(here: Path, text: str, expected: str) -> None:
    assert fault(text).startswith(expected)


def test_numbers_become_the_type_of_the_key(here: Path) -> None:
    (here / "d.toml").write_text("[train]\nlr = 1\nloss_scale = 1024\n")
    train = config.load("d.toml", ["train.eps=1"]).train
    assert [type(value) for value in (train.lr, train.loss_scale, train.eps)] == [float] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[model]\nheads = 7\n",
            "2: model.heads: a width of 192 does not divide into 7 heads; use model.width=189 or "
            "196, or other model.heads",
        ),
        (
            "[train]\naccumulate = 3\n",
            "2: train.accumulate: 16 samples a step do not divide into 3 micro-batches "
            "(train.accumulate) on any number of ranks; use train.global_batch=15 or 18",
        ),
        (
            '[comm]\nreproducible = true\nrail_algorithm = "native"\n',
            "3: comm.rail_algorithm: native leaves the order of additions to MPI, so "
            "comm.reproducible cannot hold; use auto, or comm.reproducible=false",
        ),
    ],
)
def test_keys_that_contradict_each_other(here: Path, text: str, expected: str) -> None:
    assert fault(text) == expected


def test_no_contradiction_is_told_where_a_key_was_misread(here: Path) -> None:
    assert fault("[model]\nwidth = 100\nhaeds = 4\n").startswith("3: model.haeds: no such key")


def test_every_fault_of_every_file_at_once(here: Path) -> None:
    (here / "base.toml").write_text("[data]\npth = 'x'\n")
    (here / "d.toml").write_text(
        "# a comment\nextends = 'base.toml'\n\n[train]\nsteps = 0\nlr = 'a'\n[comm]\nring = 1\n"
        "[train.eps]\n"
    )
    told = problems("d.toml", ["train.lr", "model.heads=six", "model.heads=6"])
    assert [": ".join(problem.split(": ")[:2]) for problem in told] == [
        "command line: 'train.lr'",
        "command line: model.heads",
        "base.toml:2: data.pth",
        "d.toml:5: train.steps",
        "d.toml:6: train.lr",
        "d.toml:8: comm.ring",
        "d.toml:9: train.eps",
        "command line: model.heads",
    ]


# extends


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


# Overrides


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


# Anything at all

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
