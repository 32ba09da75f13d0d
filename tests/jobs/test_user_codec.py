"""Codecs of the user's own, named in the deck as ``package.module:Class``.

Two nodes of one rank, so that their rail codes.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests import launcher, refused

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(200)]

TINY = {
    "model.layers": "1",
    "model.width": "32",
    "model.heads": "2",
    "model.context": "16",
    "train.steps": "6",
    "train.warmup": "1",
    "train.global_batch": "4",
    "train.eval_batches": "1",
    "train.eval_every": "0",
    "topology.ranks_per_node": "1",
    "compress.warmup": "2",
}

CODECS = '''
"""Three codecs that work, and some that do not."""

import os
from pathlib import Path

import numpy as np

from hpcsync.codecs import PieceCodec, SumCodec
from hpcsync.codecs.base import Form, divide

RANK = os.environ["OMPI_COMM_WORLD_RANK"]


def told(what):
    with open(f"{what}-{RANK}", "a") as file:
        file.write("x")


class Floats(PieceCodec):
    """Float32 as it is, through the two-pass exchange."""

    name = "floats"
    dtype = np.float32

    def __init__(self, settings):
        super().__init__(settings)
        self.options = dict(settings.options or {})

    def store(self, count, role):
        return None

    def capacity(self, count):
        return count * np.dtype(self.dtype).itemsize

    def encode(self, values, out, store, moment):
        told(self.name)
        used = self.capacity(values.shape[0])
        out[:used] = values.astype(self.dtype).view(np.uint8)
        return used

    def decode(self, data, out):
        out[:] = data[: self.capacity(out.shape[0])].view(self.dtype)

    def decode_add(self, data, out):
        out += data[: self.capacity(out.shape[0])].view(self.dtype)


class Halves(Floats):
    """Half precision, with the error kept."""

    name = "halves"
    dtype = np.float16

    def store(self, count, role):
        return PieceCodec.store(self, count, role)

    def encode(self, values, out, store, moment):
        whole = values + store.read("error")
        used = super().encode(whole, out, store, moment)
        store.write("error", whole - out[:used].view(self.dtype))
        return used


class Sums(SumCodec):
    """Float32 in one round."""

    name = "sums"

    def forms(self, count, matrices, ranks):
        return (Form("float32", count),)

    def rounds(self, values, arrays, matrices, ranks, divisor, store, moment):
        told(self.name)
        arrays[0][:] = values
        yield 0
        values[:] = arrays[0]
        divide(values, divisor)


class Picky(Floats):
    def __init__(self, settings):
        raise ValueError(f"no luck with {dict(settings.options)}")


class Raises(Floats):
    name = "raises"

    def encode(self, values, out, store, moment):
        if RANK == "1" and moment.step == 1:
            raise RuntimeError("this codec gives up")
        return super().encode(values, out, store, moment)


class Stranger:
    """Has all that a codec needs but its base."""

    def __init__(self, settings):
        pass
'''


def train(folder: Path, codec: str, *words: str) -> launcher.Outcome:
    """Train on two ranks in ``folder``, where the module ``own`` stands."""
    (folder / "own.py").write_text(CODECS)
    run = ["-m", "hpcsync.train", f"compress.codec={codec}", *tiny(*words), *words]
    return launcher.run(2, *run, "--out", str(folder / "run"), timeout=90, cwd=folder)


def tiny(*words: str) -> list[str]:
    """What makes a training tiny, but for the keys that the words give."""
    given = {word.partition("=")[0] for word in words}
    return [f"{key}={value}" for key, value in TINY.items() if key not in given]


def losses(folder: Path) -> list[str]:
    """The losses of a run that went well, with all digits."""
    with (folder / "run" / "metrics.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


def assert_trained(outcome: launcher.Outcome, folder: Path, codec: str, mark: str) -> None:
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["codec"] == codec
    for rank in (0, 1):
        assert (folder / f"{mark}-{rank}").stat().st_size > 0


@pytest.fixture(scope="module")
def uncoded(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The losses of a run without a codec."""
    if reason := launcher.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("uncoded")
    outcome = train(folder, "none")
    assert outcome.status == 0, outcome.describe()
    return losses(folder)


@pytest.mark.parametrize(
    ("name", "where"), [("Halves", "rail"), ("Floats", "rail"), ("Sums", "all")]
)
def test_a_codec_of_the_users_own_trains(
    tmp_path: Path, uncoded: list[str], name: str, where: str
) -> None:
    outcome = train(tmp_path, f"own:{name}", f"compress.where={where}")
    assert_trained(outcome, tmp_path, f"own:{name}", name.lower())
    found = losses(tmp_path)
    assert len(found) == 6
    if name == "Halves":
        assert [float(loss) for loss in found] == pytest.approx([*map(float, uncoded)], rel=1e-3)
    else:  # nothing is lost
        assert found == uncoded


def test_one_that_raises_ends_the_job_with_its_traceback(tmp_path: Path) -> None:
    outcome = train(tmp_path, "own:Raises")
    outcome.assert_clean()
    assert outcome.status == 1, outcome.describe()
    assert outcome.stderr.count("RuntimeError: this codec gives up") == 1, outcome.describe()
    assert "own.py" in outcome.stderr
    assert "rank 1" in outcome.stderr


REFUSED = {
    "compress.codec=no_such_module:Codec": ("no module 'no_such_module'", "install it"),
    "compress.codec=own:Stranger": ("Stranger", "PieceCodec or SumCodec"),
    "compress.codec=own:Picky compress.options={width=3}": (
        "own:Picky",
        "no luck with {'width': 3}",
    ),
}


def test_what_is_no_codec_and_what_refuses_its_options_is_told(tmp_path: Path) -> None:
    """All of it in one job."""
    (tmp_path / "own.py").write_text(CODECS)
    cases = {words: (*words.split(), *tiny()) for words in REFUSED}
    told = refused.told(tmp_path, cases)
    for words, parts in REFUSED.items():
        for part in ("compress.codec", *parts):
            assert part in told[words], f"{part!r} is not in the message\n{told[words]}"
