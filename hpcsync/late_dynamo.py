"""torch's compiler, imported when somebody compiles: other jobs start in two thirds of the time.

Every optimizer of ``torch.optim`` imports the whole of ``torch._dynamo`` to mark where a compiled
program would have to stop. That is more than a third of the modules of a training process, which
its ranks read at the start from a file system that they share.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

NAME = "torch._dynamo"


def postpone() -> None:
    """Put a stand-in for ``torch._dynamo`` where imports find it, until more of it is asked for.

    The marks do nothing outside a compiled program, here as in torch. Whatever else is asked of
    the stand-in, submodules too, imports the real package in its place. Does nothing where that is
    imported already.
    """
    import torch

    if NAME in sys.modules:
        return
    spec = importlib.machinery.PathFinder.find_spec(NAME, torch.__path__)
    if spec is not None:
        sys.modules[NAME] = _StandIn(spec)


def loaded() -> types.ModuleType | None:
    """The real package, if it is imported."""
    found = sys.modules.get(NAME)
    return None if isinstance(found, _StandIn) else found


class _StandIn(types.ModuleType):
    """What the optimizers need of ``torch._dynamo``; the rest is the real one's."""

    def __init__(self, spec: importlib.machinery.ModuleSpec) -> None:
        super().__init__(NAME, __doc__)
        self.__spec__, self.__file__ = spec, spec.origin

    def __getattr__(self, name: str) -> Any:
        # Those who look through all modules ask each for such names. Only an import of a
        # submodule asks for the path.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(f"module {NAME!r} has no attribute {name!r} yet")
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
        return getattr(importlib.import_module(NAME), name)

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Outside a compiled program: nothing."""

    @staticmethod
    def disable(
        fn: Callable[..., Any], recursive: bool = True, **options: Any
    ) -> Callable[..., Any]:
        """Keep ``fn`` out of compiled programs, from when there may be one."""
        kept_out: Callable[..., Any] | None = None

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal kept_out
            if kept_out is None and (real := loaded()) is not None:
                kept_out = real.disable(fn, recursive, **options)
            return (kept_out or fn)(*args, **kwargs)

        return call
