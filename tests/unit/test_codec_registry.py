"""Codecs by name: built in, and the user's own as ``package.module:Class``."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsync import codecs
from hpcsync.codecs import PieceCodec, Settings
from hpcsync.errors import ConfigError

MODULE = """
from hpcsync.codecs import PieceCodec

NUMBER = 3


class Whole(PieceCodec):
    name = "whole"

    def capacity(self, count):
        return 4 * count

    def encode(self, values, out, store, moment):
        return 0

    def decode(self, data, out):
        pass

    def decode_add(self, data, out):
        pass


class Half(PieceCodec):
    "Not finished."


class Stranger:
    def __init__(self, settings):
        pass


class Picky(Whole):
    def __init__(self, settings):
        raise ValueError(f"no luck with {settings.options['width']}")


class Outer:
    Inner = Whole
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``own_codecs`` that can be imported."""
    (tmp_path / "own_codecs.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("name", ["own_codecs:Whole", "own_codecs:Outer.Inner"])
@pytest.mark.usefixtures("own")
def test_a_codec_of_the_users_own(name: str) -> None:
    codec = codecs.build(name, Settings(rank=7))
    assert isinstance(codec, PieceCodec)
    assert (codec.name, codec.settings.rank, codec.capacity(5)) == ("whole", 7, 20)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("int9", ("unknown", "did you mean int8", "package.module:name")),
        ("own_codecs", ("package.module:name",)),
        ("own_codecs:", ("package.module:name",)),
        (":Whole", ("package.module:name",)),
        ("no_such_module:Whole", ("no module 'no_such_module'", "install it")),
        ("own_broken:Whole", ("importing own_broken raised", "no_such_dependency")),
        ("own_codecs:Hole", ("own_codecs has no 'Hole'", "did you mean Whole")),
        ("own_codecs:NUMBER", ("is a int",)),
        ("own_codecs:Stranger", ("made a Stranger", "PieceCodec or SumCodec")),
        ("own_codecs:Half", ("TypeError", "Half", "abstract")),
        ("own_codecs:Picky", ("own_codecs:Picky", "ValueError: no luck with 3")),
    ],
)
@pytest.mark.usefixtures("own")
def test_what_is_no_codec_is_told_in_one_line(name: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        codecs.build(name, Settings(options={"width": 3}))
    text = str(caught.value)
    assert text.startswith("compress.codec")
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("name", codecs.BUILTINS)
def test_every_codec_of_the_deck_is_there(name: str) -> None:
    for native in (True, False):
        assert codecs.build(name, Settings(), native=native).name == name
