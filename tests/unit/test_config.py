"""The tree of the configuration: its keys, its texts, the batch over ranks, and its decks."""

from __future__ import annotations

import dataclasses
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsync import config, schema
from hpcsync.config import CODECS, Config
from hpcsync.errors import ConfigError
from hpcsync.wording import toml

INPUTS = Path(__file__).resolve().parents[2] / "inputs"
KEYS = list(config.keys())
DECKS = sorted(path.stem for path in INPUTS.glob("*.toml"))


def texts() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30)


def plain_values() -> st.SearchStrategy[object]:
    scalars = (
        st.booleans()
        | st.integers(-(2**63) + 1, 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | texts()
    )
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3),
        max_leaves=8,
    )


def values_of(key: schema.Key) -> st.SearchStrategy[object]:
    """Values that a key takes."""
    rule = key.rule
    if key.kind == "bool":
        return st.booleans()
    if key.name == "checkpoint.every":
        return st.integers(0, 2**63 - 1) | st.sampled_from(["auto", "30s", "10 min", "1.5h"])
    if key.kind == "int":
        low = int(rule.minimum) if rule.minimum is not None else -(2**63) + 1
        return st.integers(low, int(rule.maximum or 2**63 - 1))
    if key.kind == "tuple[int, ...]":
        return st.lists(st.integers(0, 2**63 - 1), max_size=4).map(tuple)
    if key.kind == "Mapping[str, Any]":
        return st.dictionaries(texts(), plain_values(), max_size=4)
    if key.name in ("compress.codec", "compress.allow"):
        names = st.sampled_from([*CODECS, "my.module:Codec"])
        return names if key.kind == "str" else st.lists(names, min_size=1, max_size=4).map(tuple)
    if key.kind == "str":
        return st.sampled_from(rule.choices) if rule.choices else texts().filter(str.strip)
    low = rule.minimum if rule.minimum is not None else rule.above
    high = rule.maximum if rule.maximum is not None else rule.below
    numbers = st.floats(low, high, allow_nan=False, allow_infinity=False).filter(rule.admits)
    return numbers | st.sampled_from(rule.choices) if rule.choices else numbers


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any configuration whose keys do not contradict each other."""
    parts = {}
    for name, kind in schema.sections(Config):
        keys = schema.keys_of(name, kind)
        parts[name] = kind(**{key.field: draw(values_of(key)) for key in keys})
    drawn = Config(**parts)
    heads = draw(st.integers(1, 64))
    accumulate = draw(st.integers(1, 64))
    return dataclasses.replace(
        drawn,
        model=dataclasses.replace(drawn.model, heads=heads, width=heads * draw(st.integers(1, 64))),
        train=dataclasses.replace(
            drawn.train,
            accumulate=accumulate,
            global_batch=accumulate * draw(st.integers(1, 64)),
            device="auto",
        ),
        comm=dataclasses.replace(drawn.comm, reproducible=False, node_transport="auto"),
        compress=dataclasses.replace(drawn.compress, where="all"),
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# The tree


def test_without_a_deck_the_defaults_count() -> None:
    assert config.load(None) == Config()


def test_every_default_is_a_value_that_its_key_takes() -> None:
    for key in KEYS:
        assert key.check(key.default) == key.default, key.name
        assert type(key.check(key.default)) is type(key.default), key.name


def test_every_key_has_a_text_and_can_be_explained() -> None:
    names = [key.name for key in KEYS]
    assert len(set(names)) == len(names)
    for key in KEYS:
        assert re.fullmatch(r"[A-Z].*[.)]", key.help), key.name
        told = config.explain(key.name)
        assert told.startswith(f"{key.name} = ")
        assert key.accepts() in told
        assert key.help.split()[0] in told


def test_explain_tells_a_key_a_section_or_all() -> None:
    assert config.explain("bucket_mb") == config.explain("comm.bucket_mb")
    section = config.explain("comm")
    assert section.startswith("[comm] The exchange of gradients.")
    assert "comm.timeout_s = 300.0" in section
    assert "train.lr" not in section
    assert all(key.name in config.explain() for key in KEYS)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("comm.bucket", "comm.bucket_mb"), ("trian", "train"), ("COMM.OVERLAP", "comm.overlap")],
)
def test_explain_knows_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: no such .* did you mean {meant}\?"):
        config.explain(name)


@pytest.mark.parametrize("name", ["comm.node_transport", "node_transport"])
def test_explain_tells_a_rename(name: str) -> None:
    said, _, text = config.explain(name).partition("\n\n")
    assert said == "comm.node_transport is called comm.transport.node now."
    assert text == config.explain("comm.transport.node")


def test_explain_tells_a_table() -> None:
    keys = [config.explain(f"comm.transport.{level}") for level in ("node", "rail")]
    for name in ("comm.transport", "transport"):
        assert config.explain(name) == "\n\n".join(keys)


def test_explain_of_something_far_off_lists_the_sections() -> None:
    with pytest.raises(ConfigError, match="there are run, train, model"):
        config.explain("quux")


def test_a_configuration_is_frozen_and_has_no_other_attributes() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.lr = 1.0  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(Config().train, "rate", 1.0)


def test_tables_of_two_configurations_are_not_shared() -> None:
    assert Config().model.options is not Config().model.options


def test_to_dict_holds_every_key() -> None:
    table = config.to_dict(Config())
    names = [f"{section}.{leaf}" for section, body in table.items() for leaf in body]
    assert names == [key.name for key in KEYS]


# Round trips


@settings(max_examples=40)  # each draws every key of the tree
@given(configs())
def test_a_dump_loads_to_the_same(tmp_path_factory: pytest.TempPathFactory, one: Config) -> None:
    path = write(tmp_path_factory.mktemp("deck") / "config.toml", config.dump(one))
    again = config.load(path)
    assert again == one
    assert repr(again) == repr(one)  # == would take 1 for 1.0 and for true
    assert pickle.loads(pickle.dumps(one)) == one


@settings(max_examples=40)  # each draws every key of the tree
@given(configs())
def test_overrides_say_the_same_as_a_deck(one: Config) -> None:
    overrides = [
        f"{section}.{leaf}={toml(value)}"
        for section, body in config.to_dict(one).items()
        for leaf, value in body.items()
    ]
    assert config.load(None, overrides) == one


@pytest.mark.parametrize(
    ("typed", "ranks"), [("0,8", (0, 8)), ("[0, 8]", (0, 8)), ("3", (3,)), ("[]", ())]
)
def test_a_list_of_numbers_as_typed(typed: str, ranks: tuple[int, ...]) -> None:
    assert config.load(None, [f"metrics.http_ranks={typed}"]).metrics.http_ranks == ranks


def test_a_dump_tells_what_each_key_means() -> None:
    text = config.dump(Config())
    assert "# Optimizer steps of the whole run.\nsteps = 200\n" in text
    assert max(map(len, text.splitlines())) <= 100


# The batch over ranks


@given(ranks=st.integers(1, 2000), accumulate=st.integers(1, 50), micro=st.integers(1, 50))
def test_micro_batches_of_all_ranks_make_the_batch(ranks: int, accumulate: int, micro: int) -> None:
    batch = ranks * accumulate * micro
    one = config.load(None, [f"train.global_batch={batch}", f"train.accumulate={accumulate}"])
    config.check_ranks(one, ranks)
    assert config.micro_batch(one, ranks) == micro


@given(
    ranks=st.integers(1, 600), accumulate=st.integers(1, 20), per_micro_batch=st.integers(1, 600)
)
def test_what_the_message_offers_works(ranks: int, accumulate: int, per_micro_batch: int) -> None:
    batch = accumulate * per_micro_batch
    one = config.load(None, [f"train.global_batch={batch}", f"train.accumulate={accumulate}"])
    try:
        config.check_ranks(one, ranks)
    except ConfigError as error:
        (text,) = error.problems
    else:
        assert batch % (ranks * accumulate) == 0
        return
    assert "\n" not in text
    offered = re.search(r"use train\.global_batch=(\d+)(?: or (\d+))?", text)
    assert offered
    for other in filter(None, offered.groups()):
        train = dataclasses.replace(one.train, global_batch=int(other))
        config.check_ranks(dataclasses.replace(one, train=train), ranks)
    if "train.accumulate=1" in text:
        train = dataclasses.replace(one.train, accumulate=1)
        config.check_ranks(dataclasses.replace(one, train=train), ranks)
    if match := re.search(r"run on (\d+) rank", text):
        config.check_ranks(one, int(match[1]))


def test_a_batch_that_does_not_divide_is_explained_in_words() -> None:
    with pytest.raises(ConfigError) as caught:
        config.check_ranks(Config(), 3)
    assert str(caught.value) == (
        "train.global_batch: 16 samples a step do not divide over 3 ranks: 5 each and 1 left "
        "over; a step takes ranks x accumulate x micro-batch samples: use "
        "train.global_batch=15 or 18, or run on 2 ranks"
    )


def test_a_batch_smaller_than_the_job_is_explained_in_words() -> None:
    one = config.load(None, ["train.accumulate=2"])
    with pytest.raises(ConfigError) as caught:
        config.micro_batch(one, 16)
    assert str(caught.value) == (
        "train.global_batch: 16 samples a step are too few for 16 ranks x 2 micro-batches "
        "(train.accumulate), one sample each; a step takes ranks x accumulate x micro-batch "
        "samples: use train.global_batch=32, or train.accumulate=1, or run on 8 ranks"
    )


@pytest.mark.parametrize("ranks", [0, -1])
def test_no_ranks_are_no_job(ranks: int) -> None:
    with pytest.raises(ConfigError, match="ranks: must be at least 1"):
        config.check_ranks(Config(), ranks)


# The decks


def hint(deck: str, name: str) -> int:
    """The ranks or nodes that a deck in inputs/ says it is meant for: ``# ranks: 64``."""
    text = (INPUTS / f"{deck}.toml").read_text()
    found = re.search(rf"^# {name}: (\d+)$", text, re.MULTILINE)
    assert found or name == "nodes", f"inputs/{deck}.toml: no line '# {name}: N'"
    return int(found[1]) if found else 1


def test_the_decks_are_there() -> None:
    assert {"default", "laptop", "cpu_cluster", "gpu_cluster", "digits"} <= set(DECKS)


@pytest.mark.parametrize("deck", DECKS)
def test_a_deck_loads_and_fits_its_ranks(deck: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    one = config.load(deck)
    assert one == config.load(INPUTS / f"{deck}.toml")
    config.check_ranks(one, hint(deck, "ranks"))
    assert f"hpcsync.train {deck}" in (INPUTS / f"{deck}.toml").read_text()


@pytest.mark.parametrize("deck", DECKS)
def test_a_deck_runs_dry_at_its_ranks(deck: str) -> None:
    if config.load(deck).data.name == "digits":
        pytest.importorskip("sklearn", reason="pip install hpcsync[digits]")
    ranks, nodes = hint(deck, "ranks"), hint(deck, "nodes")
    command = [sys.executable, "-m", "hpcsync.train", deck, "--dry-run"]
    done = subprocess.run(
        [*command, "--ranks", str(ranks), "--nodes", str(nodes)],
        cwd=INPUTS.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rf"\b{ranks} ranks\b", done.stdout), done.stdout
    assert not done.stderr


def test_the_default_deck_is_the_defaults_with_every_text() -> None:
    text = (INPUTS / "default.toml").read_text()
    body = text[text.index("# The run: ") :]
    assert body == config.dump(Config()), "replace what follows its head by dump(Config())"


def test_the_gpu_deck_computes_in_bf16() -> None:
    assert config.load("gpu_cluster").train.precision == "bf16"


@pytest.mark.parametrize(
    "text",
    [
        '[comm.transport]\nnode = "mpi_host"\n',
        '[comm]\ntransport.node = "mpi_host"\n',
        'comm.transport = { node = "mpi_host" }\n',
    ],
)
def test_a_section_may_hold_a_table_of_keys(tmp_path: Path, text: str) -> None:
    deck = write(tmp_path / "deck.toml", text)
    assert config.load(deck).comm.node_transport == "mpi_host"
    assert config.load(deck, ["comm.transport.node=auto"]).comm.node_transport == "auto"


def test_a_text_of_earlier_has_keys_by_their_old_names() -> None:
    assert config.loads('comm.node_transport = "mpi_host"\n', "x").comm.node_transport == "mpi_host"


def test_a_deck_may_be_a_text() -> None:
    """As a checkpoint holds it: it extends nothing, and faults name where it stood."""
    made = config.load(None, ["train.steps=7", "model.name=mlp"])
    assert config.loads(config.dump(made), "manifest") == made
    assert config.loads(config.dump(made), "manifest", ["train.steps=8"]).train.steps == 8
    with pytest.raises(ConfigError, match=r"manifest:1: extends"):
        config.loads('extends = "default.toml"\n', "manifest")
