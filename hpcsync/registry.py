"""Names to factories: built-in members of a family, and users' own by ``package.module:name``.

A family (models, data) keeps a table of its members as ``module:attribute`` strings, so that a
member's imports (scikit-learn, h5py) are paid for only when it is chosen.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcsync.errors import ConfigError, DataError, HpcsyncError, ModelError, UserError
from hpcsync.wording import suggest

Factory = Callable[..., Any]

_ERRORS: dict[str, type[UserError]] = {
    "model": ModelError,
    "data": DataError,
    "compress": ConfigError,
}
_KEYS = {"compress": "codec"}  # the deck's key of a family; else ``name``


def resolve(kind: str, name: str, builtins: Mapping[str, str]) -> Factory:
    """The factory that ``name`` stands for.

    ``kind`` is the deck's section, ``"model"``, ``"data"`` or ``"compress"``: messages name its key
    ``KIND.name`` (``compress.codec``), and errors are of the section's kind, one line each.
    ``builtins`` maps short names to ``module:attribute``. Any other name must be such a pair; the
    current directory is searched after all that is installed.
    """
    error = _ERRORS[kind]
    key = f"{kind}.{_KEYS.get(kind, 'name')}"
    target = builtins.get(name)
    if target is None and ":" not in name:
        raise error(
            f"{key}: unknown name {name!r}{suggest(name, builtins)}; use one of "
            f"{', '.join(sorted(builtins))}, or your own as 'package.module:name'"
        )
    where = f"{key} = {name!r}"
    module_name, _, attribute = (target or name).partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise error(f"{where}: write your own as 'package.module:name'")
    module = _import(where, module_name, error)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [entry for entry in dir(found) if not entry.startswith("_")]
            raise error(f"{where}: {module_name} has no {part!r}{suggest(part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise error(f"{where}: it is a {type(found).__name__}, not something that can be called")
    factory: Factory = found
    return factory


def call(
    kind: str, name: str, factory: Factory, *args: Any, options: Mapping[str, Any], **given: Any
) -> Any:
    """``factory(*args, **given, **options)``, whatever goes wrong told as the deck's error.

    ``options`` is the deck's table ``KIND.options``; its keys are checked against the factory's
    signature first. An exception of the factory becomes a ``ModelError`` or ``DataError`` that
    names it, its place and the exception, which is chained. Errors of hpcsync pass as they are.
    """
    error = _ERRORS[kind]
    _check_options(kind, name, factory, options, given, error)
    try:
        return factory(*args, **given, **options)
    except HpcsyncError:
        raise
    except Exception as exc:
        raise error(f"{kind}.name = {name!r} raised {_describe(exc, factory)}") from exc


def _import(where: str, module_name: str, error: type[UserError]) -> Any:
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        # Last, so that a stray random.py beside the deck does not hide the library's.
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except HpcsyncError:
        raise
    except ModuleNotFoundError as exc:
        # Only the module itself, or a package above it, may be the user's misspelling.
        if exc.name and (module_name + ".").startswith(exc.name + "."):
            raise error(
                f"{where}: there is no module {exc.name!r}; install it, or start the job in the "
                f"folder that holds it (now {here})"
            ) from exc
        raise error(f"{where}: importing {module_name} raised {_describe(exc)}") from exc
    except Exception as exc:
        raise error(f"{where}: importing {module_name} raised {_describe(exc)}") from exc


def _check_options(
    kind: str,
    name: str,
    factory: Factory,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    error: type[UserError],
) -> None:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    keyword_only = [
        key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in given
    ]
    for key in options:
        if key not in keyword_only:
            known = ", ".join(sorted(keyword_only)) or "none"
            raise error(
                f"{kind}.options.{key}: {name!r} takes no such option"
                f"{suggest(key, keyword_only)}; it takes: {known}"
            )


def _describe(exc: BaseException, factory: Factory | None = None) -> str:
    """Type, first line and place: the last frame in the factory's own file, or the last of all."""
    frames = traceback.extract_tb(exc.__traceback__)
    own = None
    if factory is not None:
        code = getattr(inspect.unwrap(factory), "__code__", None)
        own = getattr(code, "co_filename", None)
    frame = next((f for f in reversed(frames) if f.filename == own), frames[-1])
    text = str(exc).strip().splitlines()
    message = f"{type(exc).__name__}: {text[0]}" if text else type(exc).__name__
    if isinstance(exc, SyntaxError) and exc.filename:
        return message
    return f"{message} ({Path(frame.filename).name}:{frame.lineno})"
