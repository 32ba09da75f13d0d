"""model.init_from: what fits is taken whole, what does not fit is told, and nothing runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpcsync import checkpoint, weights
from hpcsync.errors import CheckpointError, ModelError, UserError
from tests import trained


def saved(path: Path, tensors: dict[str, Tensor]) -> str:
    torch.save(tensors, path)
    return str(path)


def same(model: nn.Module, other: nn.Module) -> bool:
    there = other.state_dict()
    return all(torch.equal(value, there[name]) for name, value in model.state_dict().items())


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """The model with the weights, and one like it with others."""
    return trained.small("convnet")[2], trained.small("convnet", "run.seed=1")[2]


Pair = tuple[nn.Module, nn.Module]


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."],
)
def test_names_of_wrappers_are_understood(prefix: str, pair: Pair, tmp_path: Path) -> None:
    one, other = pair
    assert not same(one, other)
    source = saved(tmp_path / "w.pt", {prefix + k: v for k, v in one.state_dict().items()})
    assert weights.load(other, source) == weights.Loaded((), ())
    assert same(one, other)


def test_compiled_parts_are_understood(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = {f"{k[:2]}_orig_mod.{k[2:]}": v for k, v in inner.state_dict().items()}
    assert "0._orig_mod.weight" in names
    weights.load(inner, saved(tmp_path / "w.pt", names))


def test_a_part_called_module_is_not_a_wrapper(tmp_path: Path) -> None:
    holder = nn.Module()
    holder.module = nn.Linear(2, 2)
    weights.load(holder, saved(tmp_path / "w.pt", dict(holder.state_dict())))
    wrapped = {f"module.{k}": v for k, v in holder.state_dict().items()}
    weights.load(holder, saved(tmp_path / "v.pt", wrapped))


def test_safetensors_are_read(pair: Pair, tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch", reason="safetensors is missing")
    path = tmp_path / "w.safetensors"
    files.save_file(dict(pair[0].state_dict()), path)
    weights.load(pair[1], str(path))
    assert same(*pair)


@pytest.mark.parametrize("name", ["gpt", "mlp", "convnet"])
def test_a_checkpoint_and_its_run_are_read(name: str, tmp_path: Path) -> None:
    """gpt has tied weights, convnet running means and counts."""
    config, _, one = trained.small(name)
    _, _, other = trained.small(name, "run.seed=1")
    place = tmp_path / "checkpoints"
    trained.save(place, 3, other, config)
    trained.save(place, 20, one, config, ranks=3)
    for folder in (tmp_path, place, place / "step-00000020"):
        weights.load(other, str(folder))
        assert same(one, other)
        weights.load(one, str(place / "step-00000003"))
        assert not same(one, other)
        weights.load(one, str(tmp_path))


def test_tensors_of_an_export_of_all_are_left_out(pair: Pair, tmp_path: Path) -> None:
    names = {f"model/{k}": v for k, v in pair[0].state_dict().items()}
    source = saved(tmp_path / "w.pt", names | {"optimizer/exp_avg/a": torch.zeros(3)})
    weights.load(pair[1], source)
    assert same(*pair)


def test_what_does_not_fit_is_told_in_a_line(pair: Pair, tmp_path: Path) -> None:
    one, other = pair
    before = {name: value.clone() for name, value in other.state_dict().items()}
    names = dict(one.state_dict())
    lost = [names.pop(name) for name in list(names)[:5]]
    source = saved(tmp_path / "w.pt", names | {"more": lost[0]})
    with pytest.raises(ModelError) as told:
        weights.load(other, source)
    text = str(told.value)
    assert text.startswith(f"model.init_from: {source} does not fit the model: 5 (")
    assert ", ...) missing there, 1 (more) not in the model;" in text
    assert text.endswith("or model.init_strict=false to take what fits")
    assert "\n" not in text
    found = other.state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    loaded = weights.load(other, source, strict=False)
    assert (len(loaded.missing), loaded.extra) == (5, ("more",))
    assert loaded.describe("w.pt").startswith("w.pt; 5 (")
    assert not torch.equal(other.state_dict()[loaded.missing[0]], lost[0])
    first = next(iter(names))
    assert torch.equal(other.state_dict()[first], names[first])


def test_other_shapes_are_refused_in_any_case(pair: Pair, tmp_path: Path) -> None:
    one, other = pair
    names = dict(one.state_dict())
    names["head.weight"] = names["head.weight"][:, 1:]
    names["head.bias"] = names["head.bias"].to(torch.int64)
    source = saved(tmp_path / "w.pt", names)
    for strict in (True, False):
        with pytest.raises(
            ModelError, match=r"2 cannot be taken \(head.weight is 10x23, and 10x24"
        ):
            weights.load(other, source, strict=strict)
    assert not same(one, other)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Also where what is missing is allowed: nothing at all would be taken."""
    _, _, mlp = trained.small("mlp")
    for found in ({"a": torch.zeros(2)}, {}):
        source = saved(tmp_path / "w.pt", found)
        with pytest.raises(ModelError, match="does not fit"):
            weights.load(mlp, source, strict=False)


def test_lower_precision_is_taken(tmp_path: Path) -> None:
    _, _, one = trained.small("mlp")
    _, _, other = trained.small("mlp", "run.seed=1")
    names = {name: value.bfloat16() for name, value in one.state_dict().items()}
    weights.load(other, saved(tmp_path / "w.pt", names))
    assert {value.dtype for value in other.state_dict().values()} == {torch.float32}
    assert torch.equal(other.state_dict()["head.weight"], names["head.weight"].float())


def test_tied_weights_stand_under_either_name(tmp_path: Path) -> None:
    _, _, one = trained.small("gpt")
    _, _, other = trained.small("gpt", "run.seed=1")
    names = dict(one.state_dict())
    del names["head.weight"]
    weights.load(other, saved(tmp_path / "w.pt", names))
    assert same(one, other)
    names["head.weight"] = names["embedding.weight"] + 1
    with pytest.raises(ModelError, match=r"head.weight differ, and are one tensor"):
        weights.load(other, saved(tmp_path / "v.pt", names))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    _, _, model = trained.small("mlp")
    for source, told in (
        (tmp_path / "w.pt", "no such file"),
        (tmp_path / "w.bin", "neither a folder nor a file"),
        (tmp_path, "holds no checkpoint"),
    ):
        with pytest.raises(UserError, match=told):
            weights.load(model, str(source))


def test_a_damaged_checkpoint_is_not_taken(tmp_path: Path) -> None:
    config, _, model = trained.small("mlp")
    folder = trained.save(tmp_path / "checkpoints", 3, model, config)
    piece = checkpoint.open(folder).manifest.tensors["model/head.weight"].pieces[0]
    file = folder / piece.file
    data = bytearray(file.read_bytes())
    data[piece.offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{piece.file}: dataset model/head.weight"):
        weights.load(model, str(tmp_path))
