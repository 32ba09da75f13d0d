"""Names to factories: what is found, and the one line for what is not."""

from __future__ import annotations

import re

import pytest

from hpcsync import registry
from hpcsync.errors import DataError, ModelError, UserError

BUILTINS = {"gpt": "collections:OrderedDict", "mlp": "collections:Counter"}


def test_builtin_and_own(tmp_path, monkeypatch):
    import collections

    assert registry.resolve("model", "gpt", BUILTINS) is collections.OrderedDict
    (tmp_path / "own_factories.py").write_text("class A:\n    @staticmethod\n    def b(): ...\n")
    monkeypatch.chdir(tmp_path)
    assert registry.resolve("data", "own_factories:A.b", BUILTINS).__name__ == "b"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gtp", "unknown name 'gtp'; did you mean gpt?; use one of gpt, mlp"),
        ("zzz", "unknown name 'zzz'; use one of gpt, mlp"),
        ("", "unknown name ''"),
        ("broken_a:", "package.module:name"),
        (":build", "package.module:name"),
        ("..up:build", "package.module:name"),
        ("nowhere.deep:build", "there is no module 'nowhere'"),
        ("broken_a:build", "importing broken_a raised ValueError: no (broken_a.py:2)"),
        ("broken_b:build", "importing broken_b raised ModuleNotFoundError"),
        ("broken_c:build", "importing broken_c raised SyntaxError"),
        ("sound:buidl", "sound has no 'buidl'; did you mean build?"),
        ("sound:number", "it is a int"),
    ],
)
def test_faults_are_one_line(tmp_path, monkeypatch, name, told):
    (tmp_path / "broken_a.py").write_text("\nraise ValueError('no\\nmore')\n")
    (tmp_path / "broken_b.py").write_text("import not_installed_at_all\n")
    (tmp_path / "broken_c.py").write_text("def build(:\n")
    (tmp_path / "sound.py").write_text("def build(): ...\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    for kind, error in (("model", ModelError), ("data", DataError)):
        with pytest.raises(error, match=re.escape(told)) as caught:
            registry.resolve(kind, name, BUILTINS)
        assert str(caught.value).startswith(f"{kind}.name")
        assert "\n" not in str(caught.value)


def factory(config, *, context, depth=1):
    if depth == 2:
        raise RuntimeError("too deep\nby far")
    if depth == 3:
        raise UserError("as it is")
    if depth == 4:
        return int("x" * context)
    return config, context, depth


def test_options_reach_the_factory():
    assert registry.call("model", "f", factory, 1, options={"depth": 5}, context=2) == (1, 2, 5)
    assert registry.call("model", "f", dict, options={"any": 1}) == {"any": 1}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dept": 1}, "model.options.dept: 'f' takes no such option; did you mean depth?"),
        ({"config": 1}, "model.options.config: 'f' takes no such option"),
        ({"context": 1}, "model.options.context: 'f' takes no such option"),
        ({"depth": 2}, "'f' raised RuntimeError: too deep (test_data_registry.py:"),
        ({"depth": 4}, "'f' raised ValueError: invalid literal"),
    ],
)
def test_call_tells_what_went_wrong(options, told):
    with pytest.raises(ModelError, match=re.escape(told)) as caught:
        registry.call("model", "f", factory, 1, options=options, context=2)
    assert "\n" not in str(caught.value)
    if "raised" in told:
        assert isinstance(caught.value.__cause__, RuntimeError | ValueError)


def test_errors_of_hpcsync_pass():
    with pytest.raises(UserError, match=r"^as it is$"):
        registry.call("model", "f", factory, 1, options={"depth": 3}, context=2)
