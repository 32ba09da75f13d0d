"""Standard output and errors that outlast their reader.

`| head` ends, Ctrl-C ends `| tee` at once, a disk fills up: a run that would save, or tell the
other ranks, must not end for that.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

_NAMES = ("stdout", "stderr")
_lost: dict[str, str] = {}


class _Lasting(io.FileIO):
    """A descriptor to which writing never fails."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._stream = name

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except BrokenPipeError:  # nobody reads: that is no fault
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
        except OSError as error:
            _lost.setdefault(self._stream, error.strerror or str(error))
        else:
            return written or 0
        return memoryview(data).nbytes


def last() -> None:
    """Have this process's standard output and errors outlast their readers, terminals but for."""
    for name in _NAMES:
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), write_through=True))
        elif stream is getattr(sys, f"__{name}__") and not stream.isatty():
            setattr(sys, name, _lasting(stream, name))


def _lasting(stream: Any, name: str) -> io.TextIOWrapper:
    stream.flush()
    raw = _Lasting(stream.fileno(), name)
    buffered = isinstance(stream.buffer, io.BufferedWriter)  # or PYTHONUNBUFFERED is set
    buffer: Any = io.BufferedWriter(raw) if buffered else raw
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def end() -> bool:
    """Write what is left; whether all of standard output has been written, else tells why not."""
    for name in _NAMES:
        getattr(sys, name).flush()
    if "stdout" not in _lost:
        return True
    print(
        f"hpcsync: error: standard output: {_lost['stdout']}: some of it is lost; free some space, "
        "or write it elsewhere",
        file=sys.stderr,
        flush=True,
    )
    return False
