"""Whole jobs with a codec: what cannot be coded is told in one line, NaN is skipped and counted,
and nothing is left behind by a rank that dies in a coded step."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests import launcher, refused
from tests.jobs.test_bad_input import Train, assert_told, start, tiny, write_model

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(200)]

NODES = ("topology.ranks_per_node=1", "compress.warmup=1", "compress.min_elements=0")


@pytest.fixture
def train(tmp_path: Path) -> Train:
    def run(*arguments: str, prefix: tuple[str, ...] = (), ranks: int = 2) -> object:
        return start(tmp_path, *arguments, prefix=prefix, ranks=ranks).wait(90)

    return run  # type: ignore[return-value]


# Words, and what is said of them.
REFUSED = {
    "compress.codec=int7": ("unknown codec 'int7'; did you mean int8?",),
    "compress.allow=none,int7": ("compress.allow: unknown codec 'int7'",),
    "compress.ratoi=0.1": ("did you mean compress.ratio?",),
    "compress.ratio=0": ("compress.ratio: must be a number above 0 and up to 1",),
    "compress.ratio=1.5": ("compress.ratio: must be a number above 0 and up to 1",),
    "compress.rank=0": ("compress.rank: must be a whole number of at least 1",),
    "compress.where=node": ("compress.where: must be one of rail, all",),
    "compress.codec=powersgd compress.rank=999": ("compress.rank = 999", "or less"),
    "compress.codec=int8 comm.reproducible=true": ("comm.reproducible",),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two ranks tell of each, in one job."""
    if reason := launcher.missing():
        pytest.skip(reason)
    cases = {words: (*words.split(), *NODES, *tiny(words.split())) for words in REFUSED}
    return refused.told(tmp_path_factory.mktemp("refused"), cases)


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_coded_is_told(refusals: dict[str, str], words: str) -> None:
    for part in REFUSED[words]:
        assert part in refusals[words], f"{part!r} is not in the message\n{refusals[words]}"


def test_a_wrong_key_is_told_once(train: Train) -> None:
    outcome = train(*NODES, "compress.codec=int7")
    assert_told(outcome, "unknown codec 'int7'; did you mean int8?")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("codec", ["int8", "topk", "auto"])
def test_gradients_of_nan_on_one_rank_are_skipped_and_counted(
    train: Train, tmp_path: Path, codec: str
) -> None:
    """A gradient of NaN behind a loss that is none."""
    forward = (
        "self.calls = getattr(self, 'calls', 0) + 1\n"
        "        if RANK == 1 and self.calls == 3 and torch.is_grad_enabled():\n"
        "            loss = loss + 0 * (self.table.weight.sum() - self.table.weight.sum()).sqrt()"
    )
    name = write_model(tmp_path, forward=forward)
    outcome = train(*NODES, name, f"compress.codec={codec}", "train.steps=6", "train.eval_every=0")
    assert outcome.status == 0, outcome.describe()
    outcome.assert_clean()
    found = rows(tmp_path)
    assert [row["skipped"] for row in found] == ["0", "0", "1", "0", "0", "0"]
    assert [row["codec"] for row in found][:2] == ["none", codec if codec != "auto" else "none"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped"] == 1
    assert summary["codec"] == (codec if codec != "auto" else "none")


def test_a_rank_killed_in_a_coded_step_ends_the_job(train: Train, tmp_path: Path) -> None:
    forward = (
        "self.calls = getattr(self, 'calls', 0) + 1\n"
        "        if RANK == 1 and self.calls == 4: os.kill(os.getpid(), signal.SIGKILL)"
    )
    outcome = train(*NODES, write_model(tmp_path, forward=forward), "compress.codec=int4")
    outcome.assert_clean()
    assert outcome.status != 0, outcome.describe()


def test_without_kernels_numpy_serves_and_the_job_says_so(tmp_path: Path) -> None:
    """The library is hidden from the ranks: the same losses, and one warning."""
    (tmp_path / "hide.py").write_text(
        "import runpy, sys\n"
        "from pathlib import Path\n"
        "import hpcsync.device.kernels as kernels\n"
        "kernels.LIBRARY = Path('no such library')\n"
        "runpy.run_module('hpcsync.train', run_name='__main__', alter_sys=True)\n"
    )
    native = tmp_path / "native"
    plain = tmp_path / "plain"
    native.mkdir()
    plain.mkdir()
    wanted = start(native, *NODES, "compress.codec=int8").wait(90)
    assert wanted.status == 0, wanted.describe()
    assert "kernels" not in wanted.stderr
    outcome = start(
        plain, *NODES, "compress.codec=int8", program=(str(tmp_path / "hide.py"),)
    ).wait(90)
    assert outcome.status == 0, outcome.describe()
    assert outcome.stderr.count("hpcsync: warning: the native kernels were not built") == 1
    assert [row["loss"] for row in rows(plain)] == [row["loss"] for row in rows(native)]
