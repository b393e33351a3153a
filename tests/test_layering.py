# SPDX-License-Identifier: Apache-2.0
"""The house's rules that no compiler sees: who may import whom, where Python.h and malloc may
stand, how long a file may be. Each checker is also run on bad examples, so that it can fail."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 600
PURE = ("vmth.wire", "vmth.policy", "vmth.qemu.stream", "vmth.qemu.ram")
#: Standard modules through which I/O, time, threads or chance could enter the pure layers.
IMPURE = set(
    """asyncio builtins concurrent ctypes datetime fcntl io mmap multiprocessing os pathlib queue
    random secrets select selectors shutil signal socket socketserver ssl subprocess sys tempfile
    threading time uuid""".split()  # noqa: SIM905
)
NATIVE_FACES = (
    "vmth.kernels",
    "vmth.codec",
    "vmth.packet",
    "vmth.memory",
    "vmth.dirty",
    "vmth.channel",
    "vmth.guests",
    "vmth.qemu.ram",
    "vmth.qemu.relay",
    "vmth._native",
)
#: Layers from the ground up; a module imports only from its own layer and those below. A module of
#: the package's root that stands in no layer is a coordinator, below the command line alone.
LAYERS = [
    (
        *("vmth.errors", "vmth.types", "vmth.units", "vmth.uri", "vmth.stats", "vmth.child"),
        "vmth._native",
    ),
    (
        *("vmth.wire", "vmth.policy", "vmth.guest"),
        *("vmth.kernels", "vmth.codec", "vmth.packet", "vmth.memory", "vmth.mapped_ahead"),
    ),
    ("vmth.dirty", "vmth.channel", "vmth.journal", "vmth.events", "vmth.tuning"),
    ("vmth.guests", "vmth.precopy", "vmth.guest_throttle", "vmth.memory_pass", "vmth.rounds"),
    ("vmth",),
    ("vmth.qemu", "vmth.reuse"),
    ("vmth.cli", "vmth.demo", "vmth.__main__"),
]


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int:
    """By the longest layer entry that holds the module."""
    holding = [
        (len(package), level)
        for level, packages in enumerate(LAYERS)
        for package in packages
        if inside(module, package)
    ]
    return max(holding)[1]


def imports(source: str) -> Iterator[str]:
    """Everything that the source imports at run time, also inside functions; not for types only."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield node.module or ""
            if node.module and inside(node.module, "vmth"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo += ast.iter_child_nodes(node)


def import_faults(module: str, source: str) -> list[str]:
    faults = []
    pure = any(inside(module, package) for package in PURE)
    for name in imports(source):
        if pure and name.split(".")[0] in IMPURE:
            faults.append(f"{module} is pure and imports {name}")
        if not inside(name, "vmth") or name in ("vmth", "vmth.__version__"):
            continue
        if inside(name, "vmth._native") and not any(inside(module, face) for face in NATIVE_FACES):
            faults.append(f"{module} is no native face and imports {name}")
        if layer(name) > layer(module):
            faults.append(f"{module} (layer {layer(module)}) imports {name} (layer {layer(name)})")
    return faults


def text_faults(path: str, text: str) -> list[str]:
    faults = []
    if "Python.h" in text and not path.startswith("vmth/_native/"):
        faults.append(f"{path}: Python.h outside vmth/_native")
    if path.startswith("csrc/core/") and re.search(r"\b(m|c|re)alloc\s*\(", text):
        faults.append(f"{path}: allocates; callers of csrc/core own every buffer")
    lines = text.count("\n")
    if lines > MAX_LINES:
        faults.append(f"{path}: {lines} lines, at most {MAX_LINES}")
    return faults


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_point_downwards() -> None:
    files = sorted((ROOT / "vmth").rglob("*.py"))
    assert len(files) > 10
    assert [
        fault for path in files for fault in import_faults(module_name(path), path.read_text())
    ] == []


def test_sources_keep_the_house_rules() -> None:
    kinds = {".py", ".pyx", ".pyi", ".c", ".h", ".cpp", ".hpp", ".S"}
    files = [
        path
        for folder in ("vmth", "csrc", "tests", "bench")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in kinds and not {"build", "include"} & set(path.parts[-3:-1])
    ]
    assert len(files) > 20
    faults = []
    for path in files:
        if path != Path(__file__):
            faults += text_faults(str(path.relative_to(ROOT)), path.read_text())
    assert faults == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("vmth.wire.x", "import socket", "is pure and imports socket"),
        ("vmth.wire.x", "def f():\n    from time import monotonic", "is pure and imports time"),
        ("vmth.qemu.stream.x", "import socket", "is pure and imports socket"),
        ("vmth.qemu.stream.x", "from vmth._native import _qemu", "is no native face"),
        ("vmth.policy.x", "import os.path", "is pure and imports os.path"),
        ("vmth.session", "from vmth._native import _xfer", "is no native face"),
        ("vmth.guest", "from vmth import journal", "(layer 1) imports vmth.journal (layer 2)"),
        ("vmth.wire.x", "import vmth.session", "(layer 1) imports vmth.session (layer 4)"),
        ("vmth.channel.x", "from vmth.cli import main", "(layer 2) imports vmth.cli"),
    ],
)
def test_bad_imports_are_found(module: str, source: str, fault: str) -> None:
    assert any(fault in found for found in import_faults(module, source))


def test_good_imports_pass() -> None:
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import socket"
    assert import_faults("vmth.wire.x", typed) == []
    assert import_faults("vmth.channel.x", "from vmth._native import _xfer\nimport socket") == []
    assert import_faults("vmth.session", "from vmth import __version__, journal") == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("csrc/core/x.c", "#include <Python.h>\n"),
        ("csrc/core/x.c", "p = malloc (n);\n"),
        ("csrc/core/x.c", "p = calloc(1, n);\n"),
        ("vmth/x.py", "\n" * (MAX_LINES + 1)),
    ],
)
def test_bad_texts_are_found(path: str, text: str) -> None:
    assert len(text_faults(path, text)) == 1
    assert text_faults("vmth/_native/x.c", "#include <Python.h>\nmalloc(1);\n") == []
