"""Files of tensors: what is written is read back, what is hostile or broken is one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsync import formats
from hpcsync.errors import UserError
from hpcsync.formats import aside

pytest.importorskip("safetensors", reason="safetensors is missing: hpcsync[safetensors]")

SUFFIXES = (".pt", ".safetensors")
NOTES = {"hpcsync_step": "7"}


def tensors() -> dict[str, Tensor]:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "matrix": whole,
        "view": whole[1:3].t(),
        "tied": whole,
        "count": torch.tensor(3),
        "none": torch.empty(0, 5),
        "mask": torch.tensor([True, False]),
        "half": torch.tensor([1.5, float("nan"), float("-inf")], dtype=torch.bfloat16),
    }


def form(path: Path) -> formats.Format:
    found = formats.of(path)
    assert found is not None
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    form(path).write(path, tensors(), NOTES)
    found = form(path).read(path)
    assert sorted(found) == sorted(tensors())
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(bits(found[name]), bits(value)), name


def bits(value: Tensor) -> Tensor:
    return value.contiguous().flatten().view(torch.uint8)


def test_others_read_what_is_written(tmp_path: Path) -> None:
    from safetensors import safe_open

    for suffix in SUFFIXES:
        path = tmp_path / f"weights{suffix}"
        form(path).write(path, tensors(), NOTES)
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert type(loaded) is dict
    with safe_open(tmp_path / "weights.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt", **NOTES}
        assert file.get_tensor("matrix").tolist() == loaded["matrix"].tolist()


def test_a_view_does_not_drag_its_memory_along(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    form(path).write(path, {"row": torch.zeros(4096, 64)[:1]}, {})
    assert path.stat().st_size < 16384


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04aaaa", os.urandom(512)])
def test_a_broken_file_is_one_line(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as told:
        form(path).read(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cut_file_is_one_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    form(path).write(path, tensors(), {})
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"is damaged, or no file|more than tensors"):
            form(path).read(path)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    mark, path = tmp_path / "exploded", tmp_path / "bomb.pt"
    torch.save({"weight": torch.zeros(2), "bomb": Bomb(mark)}, path)
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(Bomb(mark)))
    for each in (path, plain):
        with pytest.raises(UserError, match=r"runs no code|is damaged"):
            form(each).read(each)
    assert not mark.exists()


def test_weights_are_found_under_usual_keys(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    weights = nn.Linear(2, 2).state_dict()
    for saved in (
        {"model": weights, "step": 3},
        {"epoch": 1, "state_dict": weights},
        {"checkpoint": 1, "model": {"version": 2, "state_dict": weights}},
    ):
        torch.save(saved, path)
        assert list(form(path).read(path)) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ([1, 2], "holds a list"),
        ({"step": 3, "weight": torch.zeros(1)}, "'step' is a int, not a tensor"),
        ({3: torch.zeros(1)}, "'3' is no dense tensor"),
        ({"a": torch.zeros(2).to_sparse()}, "'a' is no dense tensor"),
    ],
)
def test_other_contents_are_told(saved: object, told: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(saved, path)
    with pytest.raises(UserError, match=told):
        form(path).read(path)


def test_what_a_format_lacks_is_told(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match=r"no dtype torch.complex128; use .pt"):
        form(path).write(path, {"a": torch.zeros(1, dtype=torch.complex128)}, {})


def test_suffixes_name_formats() -> None:
    assert formats.of(Path("a.PT")) is formats.of(Path("b.pth"))
    assert formats.of(Path("a.bin")) is None


# -- writing aside -----------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(KeyError), aside(path, force=False) as part:  # noqa: PT012
        part.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with aside(path, force=False) as part:
        part.write_text("whole")
        assert not path.exists()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "whole"


def test_a_file_is_replaced_by_force_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError, match="exists"), aside(path, force=False):
        pass
    with aside(path, force=True) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    other = tmp_path / "other"
    # One that comes while the file is written counts, too.
    with pytest.raises(UserError, match="exists"), aside(other, force=False) as part:  # noqa: PT012
        part.write_text("new")
        other.write_text("theirs")
    assert other.read_text() == "theirs"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "other"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"), aside(tmp_path, force=True):
        pass
    path = tmp_path / "missing" / "file"
    with pytest.raises(UserError, match="No such file"), aside(path, force=False) as part:
        part.write_text("")
