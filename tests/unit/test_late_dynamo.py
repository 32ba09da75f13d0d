"""torch's compiler is imported by those who compile, and then works as ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

OPTIMIZE = """
import sys
import torch
from hpcsync import late_dynamo

def whole():
    return "torch._dynamo.symbolic_convert" in sys.modules

late_dynamo.postpone()
weight = torch.nn.Parameter(torch.ones(3))
def step(optimizer):
    optimizer.zero_grad()
    (weight * weight).sum().backward()
    optimizer.step()
optimizer = torch.optim.AdamW([weight], lr=0.1)
step(optimizer)
assert not whole()
"""
TRAIN = """
import sys
from hpcsync.train import command
words = ["model.layers=1", "model.width=32", "model.heads=2", "model.context=16", "train.steps=2"]
words += ["train.global_batch=2", "data.options={max_mb=0.5}", "--out", sys.argv[1]]
assert command([*words, *sys.argv[2:]]) == 0
assert ("torch._dynamo.symbolic_convert" in sys.modules) == ("train.compile=true" in sys.argv)
"""


def python(code: str, *words: str) -> None:
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_training_does_without(tmp_path: Path) -> None:
    python(TRAIN, str(tmp_path / "run"))


@pytest.mark.parametrize(
    "more",
    [
        pytest.param("import torch._dynamo.config\nassert whole()", id="a submodule"),
        pytest.param(
            # What looks at all modules does not count as asking.
            "import importlib.util, inspect\n"
            "inspect.getmodule(step.__code__)\n"
            "assert importlib.util.find_spec('torch._dynamo').name == 'torch._dynamo'\n"
            "import torch._dynamo\n"
            "assert not whole()\n"
            "assert torch._dynamo.is_compiling() is False\n"
            "assert whole()\n"
            "assert late_dynamo.loaded() is sys.modules['torch._dynamo']\n"
            "late_dynamo.postpone()\n"
            "assert late_dynamo.loaded() is sys.modules['torch._dynamo']",
            id="an attribute",
        ),
        pytest.param(
            # A compiled program stops at what torch keeps out, also if that ran before.
            "graphs = []\n"
            "def backend(graph, inputs):\n"
            "    graphs.append(graph)\n"
            "    return graph.forward\n"
            "@torch.compile(backend=backend)\n"
            "def both(x):\n"
            "    x = x + 1\n"
            "    optimizer.zero_grad()\n"
            "    return x * 2\n"
            "assert both(torch.ones(2)).tolist() == [4.0, 4.0]\n"
            "assert len(graphs) == 2, len(graphs)\n"
            "assert weight.grad is None",
            id="a graph break",
        ),
    ],
)
def test_what_asks_for_more_gets_the_real_one(more: str) -> None:
    python(OPTIMIZE + more)
