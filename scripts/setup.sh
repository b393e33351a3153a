# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
# What every script needs: a compiler, Python headers, a virtual environment, vmth built and
# installed into it. Sourced, with $root set to the project directory:
#
#     root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
#     . "$root/scripts/setup.sh"
#     vmth_setup             # afterwards $venv/bin/python has vmth and all its extras
#
# Nothing is done twice: the environment is kept in .venv and renewed when pyproject.toml or
# setup.py changed; vmth is built again when a source or a build flag changed. All output goes to
# stderr, so that a script's stdout is the program's own. VMTH_PYTHON names the Python to use.

venv=$root/.venv

run() {
    printf '+ %s\n' "$*" >&2
    "$@"
}

die() {
    printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
    exit 1
}

# Is $1 a Python that vmth can use (3.11 or newer)?
python_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

python_has_venv() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

python_has_headers() {
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' >/dev/null 2>&1
}

# Set $python: the first that has all it needs, else the system's, whose parts apt can add.
find_python() {
    for python in ${VMTH_PYTHON:-python3 /usr/bin/python3}; do
        if python_is_new_enough "$python" && python_has_venv "$python" \
            && python_has_headers "$python"; then
            return
        fi
    done
    for python in ${VMTH_PYTHON:-/usr/bin/python3 python3}; do
        if python_is_new_enough "$python"; then
            return
        fi
    done
    die "no Python 3.11 or newer found (tried ${VMTH_PYTHON:-python3, /usr/bin/python3}); install one or name it in VMTH_PYTHON"
}

# Does the compiler find the header $1?
compiler_finds() {
    printf '#include <%s>\n' "$1" | ${CC:-gcc} -E -x c - >/dev/null 2>&1
}

# Print the Debian names of what is missing.
missing_packages() {
    command -v gcc >/dev/null || printf 'gcc libc6-dev '
    command -v g++ >/dev/null || printf 'g++ '
    command -v make >/dev/null || printf 'make '
    compiler_finds zstd.h || printf 'libzstd-dev '
    python_has_venv "$python" || printf 'python3-venv '
    python_has_headers "$python" || printf 'python3-dev '
    # Only the tests need QEMU, and what fetches other versions; they set this before vmth_setup.
    [ -n "${VMTH_NEEDS_QEMU:-}" ] || return 0
    command -v qemu-system-x86_64 >/dev/null || printf 'qemu-system-x86 '
    command -v mmdebstrap >/dev/null || printf 'mmdebstrap '
}

# Install the packages named, by apt as root or by sudo without a password.
install_packages() {
    if ! command -v apt-get >/dev/null; then
        die "missing, by their Debian names: $*; install them and start again"
    elif [ "$(id -u)" -eq 0 ]; then
        as_root='env'
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        as_root='sudo -n env'
    else
        die "missing packages; as root: apt-get install $*"
    fi
    run $as_root apt-get update -q >&2 </dev/null
    run $as_root DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends "$@" >&2 </dev/null
}

# Build and runtime requirements and every extra but the plots of bench/, one a line.
requirements() {
    "$python" - "$root/pyproject.toml" <<'PY'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    config = tomllib.load(file)
project = config["project"]
wanted = [*config["build-system"]["requires"], *project["dependencies"]]
for name, extra in project["optional-dependencies"].items():
    wanted += extra if name != "bench" else []
print("\n".join(dict.fromkeys(wanted)))
PY
}

# Compare $1 with the text in the stamp file $2.
stamp_is() {
    [ -f "$2" ] && [ "$1" = "$(cat "$2")" ]
}

setup_environment() {
    wanted=$({ "$python" -VV; cat "$root/pyproject.toml" "$root/setup.py"; } | sha256sum)
    if "$venv/bin/python" -c 'import pip' 2>/dev/null \
        && stamp_is "$wanted" "$venv/environment.stamp"; then
        return
    fi
    run "$python" -m venv --clear "$venv" >&2
    requirements >"$venv/requirements.txt"
    run "$venv/bin/python" -m pip install -q --disable-pip-version-check \
        -r "$venv/requirements.txt" >&2 </dev/null \
        || die 'pip could not install what vmth needs; is the package index reachable?'
    printf '%s\n' "$wanted" >"$venv/environment.stamp"
}

setup_vmth() {
    flags="CC=${CC:-} CFLAGS=${CFLAGS:-} CXXFLAGS=${CXXFLAGS:-} LDFLAGS=${LDFLAGS:-}"
    strict="$flags WERROR=1"
    [ "${VMTH_WERROR:-}" != 1 ] || flags=$strict
    sources=$(cd "$root" && find csrc vmth pyproject.toml setup.py MANIFEST.in README.md \
        -name build -prune -o -name __pycache__ -prune -o -name '*.so' -o -type f -print0 \
        | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
    # What was built with warnings as errors serves those who did not ask for it as well.
    if stamp_is "$flags $sources" "$venv/vmth.stamp" \
        || stamp_is "$strict $sources" "$venv/vmth.stamp"; then
        return
    fi
    # Objects are reused only under the same flags; what was copied into build/lib never is, since a
    # file deleted from the tree would live on in the wheel.
    stamp_is "$flags" "$venv/flags.stamp" || rm -rf "$root/build"
    rm -rf "$root"/build/lib.* "$root"/build/lib "$root"/build/bdist.*
    rm -f "$venv/vmth.stamp"
    printf '%s\n' "$flags" >"$venv/flags.stamp"
    run "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps \
        --no-build-isolation --force-reinstall "$root" >&2 </dev/null
    printf '%s\n' "$flags $sources" >"$venv/vmth.stamp"
}

vmth_setup() {
    find_python
    packages=$(missing_packages)
    # shellcheck disable=SC2086 # names without spaces
    [ -z "$packages" ] || install_packages $packages
    # Two scripts may start at once (a sender and a receiver): one builds, the other waits.
    exec 9<"$root"
    ! command -v flock >/dev/null || flock 9
    setup_environment
    setup_vmth
    exec 9<&-
}
