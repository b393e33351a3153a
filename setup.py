# SPDX-License-Identifier: Apache-2.0
"""The native build only; everything else is in pyproject.toml.

csrc/core, csrc/sys and csrc/guest become static libraries without Python; the Cython modules and
the one pybind11 module link them. VMTH_WERROR=1 turns warnings into errors (CI); no -O and no
-march here, so that CFLAGS decide (a sanitizer build's -O1 stays).
"""

import os
from glob import glob

import numpy
from Cython.Build import cythonize
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup

# The sources of a library or module compile side by side.
ParallelCompile("VMTH_BUILD_JOBS", default=min(os.cpu_count() or 1, 4)).install()

INCLUDE = ["csrc/include", "csrc"]
HEADERS = sorted(
    glob("csrc/**/*.h", recursive=True)
    + glob("csrc/**/*.hpp", recursive=True)
    + glob("vmth/_native/*.hpp")
)
WERROR = ["-Werror"] if os.environ.get("VMTH_WERROR") == "1" else []
WARN = ["-Wall", "-Wextra", "-Wshadow", "-Wvla", *WERROR]
C_FLAGS = [
    "-std=gnu11",
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
    "-Wconversion",
    "-Wstrict-prototypes",
]
# After the static libraries, which need it; a module that calls none of it does not load it.
LINK = ["-pthread", "-Wl,--as-needed", "-lzstd"]


def c_library(name: str, pattern: str) -> tuple[str, dict[str, object]]:
    sources = sorted(glob(pattern, recursive=True))
    return name, {
        "sources": sources,
        "include_dirs": INCLUDE,
        "cflags": [*C_FLAGS, *WARN],
        "obj_deps": {"": HEADERS},
    }


LIBRARIES = [
    library
    for library in (
        c_library("vmth_guest", "csrc/guest/*.c"),
        c_library("vmth_sys", "csrc/sys/*.c"),
        c_library("vmth_core", "csrc/core/**/*.c"),
    )
    if library[1]["sources"]
]
LIBRARY_SOURCES = [source for _, info in LIBRARIES for source in info["sources"]]


# Generated code does no work of its own: it need not be optimized, which takes most of a build. Who
# names an -O in CFLAGS means all code.
GENERATED = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O1", "-g0"]


def cython_module(path: str) -> Extension:
    # Cython's own output does not pass -Wconversion and -Wshadow; ours does.
    return Extension(
        path.removesuffix(".pyx").replace("/", "."),
        [path],
        include_dirs=[*INCLUDE, numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        extra_compile_args=["-fvisibility=hidden", "-pthread", *GENERATED, *WERROR],
        extra_link_args=LINK,
        depends=[*LIBRARY_SOURCES, *HEADERS],
    )


def xfer_module() -> list[Extension]:
    if not os.path.exists("vmth/_native/_xfer.cpp"):
        return []
    return [
        Pybind11Extension(
            "vmth._native._xfer",
            [*sorted(glob("vmth/_native/_xfer*.cpp")), *sorted(glob("csrc/xfer/*.cpp"))],
            include_dirs=[*INCLUDE, "vmth/_native"],
            cxx_std=17,
            extra_compile_args=["-pthread", *WARN],
            extra_link_args=LINK,
            depends=[*LIBRARY_SOURCES, *HEADERS],
        )
    ]


setup(
    libraries=LIBRARIES,
    ext_modules=[
        *cythonize(
            [cython_module(path) for path in sorted(glob("vmth/_native/*.pyx"))],
            build_dir="build/cython",
            compiler_directives={"language_level": "3"},
        ),
        *xfer_module(),
    ],
)
