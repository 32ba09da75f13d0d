"""The command line of training, the run folder, and what the banner is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsync import banner, run_folder, train, wording
from hpcsync import config as configs
from hpcsync.arguments import Arguments, parse
from hpcsync.config import Config
from hpcsync.errors import ConfigError, UserError
from hpcsync.observers import Observer, Observers
from hpcsync.topology import Topology


def test_words_are_a_deck_and_overrides() -> None:
    found = parse(["laptop", "train.lr=0.1", "--out", "here", "run.name=x"])
    assert found.deck == "laptop"
    assert found.overrides == ("train.lr=0.1", "run.name=x")
    assert found.out == "here"
    assert not found.dry_run


def test_a_file_with_an_equals_sign_is_a_deck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1.toml").touch()
    assert parse(["lr=1.toml"]).deck == "lr=1.toml"


def test_explain_may_stand_alone() -> None:
    assert parse(["--explain"]).explain == ""
    assert parse(["--explain", "comm"]).explain == "comm"
    assert parse([]).explain is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b"], r"two decks \(a, b\)"),
        (["--ranks", "4"], "belongs to --dry-run"),
        (["--dry-run", "--ranks", "0"], "at least 1"),
        (["--dry-run", "--nodes", "-3"], "at least 1"),
        (["--dry-run", "--ranks", "many"], "invalid int"),
        (["--dryrun"], "--dryrun"),
        (["--ou", "x"], "--ou"),
        (["--out"], "expected one argument"),
    ],
)
def test_faults_of_the_command_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse(words)
    assert "\n" not in str(caught.value)


def test_explain_prints_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.command(["--explain", "comm.bucket_mb"]) == 0
    assert "bucket" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"did you mean comm\.bucket_mb"):
        train.command(["--explain", "comm.bucket_mbs"])


def arguments(**changes: str) -> Arguments:
    given = {"deck": None, "out": None, **changes}
    return Arguments(
        overrides=(),
        explain=None,
        dry_run=False,
        ranks=0,
        nodes=0,
        **given,  # type: ignore[arg-type]
    )


def config(folder: Path, name: str = "") -> Config:
    return configs.load(None, [f"run.dir={folder}/deep/er", f"run.name={name}"])


def test_a_named_folder_is_never_used_twice(tmp_path: Path) -> None:
    made = [run_folder.make(config(tmp_path, "mine"), arguments()) for _ in range(3)]
    assert [path.name for path in made] == ["mine", "mine-2", "mine-3"]
    assert configs.load(made[0] / "config.toml") == config(tmp_path, "mine")


def test_a_folder_without_a_name_is_called_by_deck_and_time(tmp_path: Path) -> None:
    made = run_folder.make(config(tmp_path), arguments(deck="inputs/laptop.toml"))
    assert made.name.startswith("laptop-20")
    assert run_folder.make(config(tmp_path), arguments()).name.startswith("default-20")


def test_out_is_the_folder_and_must_be_empty(tmp_path: Path) -> None:
    out = str(tmp_path / "new" / "run")
    assert run_folder.make(config(tmp_path), arguments(out=out)) == Path(out)
    with pytest.raises(UserError, match="not empty"):
        run_folder.make(config(tmp_path), arguments(out=out))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("a file")
    with pytest.raises(UserError, match=r"run\.dir: cannot make"):
        run_folder.make(config(tmp_path, "mine"), arguments())
    with pytest.raises(UserError, match="--out: cannot make"):
        run_folder.make(config(tmp_path), arguments(out=str(tmp_path / "deep" / "x")))


def test_the_banner_is_one_screen() -> None:
    topology = Topology.group([f"n{rank // 8}" for rank in range(512)])
    machine = banner.Machine(
        mpi=("Open MPI v5.0.11", "/opt/lib/libmpi.so.40"),
        threads="THREAD_MULTIPLE",
        devices="cpu, 4 threads a rank",
        transports={"node": "shared_memory", "rail": "mpi_host"},
        buckets="21 buckets",
        algorithm="hierarchical",
    )
    rows = [
        *banner.machine_rows(topology, machine, Config()),
        banner.batch_row(configs.load(None, ["train.global_batch=2048"]), 512, 128, "byte"),
        banner.training_row(configs.load(None, ["train.compile=true", "train.precision=bf16"])),
    ]
    text = banner.render(rows)
    assert len(text.splitlines()) < 24
    for part in (
        "512 ranks on 64 nodes (64 x 8)",
        "n0 (0-7), n1 (8-15), n2 (16-23), ... 60 more ..., n63 (504-511)",
        "Open MPI v5.0.11, THREAD_MULTIPLE",
        "/opt/lib/libmpi.so.40",
        "node by shared_memory, rail by mpi_host",
        "hierarchical, during the backward pass",
        "2,048 samples a step = 512 ranks x 1 micro-batch x 4 samples; 262,144 bytes",
        "200 steps, AdamW, lr 0.001, bf16, torch.compile",
    ):
        assert part in text


def test_words_for_numbers() -> None:
    assert wording.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert wording.ranges([]) == ""
    assert [banner.count(n, "micro-batch") for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]
    assert [banner.size(n) for n in (0, 1023, 1536, 25 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "25.0 MiB",
        "3072.0 GiB",
    ]
    assert [banner.parameters(n) for n in (12, 74_208, 1_853_184, 175 * 10**9)] == [
        "12",
        "74,208",
        "1.85 million",
        "175 billion",
    ]


def test_a_full_disk_does_not_hide_why_a_run_failed(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(Observer):
        def ended(self, status: str, detail: str) -> None:
            raise OSError(28, "No space left on device")

    train._ended(Observers([Full()]), "failed", "the reason")
    told = capsys.readouterr().err
    assert told.startswith("hpcsync: WARNING: the run's full is not complete: No space left")
    assert told.count("\n") == 1


def test_only_rank_0_fails_where_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher would end rank 0 for another's status, perhaps before it has told why."""
    words = ["--explain", "no.such.key"]
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert train.command(words) == 0
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(UserError, match=r"no\.such\.key"):
        train.command(words)
