"""Keys that are not there, values that they do not take, and keys that contradict each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsync import config
from tests.decks import fault, problems


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
        (
            '[comm]\nnode_transport = "auto"\n',
            "2: comm.node_transport: is called comm.transport.node now; write that",
        ),
        (
            '[comm.transport]\nnoode = "auto"\n',
            "2: comm.transport.noode: no such key; did you mean comm.transport.node?",
        ),
        (
            '[comm]\ntransport = "auto"\n',
            "2: comm.transport: is a table; its keys are comm.transport.node, comm.transport.rail",
        ),
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
        (
            "[train]\ndevice = 'gpu'",
            "2: train.device: must be one of auto, cpu, cuda, not the text 'gpu'; "
            "did you mean cuda?",
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
        (
            '[train]\ndevice = "cuda"\n[comm.transport]\nnode = "mpi_host"\n',
            "4: comm.transport.node: mpi_host does not join device memory; use auto or one of "
            "cuda_ipc, mpi_device, mpi_staged, nccl",
        ),
        (
            '[train]\ndevice = "cpu"\n[comm.transport]\nrail = "mpi_device"\n',
            "4: comm.transport.rail: mpi_device joins the memory of GPUs, and gradients are on the "
            "host; use comm.transport.rail=auto",
        ),
        (
            '[comm.transport]\nnode = "nccl"\nrail = "mpi_device"\n',
            "3: comm.transport.rail: mpi_device and nccl would wait for each other on one GPU; use "
            "comm.transport.rail=mpi_staged, or comm.transport.node=cuda_ipc",
        ),
        (
            '[train]\ndevice = "cuda"\n[checkpoint]\nreplay_log = true\n',
            "4: checkpoint.replay_log: it logs gradients in host memory, where each step on a GPU "
            "would wait for it; set checkpoint.replay_log=false and save more often, or "
            "train.device=cpu",
        ),
        (
            '[train]\ndevice = "cuda"\n[comm]\nalgorithm = "native"\n',
            "4: comm.algorithm: native is MPI's own, which adds host memory only; on a device use "
            "comm.algorithm=auto",
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
