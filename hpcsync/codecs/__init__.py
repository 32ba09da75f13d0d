"""Codecs: how pieces of gradient become fewer bytes, one codec a module.

codec = codecs.build("int8", Settings())
used = codec.encode(values, out, store, Moment())
"""

from __future__ import annotations

from collections.abc import Mapping

from ..device import Device, kernels
from ..errors import ConfigError
from ..registry import resolve
from .base import Codec, Matrix, Moment, PieceCodec, Settings, Store, SumCodec
from .gpu.forms import require

__all__ = [
    "BUILTINS",
    "Codec",
    "Matrix",
    "Moment",
    "PieceCodec",
    "Settings",
    "Store",
    "SumCodec",
    "build",
]

BUILTINS: Mapping[str, str] = {
    "none": "hpcsync.codecs.none:Uncoded",
    "bf16": "hpcsync.codecs.bf16:Bf16",
    "fp16": "hpcsync.codecs.fp16:Fp16",
    "fp8": "hpcsync.codecs.fp8:Fp8",
    "int8": "hpcsync.codecs.int8:Int8",
    "int4": "hpcsync.codecs.int4:Int4",
    "onebit": "hpcsync.codecs.onebit:OneBit",
    "topk": "hpcsync.codecs.topk:TopK",
    "threshold": "hpcsync.codecs.threshold:Threshold",
    "randomk": "hpcsync.codecs.randomk:RandomK",
    "powersgd": "hpcsync.codecs.powersgd:PowerSGD",
    "int8_shared": "hpcsync.codecs.int8_shared:SharedScale",
}


def build(
    name: str, settings: Settings, *, native: bool = True, device: Device | None = None
) -> Codec:
    """The codec that ``name`` stands for: a built-in one, or ``package.module:Class``.

    Built-in classes take ``(settings, kernels)``; a user's own takes ``(settings)``.

    Args:
        native: with the native kernels where there are any, else in NumPy.
        device: that gradients are on, if not the host; ``gpu.forms`` codes them there.

    Raises:
        ConfigError: there is no such codec, it cannot be made, or it cannot code on the device.
    """
    factory = resolve("compress", name, BUILTINS)
    if name in BUILTINS:
        codec = factory(settings, kernels.load() if native else None)
    else:
        try:
            codec = factory(settings)
        except Exception as error:
            raise ConfigError(
                f"compress.codec = {name!r} raised {type(error).__name__}: {error}"
            ) from error
    if not isinstance(codec, PieceCodec | SumCodec):
        raise ConfigError(
            f"compress.codec = {name!r}: made a {type(codec).__name__}; it must be a "
            "hpcsync.codecs.PieceCodec or SumCodec"
        )
    if device is not None:
        require(codec, device)
    return codec
