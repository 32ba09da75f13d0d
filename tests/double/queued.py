"""torch on the test double: operations on device memory go to the stream that computes.

While a thread is ``with Queued(device):`` every operation on a tensor in the device's memory is
queued, backward passes and optimizers included, and its results are poison until it is done. What
asks for a value waits for the stream and is noted.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.dlpack import from_dlpack

from tests.double.device import DoubleDevice

_ASKS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class Queued(TorchDispatchMode):
    """Gives torch's work to the device's current stream.

    Attributes:
        asked: where the host waited for a value.
    """

    def __init__(self, device: DoubleDevice) -> None:
        super().__init__()
        self.device = device
        self.asked: list[str] = []

    def holds(self, value: object) -> bool:
        """Whether it is a tensor in the device's memory."""
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.numel():
            return False
        slab = self.device.machine.pool.slab_at(value.data_ptr(), value.element_size())
        return slab is not None and slab.kind in ("device", "shared")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        if not any(map(self.holds, given)):
            return func(*args, **kwargs)
        name = func.name().split(".")[0]
        if func.is_view or name in ("aten::detach", "aten::alias", "aten::_unsafe_view"):
            return func(*args, **kwargs)
        written = self._written(func, args, kwargs)
        if name in _ASKS or not all(map(self.holds, written)):
            self.asked.append("".join(traceback.format_stack(limit=12)))
            self.device.current().synchronize()
            return func(*args, **kwargs)
        later, options = tree_map(self._later, (args, kwargs))
        if written:
            self.device.current().apply(lambda: func(*later, **options))
            return self._returned(func, args, kwargs)
        made = tree_map(self._empty, func(*tree_map(_meta, args), **tree_map(_meta, kwargs)))
        outs = tree_leaves(tree_map(self._later, made))

        def work() -> None:
            results = func(*later, **options)
            for out, result in zip(outs, tree_leaves(results), strict=True):
                if isinstance(out, Tensor):
                    out.copy_(result)

        self.device.current().apply(work)
        return made

    def _later(self, value: Any) -> Any:
        """An argument as queued work takes it: autograd has counted the change already; what the
        host has may be another by then."""
        if not isinstance(value, Tensor):
            return value
        return value.data if self.holds(value) else value.clone()

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[Any]:
        found = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                inside = args[place] if place < len(args) else kwargs.get(argument.name)
                found += [each for each in tree_leaves(inside) if isinstance(each, Tensor)]
        return [each for each in found if each.numel()]

    def _returned(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation in place returns: its own arguments."""
        found = []
        for result in func._schema.returns:
            names = result.alias_info.before_set if result.alias_info else set()
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.before_set & names:
                    found.append(args[place] if place < len(args) else kwargs[argument.name])
        if not func._schema.returns:
            return None
        assert len(found) == len(func._schema.returns), f"{func} returns something new"
        return found[0] if len(found) == 1 else tuple(found)

    def _empty(self, meta: Any) -> Any:
        """Poisoned device memory for a result."""
        if not isinstance(meta, Tensor):
            return meta
        extent = 1 + sum((n - 1) * s for n, s in zip(meta.shape, meta.stride(), strict=True))
        memory = self.device.empty(max(extent, 1) * meta.element_size())
        flat = from_dlpack(memory)[: max(extent, 1) * meta.element_size()].view(meta.dtype)
        return flat.as_strided(meta.shape, meta.stride(), storage_offset=flat.storage_offset())


def _meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def placed(values: Tensor, device: DoubleDevice) -> Tensor:
    """A copy of a host tensor in device memory."""
    memory = from_dlpack(device.empty(max(values.numel(), 1) * values.element_size()))
    flat = memory[: values.numel() * values.element_size()].view(values.dtype)
    made = flat.as_strided(values.shape, values.contiguous().stride())
    held, target = values.detach().clone(), made.data
    device.current().apply(lambda: target.copy_(held))
    return made


def to_device(module: nn.Module, device: DoubleDevice) -> nn.Module:
    """Move a module's parameters and buffers to device memory, in place."""
    for own in module.modules():
        for param in own._parameters.values():
            if param is not None:
                with torch.no_grad():
                    param.data = placed(param.data, device)
        for name, buffer in list(own._buffers.items()):
            if buffer is not None:
                own._buffers[name] = placed(buffer, device)
    return module
