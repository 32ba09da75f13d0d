"""A state as tensors by name and a skeleton that JSON can hold; nothing in it can run code.

A state is a tree of dicts with text keys, lists and tuples; its leaves are torch tensors, NumPy
arrays, int, float, str, bool and None. In the skeleton JSON's own values stand for themselves, and
an object with one of these keys for what JSON lacks:

    {"$tensor": name}  {"$array": name}  {"$float": the 64 bits in hex}  {"$tuple": [...]}
    {"$dict": [[key, value], ...]}   a dict with a key that begins with $

A tensor's name is the way to it in the tree: ``optimizer/exp_avg/blocks.0.attn.weight``.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, DamagedError
from .layout import MAX_DIMS, SIZES, TensorMeta

MAX_DEPTH = 32
_MAX_NAME = 4096  # bytes
_ESCAPED = re.compile("[%/\x00-\x1f\x7f\ud800-\udfff]")
_DTYPES: dict[torch.dtype, str] = {
    getattr(torch, name): name for name in SIZES if hasattr(torch, name)
}


class Flat(NamedTuple):
    """A tree in two parts.

    Attributes:
        skeleton: values for JSON.
        tensors: by name, in the order of the tree; they share memory with the tree's.
    """

    skeleton: Any
    tensors: dict[str, Tensor]


def dtype_name(dtype: torch.dtype) -> str | None:
    """The dtype's name in checkpoints; None if it cannot be stored."""
    return _DTYPES.get(dtype)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name.

    Raises:
        CheckpointError: the installed torch lacks it.
    """
    found = getattr(torch, name, None) if name in SIZES else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"dtype {name}: torch {torch.__version__} has no such; update torch")
    return found


def meta(name: str, tensor: Tensor) -> TensorMeta:
    """What a tensor is without its values."""
    return TensorMeta(name, _DTYPES[tensor.dtype], tuple(tensor.shape))


def metas(tensors: Mapping[str, Tensor]) -> list[TensorMeta]:
    """``meta`` of each."""
    return [meta(name, tensor) for name, tensor in tensors.items()]


def component(key: str) -> str:
    """A key as a part of a name: no slash, nothing that HDF5 takes for another path."""
    if key in ("", "."):
        return "%" if not key else "%2E"
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", key)


def flatten(tree: Any, prefix: str = "") -> Flat:
    """Take a tree apart.

    Args:
        prefix: of the tensors' names, with its slash: ``ranks/3/``.

    Raises:
        CheckpointError: a value that cannot be stored, with its place.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise _refused(path, f"more than {MAX_DEPTH} levels")
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, Tensor | np.ndarray):
            kind = "$tensor" if isinstance(value, Tensor) else "$array"
            return {kind: _keep(tensors, prefix, path, value)}
        if isinstance(value, np.generic):
            return walk(value.item(), path)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": _bits(value)}
        if isinstance(value, list | tuple):
            items = [walk(item, (*path, str(index))) for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, Mapping):
            return _object([(key, walk(value[key], (*path, _key(path, key)))) for key in value])
        raise _refused(path, f"a {type(value).__name__}")

    return Flat(walk(tree, ()), tensors)


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a tree together.

    Raises:
        DamagedError: the skeleton is none, or names a tensor that is not there.
    """
    return _build(skeleton, lambda name: _found(tensors, name), 0)


def names(skeleton: Any) -> list[str]:
    """The tensors that a skeleton names, in its order.

    Raises:
        DamagedError: it is no skeleton.
    """
    found: list[str] = []

    def note(name: str) -> Tensor:
        found.append(name)
        return torch.empty(0)

    _build(skeleton, note, 0)
    return found


def select(skeleton: Any, keys: Iterable[str]) -> Any:
    """A skeleton of the uppermost dict with these keys alone, as far as they are there."""
    wanted = set(keys)
    if isinstance(skeleton, dict) and set(skeleton) == {"$dict"}:
        return {"$dict": [item for item in skeleton["$dict"] if item[0] in wanted]}
    return {key: value for key, value in skeleton.items() if key in wanted}


def _keep(
    tensors: dict[str, Tensor], prefix: str, path: tuple[str, ...], value: Tensor | Any
) -> str:
    name = prefix + "/".join(component(key) for key in path)
    if isinstance(value, np.ndarray):
        value = _of_array(path, value)
    value = value.detach()
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise _refused(path, f"a tensor of layout {value.layout} on {value.device}")
    if value.dtype not in _DTYPES:
        raise _refused(path, f"dtype {value.dtype}")
    if value.ndim > MAX_DIMS:
        raise _refused(path, f"more than {MAX_DIMS} dimensions")
    if not path or len(name.encode()) > _MAX_NAME:
        raise _refused(path, f"a tensor needs a name, of at most {_MAX_NAME} bytes")
    tensors[name] = value.resolve_conj().resolve_neg()
    return name


def _of_array(path: tuple[str, ...], array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind not in "biufc":
        raise _refused(path, f"a NumPy array of dtype {array.dtype}")
    plain = np.array(
        array,
        dtype=array.dtype.newbyteorder("="),
        order="C",
        copy=None if array.flags.writeable else True,
    )
    try:
        return torch.from_numpy(plain)
    except TypeError:
        raise _refused(path, f"a NumPy array of dtype {array.dtype}") from None


def _key(path: tuple[str, ...], key: object) -> str:
    if not isinstance(key, str):
        raise _refused(path, f"the key {key!r}, which is no text")
    return key


def _object(items: list[tuple[str, Any]]) -> Any:
    if any(key.startswith("$") for key, _ in items):
        return {"$dict": [list(item) for item in items]}
    return dict(items)


def _bits(value: float) -> str:
    return struct.pack(">d", value).hex()


def _refused(path: tuple[str, ...], what: str) -> CheckpointError:
    return CheckpointError(f"state {'/'.join(path) or '(root)'}: cannot be stored: {what}")


def _found(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return tensors[name]
    except KeyError:
        raise DamagedError(f"manifest.json: tensor {name[:200]!r} is missing") from None


def _build(node: Any, take: Callable[[str], Tensor], depth: int) -> Any:
    if depth > 2 * MAX_DEPTH + 2:
        raise DamagedError("manifest.json: a state of too many levels")
    if isinstance(node, list):
        return [_build(item, take, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    key = next((key for key in node if key.startswith("$")), None)
    if key is None:
        return {name: _build(item, take, depth + 1) for name, item in node.items()}
    if len(node) == 1:
        made = _special(key, node[key], take, depth)
        if made is not _NOTHING:
            return made
    raise DamagedError(f"manifest.json: {key[:40]!r} is not understood in a state")


_NOTHING = object()


def _special(key: str, value: Any, take: Callable[[str], Tensor], depth: int) -> Any:
    """What one of the objects with a ``$`` stands for; ``_NOTHING`` if it is malformed."""
    if key == "$tensor" and isinstance(value, str):
        return take(value)
    if key == "$array" and isinstance(value, str):
        return _array(value, take(value))
    if key == "$float" and isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value):
        return struct.unpack(">d", bytes.fromhex(value))[0]
    if key == "$tuple" and isinstance(value, list):
        return tuple(_build(item, take, depth + 1) for item in value)
    if key == "$dict" and isinstance(value, list) and all(map(_is_pair, value)):
        return {name: _build(item, take, depth + 1) for name, item in value}
    return _NOTHING


def _array(name: str, tensor: Tensor) -> Any:
    try:
        return tensor.numpy()
    except TypeError:
        raise DamagedError(f"manifest.json: {name[:200]!r} is no NumPy array") from None


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
