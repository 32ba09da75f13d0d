"""Corpora: their samples, what is held out, and the one line that each fault gets."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpcsync import data
from hpcsync.config import Config, DataConfig, ModelConfig
from hpcsync.data import stdlib, text
from hpcsync.errors import DataError


def config(context=8, **keys):
    return Config(model=ModelConfig(context=context), data=DataConfig(**keys))


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


def every(source, batch, size):
    """All inputs and targets of a part, put together as they stand in the stream."""
    inputs, targets = batch(np.arange(size))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (size, source.tokens_per_sample)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return torch.cat([inputs, targets[:, -1:]], dim=1).flatten()


# The standard library


def test_stdlib_is_real_text_split_by_file():
    source = data.build(config(context=64))
    assert (source.vocab, source.classes, source.unit) == (256, 256, "byte")
    assert source.sample_shape == (64,)
    assert source.train_size * 65 > 7e6
    assert 0.03 < source.val_size / (source.train_size + source.val_size) < 0.12
    inputs, _ = source.train_batch(np.arange(200))
    written = bytes(inputs.flatten().tolist()).decode("utf-8", "ignore")
    assert "def " in written
    assert "standard library" in data.describe(source)


def test_stdlib_holds_out_whole_files(tmp_path):
    for number in range(40):
        (tmp_path / f"m{number}.py").write_bytes(bytes([number]) * 100)
    stream, split = stdlib._read(tmp_path, None, 0.1)
    assert (split, len(stream)) == (3600, 4000)
    assert not set(stream[:split]) & set(stream[split:])


def test_stdlib_leaves_out_tests_and_what_one_machine_wrote(tmp_path):
    for name in ("a.py", "test/b.py", "x/tests/c.py", "site-packages/d.py", "x/e.py", "f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass\n")
    (tmp_path / "_sysconfigdata__linux_x86_64.py").write_text("prefix = 'here'\n")
    assert sorted(name for name, _ in stdlib._files(tmp_path)) == ["a.py", "x/e.py"]


def test_stdlib_is_the_same_in_another_process():
    """Neither string hashing nor the order of a folder's entries may reach the order of files."""
    code = (
        "from hpcsync import data; from hpcsync.config import Config;"
        "print(data.fingerprint(data.build(Config())))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {data.fingerprint(data.build(Config()))}


def test_stdlib_can_be_capped():
    source = data.build(config(context=64, options={"max_mb": 0.5}))
    assert 0.49e6 < 65 * (source.train_size + source.val_size) <= 0.5e6


def test_stdlib_shorter_than_a_sample():
    with pytest.raises(DataError, match=r"model\.context \+ 1 = 5001 bytes") as caught:
        data.build(config(context=5000, options={"max_mb": 0.005}))
    one_line(caught)


# Text of the user's


@pytest.fixture
def corpus(tmp_path):
    """A folder of three files, an empty one and a hidden one; the bytes count up from 0."""
    stream = bytes(range(250))
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(stream[:100])
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(stream[100:107])
    (tmp_path / "sub" / "d.txt").write_bytes(stream[107:])
    (tmp_path / ".hidden").write_bytes(b"secret")
    return tmp_path


def test_text_folder_is_one_stream(corpus):
    source = data.build(config(context=9, name="text", path=str(corpus), val_fraction=0.2))
    assert (source.train_size, source.val_size) == (20, 5)
    assert every(source, source.train_batch, 20).tolist() == list(range(200))
    assert every(source, source.val_batch, 5).tolist() == list(range(200, 250))
    assert "3 files" in data.describe(source)


def test_text_glob_and_file(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    source = data.build(config(name="text", path="**/*.txt"))
    assert every(source, source.train_batch, source.train_size).tolist()[:200] == list(range(200))
    source = data.build(config(name="text", path="a.txt"))
    assert source.train_size + source.val_size == 11


def test_text_keeps_few_files_open(tmp_path):
    for number in range(150):
        (tmp_path / f"{number:03d}").write_bytes(bytes([number]) * 3)
    files = text.Files(sorted(tmp_path.iterdir()), "data.path")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert files.read(0, 450).tolist() == [n for n in range(150) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) - before == 64
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_text_at_least_one_sample_is_held_out(tmp_path):
    (tmp_path / "t").write_bytes(bytes(18))
    source = data.build(config(name="text", path=str(tmp_path / "t"), val_fraction=0.001))
    assert (source.train_size, source.val_size) == (1, 1)


@pytest.mark.parametrize("name", ["text", "tokens"])
@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "no such file"), (b"", "is empty"), ("", "data.path: data.name = ")],
)
def test_path_missing_empty_or_not_given(tmp_path, name, content, told):
    path = tmp_path / "corpus"
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        data.build(config(name=name, path="" if content == "" else str(path)))
    assert "data.path" in one_line(caught)


def test_text_shorter_than_two_samples(tmp_path):
    (tmp_path / "t").write_bytes(bytes(17))
    with pytest.raises(DataError, match=r"17 bytes.*model\.context \+ 1 = 9 bytes") as caught:
        data.build(config(name="text", path=str(tmp_path / "t")))
    one_line(caught)


@pytest.mark.parametrize("name", ["text", "tokens"])
def test_path_unreadable(tmp_path, monkeypatch, name):
    """Root may read everything, so the refusal is put on."""
    (tmp_path / "t").write_bytes(bytes(100))

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="Permission denied") as caught:
        data.build(config(name=name, path=str(tmp_path / "t")))
    one_line(caught)


def test_text_that_shrinks_while_training(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(bytes(900))
    source = data.build(config(name="text", path=str(path)))
    os.truncate(path, 450)
    with pytest.raises(DataError, match="grew shorter"):
        source.val_batch(np.array([0]))


# Tokens in HDF5


def write_tokens(path, values, vocab=None, name="tokens"):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(name, data=values)
        if vocab is not None:
            dataset.attrs["vocab"] = vocab
    return str(path)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32"])
def test_tokens_are_read(tmp_path, kind):
    path = write_tokens(tmp_path / "t.h5", np.arange(180).astype(kind), vocab=200)
    source = data.build(config(name="tokens", path=path, val_fraction=0.25))
    assert (source.vocab, source.unit) == (200, "token")
    assert every(source, source.train_batch, 15).tolist() == list(range(135))
    assert every(source, source.val_batch, 5).tolist() == list(range(135, 180))


def test_tokens_of_8_bits_are_bytes_unless_told(tmp_path):
    path = write_tokens(tmp_path / "t.h5", np.zeros(100, "uint8"), name="x")
    source = data.build(config(name="tokens", path=path, options={"dataset": "x"}))
    assert (source.vocab, source.unit) == (256, "byte")


@pytest.mark.parametrize(
    ("values", "vocab", "name", "told"),
    [
        (np.zeros(100, "int64"), 10, "tokens", "int64 of shape (100,)"),
        (np.zeros((10, 10), "uint8"), 10, "tokens", "uint8 of shape (10, 10)"),
        (np.zeros(100, "uint16"), None, "tokens", "no attribute 'vocab'"),
        (np.zeros(100, "uint16"), 1.5, "tokens", "must be a positive integer"),
        (np.zeros(100, "uint16"), 10, "words", "only: words"),
        (np.zeros(17, "uint16"), 10, "tokens", "17 tokens"),
        (np.zeros(0, "uint16"), 10, "tokens", "0 tokens"),
    ],
)
def test_tokens_of_the_wrong_form(tmp_path, values, vocab, name, told):
    path = write_tokens(tmp_path / "t.h5", values, vocab, name)
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        data.build(config(name="tokens", path=path))
    one_line(caught)


def test_tokens_not_hdf5(tmp_path):
    (tmp_path / "t.h5").write_bytes(bytes(5000))
    with pytest.raises(DataError, match="not an HDF5 file") as caught:
        data.build(config(name="tokens", path=str(tmp_path / "t.h5")))
    one_line(caught)


def test_tokens_beyond_the_vocabulary(tmp_path):
    path = write_tokens(tmp_path / "t.h5", np.arange(100, dtype="uint16"), vocab=50)
    source = data.build(config(name="tokens", path=path))
    with pytest.raises(DataError, match="holds token 53, but its vocabulary is 50"):
        source.train_batch(np.array([5]))


# Digits


def test_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install hpcsync[digits]")
    source = data.build(config(name="digits", val_fraction=0.2))
    assert (source.vocab, source.classes, source.unit) == (0, 10, "sample")
    assert (source.train_size, source.val_size) == (1438, 359)
    pictures, labels = source.train_batch(np.array([0, 5]))
    assert pictures.shape == (2, *source.sample_shape)
    assert pictures.dtype == torch.float32
    assert labels.dtype == torch.int64
    rest, _ = source.train_batch(np.arange(source.train_size))
    assert rest.min() >= 0
    assert rest.max() == 1
    held_out, _ = source.val_batch(np.arange(source.val_size))
    both = torch.cat([rest, held_out]).flatten(1).unique(dim=0)
    assert len(both) == 1797, "a picture is in both parts"


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install hpcsync\[digits\]") as caught:
        data.build(config(name="digits"))
    one_line(caught)


# Users' own, and what goes wrong between


def test_own_source(tmp_path, monkeypatch):
    (tmp_path / "own_corpus.py").write_text(
        "import torch\n"
        "class Noise:\n"
        "    vocab = 0; classes = 3; sample_shape = (4,); unit = 'sample'\n"
        "    tokens_per_sample = 1; train_size = 10; val_size = 2\n"
        "    def train_batch(self, indices):\n"
        "        return torch.zeros(len(indices), 4), torch.zeros(len(indices), dtype=torch.long)\n"
        "    val_batch = train_batch\n"
        "def build(config, *, context, seed, size=10):\n"
        "    noise = Noise(); noise.train_size = size; return noise\n"
        "def wrong(config, *, context, seed): return 3\n"
        "def none(config, *, context, seed):\n"
        "    noise = Noise(); noise.val_size = 0; return noise\n"
    )
    monkeypatch.chdir(tmp_path)
    source = data.build(config(name="own_corpus:build", options={"size": 7}))
    assert source.train_size == 7
    assert data.fingerprint(source) == data.fingerprint(source)
    assert "7 samples" in data.describe(source)
    with pytest.raises(DataError, match="a int without vocab"):
        data.build(config(name="own_corpus:wrong"))
    with pytest.raises(DataError, match="0 held out"):
        data.build(config(name="own_corpus:none"))


def test_sample_out_of_range():
    source = data.build(config(context=64, options={"max_mb": 0.5}))
    with pytest.raises(IndexError):
        source.val_batch(np.array([source.val_size]))


def test_seed_of_the_run_is_the_default():
    plain = config(context=64, options={"max_mb": 0.5})
    other = replace(plain, run=replace(plain.run, seed=9))
    assert data.fingerprint(data.build(plain)) == data.fingerprint(data.build(other, 3))
