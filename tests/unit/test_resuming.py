"""Which run and checkpoint ``--resume`` means, and how decks may differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcsync import config as configs
from hpcsync import resuming, run_folder
from hpcsync.arguments import parse
from hpcsync.checkpoint import changes
from hpcsync.checkpoint import folder as folders
from hpcsync.checkpoint.layout import datasets, share
from hpcsync.checkpoint.manifest import Document
from hpcsync.checkpoint.snapshot import HostBuffer
from hpcsync.checkpoint.state import flatten, metas
from hpcsync.checkpoint.writer import PartWriter, publish
from hpcsync.config import Config, MetricsConfig
from hpcsync.errors import CheckpointError, ConfigError, UserError
from hpcsync.rules import learning_rate


def load(*words: str) -> Config:
    return configs.load(None, words)


def checkpoint(run: Path, step: int, config: Config) -> Path:
    """A small checkpoint of a run."""
    import torch

    place = run / folders.FOLDER
    fresh, final = folders.aside(place, step), place / folders.step_name(step)
    fresh.mkdir(parents=True)
    if not (run / "config.toml").exists():
        (run / "config.toml").write_text(configs.dump(config))
    flat = flatten({"w": torch.arange(4.0)})
    found = metas(flat.tensors)
    (pieces,) = share(found, 1)
    filled = HostBuffer().fill(flat.tensors, pieces)
    part = PartWriter(folders.data_file(0)).write(fresh, datasets(found, pieces), filled)
    document = Document(
        step=step,
        tokens=0,
        created="now",
        run_id="x",
        nodes=((0,),),
        versions={},
        config=configs.dump(config),
        common=flat.skeleton,
        own=({},),
    )
    publish(fresh, final, document, found, [part])
    return final


def test_what_changes_the_mathematics_needs_leave() -> None:
    before = load("train.lr=0.1")
    now = load("train.eval_every=9", "comm.bucket_mb=3", "compress.ratio=0.5", "run.name=other")
    found = {each.key: each for each in changes.between(before, now)}
    assert {key: each.harmless for key, each in found.items()} == {
        "train.lr": False,
        "train.eval_every": True,
        "comm.bucket_mb": True,
        "compress.ratio": False,
    }
    with pytest.raises(CheckpointError, match=r"add --allow-change train\.lr,compress\.ratio$"):
        changes.refuse(list(found.values()), (), "here")
    with pytest.raises(CheckpointError, match=r"--allow-change compress\.ratio$"):
        changes.refuse(list(found.values()), ("train.lr",), "here")
    changes.refuse(list(found.values()), ("train", "compress.ratio"), "here")


def test_the_last_step_is_part_of_the_learning_rate() -> None:
    """Half a cosine ends there: another one changes all steps, unless the rate is constant."""
    for min_lr, free in ((0.1, False), (1.0, True)):
        decks = [load(f"train.min_lr={min_lr}", f"train.steps={steps}") for steps in (50, 90)]
        rates = [learning_rate(deck.train, 40) for deck in decks]
        assert (rates[0] == rates[1]) == free
        assert [each.harmless for each in changes.between(*decks)] == [free]
    before, now = load("train.steps=50"), load("train.steps=90", "train.min_lr=1")
    assert not any(each.harmless for each in changes.between(before, now))


def test_keys_that_are_none_may_not_change() -> None:
    changes.check_allowed(["train.lr", "model"])
    with pytest.raises(ConfigError, match=r"train\.rl: no such key; did you mean train\.lr"):
        changes.check_allowed(["train.rl"])


def test_every_key_is_judged() -> None:
    """Nothing that a model learns from may change by chance: a new key is refused at first."""
    every = [*configs.keys()]
    free = {key.name for key in every if changes._harmless(key.name)}
    refused = {key.name for key in every} - free
    assert {"run.seed", "train.lr", "train.precision", "model.width", "data.path"} <= refused
    assert {"compress.codec", "train.optimizer", "train.global_batch"} <= refused
    assert {"train.steps", "train.min_lr"} <= refused
    assert {"train.eval_every", "comm.bucket_mb", "checkpoint.every", "trace.every"} <= free


def plan(*words: str) -> tuple[Config, resuming.Plan]:
    return resuming.plan(parse(words))


def test_auto_finds_nothing_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan("--resume", "auto", "--out", str(tmp_path / "run"))
    assert found == resuming.Plan()
    assert "starts anew" in capsys.readouterr().err
    run_folder.make(load(), parse(["--out", str(tmp_path / "run")]))
    _, found = plan("--resume", "auto", "--out", str(tmp_path / "run"))
    assert (found.folder, found.candidates) == (tmp_path / "run", ())


def test_auto_takes_the_named_run_or_the_newest_of_the_deck(tmp_path: Path) -> None:
    names = ("default-20260101-000000", "default-20260101-000000-2", "default-20250101-000000-3")
    for name in (*names, "laptop-20270101-000000", "mine"):
        checkpoint(tmp_path / name, 5, load())
    (tmp_path / "default-20280101-000000").mkdir()  # killed before its first checkpoint
    _, found = plan("--resume", "auto", f"run.dir={tmp_path}")
    assert found.folder == tmp_path / names[1]
    _, found = plan("--resume", "auto", f"run.dir={tmp_path}", "run.name=mine")
    assert found.folder == tmp_path / "mine"


def test_a_run_folder_a_folder_of_checkpoints_or_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = [checkpoint(run, step, load("train.lr=0.5")) for step in (5, 10)]
    for path in (run, run / "checkpoints"):
        config, found = plan("--resume", str(path), "train.steps=7")
        assert (found.folder, found.candidates) == (run, (made[1], made[0]))
        assert (config.train.lr, config.train.steps) == (0.5, 7)
    _, found = plan("--resume", str(made[0]))
    assert (found.folder, found.candidates) == (None, (made[0],))
    _, found = plan("--resume", str(run), "--out", str(tmp_path / "new"))
    assert found.folder is None
    config, _ = plan("laptop", "--resume", str(run))
    assert config == configs.load("laptop")


def test_nothing_to_resume_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        plan("--resume", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        plan("--resume", str(tmp_path))


def test_a_damaged_manifest_is_passed_over(tmp_path: Path) -> None:
    made = [checkpoint(tmp_path, step, load(f"train.warmup={step}")) for step in (5, 10)]
    (made[1] / "manifest.json").write_bytes(b"{")
    config, found = plan("--resume", str(tmp_path))
    assert config.train.warmup == 5
    assert found.candidates == (made[1], made[0])
    (made[0] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000010"):
        plan("--resume", str(tmp_path))


@pytest.mark.parametrize("word", ["model.name=os:system", "data.name=a.b:c", "compress.codec=x:Y"])
def test_a_strangers_checkpoint_chooses_no_code(tmp_path: Path, word: str) -> None:
    checkpoint(tmp_path, 5, load(word))
    with pytest.raises(CheckpointError, match="names code of a module"):
        plan("--resume", str(tmp_path))
    key, _, value = word.partition("=")
    config, _ = plan("--resume", str(tmp_path), word)
    section, leaf = key.split(".")
    assert getattr(getattr(config, section), leaf) == value


def test_a_strangers_checkpoint_chooses_no_files(tmp_path: Path) -> None:
    config = replace(load("run.dir=/far"), metrics=MetricsConfig(textfile="/far/x", http_port=99))
    checkpoint(tmp_path, 5, config)
    found, _ = plan("--resume", str(tmp_path), "metrics.http_port=7")
    assert found.run.dir == "runs"
    assert found.metrics == MetricsConfig(http_port=7)


def test_a_folder_that_is_gone_on_in_keeps_its_old_configurations(tmp_path: Path) -> None:
    first = load("run.seed=1")
    run = run_folder.make(first, parse(["--out", str(tmp_path / "run")]))
    for seed in (1, 2, 2, 3):
        run_folder.reuse(run, load(f"run.seed={seed}"))
    found: dict[str, Any] = {
        path.name: configs.load(path).run.seed for path in sorted(run.iterdir())
    }
    assert found == {"config-1.toml": 1, "config-2.toml": 2, "config.toml": 3}


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "config.toml").mkdir(parents=True)
    (run / "config.toml" / "x").touch()
    with pytest.raises(UserError, match=r"--resume: cannot write to .*run"):
        run_folder.reuse(run / "config.toml" / "x", load())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume", ""], "needs auto, or the path"),
        (["--resume"], "expected one argument"),
        (["--allow-change", "train.lr"], "belongs to --resume"),
    ],
)
def test_faults_of_the_command_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(words)


def test_keys_may_be_listed_or_repeated() -> None:
    words = ["--resume", "auto", "--allow-change", "a.b,c.d", "--allow-change", "e"]
    assert parse(words).allow_change == ("a.b", "c.d", "e")
