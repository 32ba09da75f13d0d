"""Models: shapes, weights from the seed alone, recomputation, compilation, and their faults."""

from __future__ import annotations

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpcsync import config as configs
from hpcsync import models
from hpcsync.config import ModelConfig
from hpcsync.errors import ModelError

TEXT = SimpleNamespace(vocab=50, classes=50, sample_shape=(16,), unit="token")
PICTURES = SimpleNamespace(vocab=0, classes=10, sample_shape=(1, 8, 8), unit="sample")
SMALL = {"layers": 2, "width": 32, "heads": 4, "context": 16}


def make(name="gpt", source=None, seed=0, **keys):
    source = source or (TEXT if name == "gpt" else PICTURES)
    torch.manual_seed(seed)
    return models.build(ModelConfig(name=name, **{**SMALL, **keys}), source)


def batch(name, count=4):
    generator = torch.Generator().manual_seed(1)
    if name == "gpt":
        tokens = torch.randint(50, (count, 17), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    pictures = torch.rand(count, 1, 8, 8, generator=generator)
    return pictures, torch.randint(10, (count,), generator=generator)


def gradients(model, inputs, targets):
    model.zero_grad()
    loss = model(inputs, targets)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


EVERY = pytest.mark.parametrize("name", ["gpt", "mlp", "convnet"])


@EVERY
def test_loss_is_a_mean_in_nats(name):
    model = make(name).eval()
    inputs, targets = batch(name)
    loss = model(inputs, targets)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(50 if name == "gpt" else 10), rel=0.15)
    halves = [model(inputs[part], targets[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(loss, torch.stack(halves).mean())
    logits = model.logits(inputs)
    own = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
    torch.testing.assert_close(loss, own)


@EVERY
def test_weights_depend_on_the_seed_alone(name):
    first, again, other = make(name), make(name), make(name, seed=1)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in first.state_dict().items())


@EVERY
def test_every_parameter_gets_a_gradient_and_learning_works(name):
    model = make(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs, targets = batch(name)
    first, grads = gradients(model, inputs, targets)
    assert all(torch.isfinite(grad).all() and grad.any() for grad in grads.values())
    for _ in range(60):
        loss, _ = gradients(model, inputs, targets)
        optimizer.step()
    assert loss < 0.5 * first


@EVERY
@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_bf16(name, kind):
    model = make(name)
    inputs, targets = batch(name)
    exact = model(inputs, targets)
    if kind == "weights":
        model, inputs = model.bfloat16(), inputs if name == "gpt" else inputs.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss = model(inputs, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)


@EVERY
def test_built_without_memory_for_a_dry_run(name):
    with torch.device("meta"):
        model = make(name)
    assert all(p.is_meta for p in model.parameters())
    assert models.parameter_counts(model) == models.parameter_counts(make(name))


def test_gpt_does_not_look_ahead():
    model = make().eval()
    inputs, _ = batch("gpt")
    changed = inputs.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    before, after = model.logits(inputs), model.logits(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_gpt_sizes():
    counts = models.parameter_counts(make(layers=3, width=32, context=16))
    blocks = 3 * (12 * 32 * 32 + 4 * 32)
    assert counts.total == counts.trainable == 50 * 32 + 16 * 32 + blocks + 2 * 32
    assert counts.nbytes == 4 * counts.total
    untied = models.parameter_counts(make(layers=3, options={"tied": False}))
    assert untied.total == counts.total + 50 * 32
    assert make(hidden=8).layers[0].mlp.inner.weight.shape == (8, 32)
    tied = make()
    assert tied.head.weight is tied.embedding.weight


def test_gpt_takes_shorter_samples():
    inputs, targets = batch("gpt")
    assert torch.isfinite(make()(inputs[:, :5], targets[:, :5]))


def test_convnet_has_buffers():
    model = make("convnet")
    assert [buffer.numel() for buffer in model.buffers()] == 2 * [32, 32, 1]
    before = copy.deepcopy(model.layers[0][1].running_mean)
    model(*batch("convnet"))
    assert not torch.equal(before, model.layers[0][1].running_mean)


@pytest.mark.parametrize(("hidden", "wide"), [(0, 32), (8, 8)])
def test_hidden_is_what_its_text_says(hidden, wide):
    assert "gpt (0: 4 x width); width of mlp and convnet (0: width)" in configs.explain(
        "model.hidden"
    ).replace("\n", " ").replace("  ", " ")
    inner = make(hidden=hidden).layers[0].mlp.inner
    assert inner.out_features == (hidden or 4 * 32)
    assert make("mlp", hidden=hidden).layers[0][0].out_features == wide
    assert make("convnet", hidden=hidden).layers[0][0].out_channels == wide


def test_frozen_and_shared_parameters_are_counted():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    counts = models.parameter_counts(model)
    assert (counts.total, counts.trainable, counts.nbytes) == (15, 12, 60)


@pytest.mark.parametrize("name", ["gpt", "mlp"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_activations_changes_no_bit(name, dropout):
    plain, saving = make(name, dropout=dropout), make(name, dropout=dropout)
    assert models.checkpoint_activations(saving) == 2
    assert models.checkpoint_activations(saving) == 2
    assert list(plain.state_dict()) == list(saving.state_dict())
    results = []
    for model in (plain, saving):
        torch.manual_seed(7)
        results.append(gradients(model, *batch(name)))
    assert torch.equal(results[0][0], results[1][0])
    for key, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][key]), key


def test_recomputing_activations_saves_memory():
    def saved(model):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.append(t.numel()) or t, lambda t: t
        ):
            model(*batch("gpt"))
        return sum(held)

    plain, saving = make(layers=4), make(layers=4)
    models.checkpoint_activations(saving)
    assert saved(saving) < 0.5 * saved(plain)


@pytest.mark.parametrize("model", ["convnet", "own"])
def test_a_model_without_blocks_cannot_recompute(model):
    with pytest.raises(ModelError, match=r"train\.activation_checkpointing") as caught:
        models.checkpoint_activations(nn.Linear(2, 2) if model == "own" else make(model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recompute", [False, True])
@EVERY
def test_compiles_as_one_graph(name, recompute):
    """The graph is captured and run as it is; a compiler of C++ is not asked for."""
    model = make(name)
    inputs, targets = batch(name)
    loss, grads = gradients(copy.deepcopy(model), inputs, targets)
    if recompute and name != "convnet":
        models.checkpoint_activations(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_loss = compiled(inputs, targets)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss.detach(), loss)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[key])


@pytest.mark.parametrize(
    ("name", "source", "keys", "told"),
    [
        ("gpt", PICTURES, {}, "takes tokens"),
        ("mlp", TEXT, {}, "samples of numbers"),
        ("convnet", TEXT, {}, "pictures"),
        ("convnet", SimpleNamespace(vocab=0, classes=2, sample_shape=(4,)), {}, "pictures"),
        ("gpt", TEXT, {"heads": 5}, "model.heads = 5 does not divide model.width = 32"),
        ("gpt", TEXT, {"options": {"tide": 1}}, "model.options.tide"),
        ("gpd", TEXT, {}, "did you mean gpt?"),
        ("own_model:fails", TEXT, {}, "'own_model:fails' raised ValueError: ranks differ"),
        ("own_model:wrong", TEXT, {}, "it returned a int, not a torch.nn.Module"),
    ],
)
def test_faults_are_one_line(tmp_path, monkeypatch, name, source, keys, told):
    (tmp_path / "own_model.py").write_text(
        "def fails(config, source):\n    raise ValueError('ranks differ')\n"
        "def wrong(config, source):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=re.escape(told)) as caught:
        make(name, source, **keys)
    assert "\n" not in str(caught.value)


def test_own_model(tmp_path, monkeypatch):
    (tmp_path / "own_linear.py").write_text(
        "from torch import nn\n"
        "def build(config, source, *, scale=1):\n"
        "    return nn.Linear(config.width, scale * source.classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    model = make("own_linear:build", TEXT, options={"scale": 2})
    assert model.weight.shape == (100, 32)
