# SPDX-License-Identifier: Apache-2.0
"""How vmth starts a process of its own code: with the vmth that it is, wherever that lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["module_command"]


def module_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of ``python -m module arguments``: the same interpreter, our
    package in front of any other, and no module of the working directory."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": path}
