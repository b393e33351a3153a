# SPDX-License-Identifier: Apache-2.0
"""Lines for people and programs, on streams that may be closed, full or gone.

What is printed never decides what becomes of a guest: an output that takes nothing any more is
given up, and the command goes on to its end and to the exit code that tells the truth.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO

__all__ = ["hold_standard_descriptors", "write_line"]


def write_line(text: str, stream: TextIO | None, *, end: str = "\n") -> None:
    """Write and flush. Never raises for the stream's sake: one that fails gets the null device in
    its place, and unless its reader just went away a line on stderr tells that once."""
    if stream is None:
        return
    try:
        print(text, file=stream, end=end, flush=True)
    except BrokenPipeError:
        _give_up(stream)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        _give_up(stream)
        if stream is not sys.stderr:
            write_line(f"vmth: warning: the output is lost from here on: {error}", sys.stderr)


def _give_up(stream: TextIO) -> None:
    """What stays in its buffer goes nowhere, also at the interpreter's end."""
    with contextlib.suppress(OSError, ValueError):
        _null_device_at(stream.fileno())


def _null_device_at(fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == fd:
        os.set_inheritable(fd, True)
        return
    os.dup2(null, fd)
    os.close(null)


def hold_standard_descriptors() -> None:
    """Of stdin, stdout and stderr those that the caller has closed become the null device: else the
    next file or socket that is opened is taken for them. A character that the terminal's encoding
    has not is written as its number."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(fd)
        except OSError:
            _null_device_at(fd)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
