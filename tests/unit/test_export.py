"""python -m hpcsync.export: each format holds the checkpoint's weights, and errors are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hpcsync import config as configs
from hpcsync import export, weights
from hpcsync.errors import DamagedError, UserError
from tests import trained

pytest.importorskip("safetensors", reason="safetensors is missing: hpcsync[safetensors]")


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A run's folder with two checkpoints, and the model of the newer one."""
    config, _, model = trained.small("gpt")
    _, _, other = trained.small("gpt", "run.seed=1")
    trained.save(tmp_path / "run" / "checkpoints", 3, other, config)
    trained.save(tmp_path / "run" / "checkpoints", 20, model, config)
    return tmp_path / "run", model


Run = tuple[Path, nn.Module]


def call(*words: object) -> int:
    return export.command([str(word) for word in words])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_newest_weights_are_exported(suffix: str, run: Run, tmp_path: Path, capsys) -> None:
    folder, model = run
    path = tmp_path / f"weights{suffix}"
    assert call(folder, "--to", path) == 0
    assert f"{path}: {len(model.state_dict())} tensors" in capsys.readouterr().out
    found = weights.read(str(path))
    assert sorted(found) == sorted(model.state_dict())
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_pt_is_a_plain_dict_with_ties(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    call(run[0] / "checkpoints" / "step-00000003", "--to", path)
    found = torch.load(path, weights_only=True)
    assert type(found) is dict
    assert found["head.weight"].data_ptr() == found["embedding.weight"].data_ptr()
    assert not torch.equal(found["head.weight"], run[1].state_dict()["head.weight"])


def test_all_holds_the_optimizer_and_the_ranks(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    call(run[0], "--to", path, "--what", "all")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        assert file.metadata()["hpcsync_step"] == "20"
        assert file.get_tensor("ranks/1/random/torch").tolist() == list(range(1, 9))
    assert {"model/embedding.weight", "optimizer/exp_avg/embedding.weight"} < names


def test_a_file_is_not_replaced_unasked(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_text("mine")
    with pytest.raises(UserError, match="--force"):
        call(run[0], "--to", path)
    assert path.read_text() == "mine"
    assert call(run[0], "--to", path, "--force") == 0
    assert path.read_bytes() != b"mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "weights.pt"]


def test_a_damaged_checkpoint_is_not_exported(run: Run, tmp_path: Path) -> None:
    folder = run[0] / "checkpoints" / "step-00000020"
    file = folder / "rank-00000.h5"
    data = bytearray(file.read_bytes())
    for at in range(0, len(data), 64):
        data[at] ^= 1
    file.write_bytes(data)
    path = tmp_path / "weights.pt"
    with pytest.raises(DamagedError, match=r"rank-00000.h5: dataset"):
        call(run[0], "--to", path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--to", "a.bin"), "does not end in"),
        (("--to", "a.onnx", "--what", "all"), "ONNX holds a model"),
        (("--to", "a.pt", "train.lr=1"), "only an export to .onnx"),
        (("--to", "a.pt", "--what", "some"), "invalid choice"),
        ((), "required: --to"),
    ],
)
def test_what_cannot_be_is_told(words: tuple[str, ...], told: str, run: Run) -> None:
    with pytest.raises(UserError, match=told):
        call(run[0], *words)


def test_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        call(tmp_path, "--to", tmp_path / "a.pt")
    with pytest.raises(UserError, match="no such folder"):
        call(tmp_path / "none", "--to", tmp_path / "a.pt")


# -- ONNX --------------------------------------------------------------------------------


@pytest.fixture
def onnx() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is missing: hpcsync[onnx]")


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize("name", ["gpt", "mlp", "convnet"])
def test_onnxruntime_computes_what_torch_does(name: str, tmp_path: Path, capsys) -> None:
    import onnxruntime

    config, source, model = trained.small(name)
    for value in model.buffers():  # running means that are not those of a new model
        if value.is_floating_point():
            value.data.add_(torch.rand_like(value))
    trained.save(tmp_path / "checkpoints", 5, model, config)
    path = tmp_path / "model.onnx"
    assert call(tmp_path, "--to", path) == 0
    assert f"{path}: {name}; onnxruntime and torch differ by" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["hpcsync_step"] == "5"
    model.eval()
    for count in (1, 2, 7):
        inputs, _ = source.val_batch(np.arange(count))
        (found,) = session.run(["logits"], {"inputs": inputs.numpy()})
        with torch.no_grad():
            wanted = model.logits(inputs)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("onnx")
def test_code_of_a_stranger_runs_only_when_named(tmp_path: Path) -> None:
    """A deck may name any module; whoever exports says that it may run."""
    config, _, model = trained.small("mlp")
    own = trained.with_model(config, "stranger:build")
    trained.save(tmp_path / "checkpoints", 5, model, own)
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match=r"say so: model.name=stranger:build"):
        call(tmp_path, "--to", path)
    with pytest.raises(UserError, match="no module 'stranger'"):
        call(tmp_path, "--to", path, "model.name=stranger:build")
    with pytest.raises(UserError, match="does not fit the model"):
        call(tmp_path, "--to", path, "model.name=mlp", "model.width=8")
    assert call(tmp_path, "--to", path, "model.name=mlp") == 0


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize("key", ["model.width=1000000", "model.layers=1000000000"])
def test_a_deck_of_a_stranger_takes_no_memory(key: str, tmp_path: Path) -> None:
    """Its model would need terabytes; the weights that are there do not."""
    config, _, model = trained.small("mlp")
    huge = configs.loads(configs.dump(config), "deck", [key])
    trained.save(tmp_path / "checkpoints", 5, model, huge)
    with pytest.raises(UserError, match="does not fit the model"):
        call(tmp_path, "--to", tmp_path / "model.onnx")


@pytest.mark.usefixtures("onnx")
def test_a_model_without_logits_is_told() -> None:
    from hpcsync import onnx_export

    with pytest.raises(UserError, match="Linear has no method logits"):
        onnx_export.write(Path("never"), nn.Linear(2, 2), torch.zeros(3, 2), {})
