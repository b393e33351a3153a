# SPDX-License-Identifier: Apache-2.0
"""A real Linux as a guest: Debian's kernel, a busybox, and two workers that write memory for ever
and check what they wrote.

Each worker keeps files in memory. In turn it reads one back, compares it with the checksum from
when it was written, and writes it anew; after each it says ``worker W ok N``, with N counting from
1. A file that differs, and whatever the kernel complains of, is on the console too.
"""

from __future__ import annotations

import re
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

__all__ = ["APPEND", "MEMORY_BYTES", "WORKERS", "fetched", "initramfs", "read_console"]

MEMORY_BYTES = 192 << 20
WORKERS = 2
APPEND = "console=ttyS0 panic=-1 quiet nowatchdog no_timer_check"
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

INIT = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /dev /work
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs -o size=64M work /work
exec /bin/busybox sh -c '
for worker in {" ".join(str(i) for i in range(WORKERS))}; do
    /bin/busybox sh /worker $worker &
done
wait
' >/dev/console 2>&1
"""

WORKER = """
alias cat="/bin/busybox cat" head="/bin/busybox head" sum="/bin/busybox sha1sum"
worker=$1 done=0
/bin/busybox mkdir /work/$worker
cd /work/$worker
for file in 0 1 2 3 4 5 6 7; do
    head -c 500000 /dev/urandom >$file
    sum <$file >$file.sum
done
while :; do
    for file in 0 1 2 3 4 5 6 7; do
        if [ "$(sum <$file)" != "$(cat $file.sum)" ]; then
            echo "worker $worker found damage in file $file"
        fi
        head -c 500000 /dev/urandom >$file
        sum <$file >$file.sum
        done=$((done + 1))
        echo "worker $worker ok $done"
    done
done
"""

#: What a kernel or a shell says when memory is not what it was.
_COMPLAINTS = re.compile(
    r"damage|\bBUG\b|Oops|panic|Call Trace|segfault|protection fault|corrupt|not found|Killed"
)


def fetched() -> Path:
    """The folder with ``vmlinuz`` and ``busybox``; the test fails where they cannot be had."""
    got = subprocess.run(
        ["sh", str(SCRIPTS / "get-linux")], stdout=subprocess.PIPE, text=True, check=False
    )
    if got.returncode:
        pytest.fail("scripts/get-linux failed; its reason is on stderr")
    return Path(got.stdout.strip())


def initramfs(busybox: bytes) -> bytes:
    """A cpio archive (the "newc" form) with the programs above."""
    files = [
        ("bin", stat.S_IFDIR | 0o755, b""),
        ("bin/busybox", stat.S_IFREG | 0o755, busybox),
        ("dev", stat.S_IFDIR | 0o755, b""),
        ("init", stat.S_IFREG | 0o755, INIT.encode()),
        ("worker", stat.S_IFREG | 0o644, WORKER.encode()),
        ("TRAILER!!!", 0, b""),
    ]
    archive = bytearray()
    for inode, (name, mode, data) in enumerate(files, start=1):
        named = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(named), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + named
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def read_console(serial: Sequence[bytes]) -> list[int]:
    """How often each worker said ok on these consoles, one after the other.

    AssertionError if one left a number out or said it twice, and for any complaint."""
    text = b"".join(serial).decode(errors="replace")
    found = _COMPLAINTS.search(text)
    assert found is None, f"the guest says: {text[max(0, found.start() - 200) : found.end() + 400]}"
    counts = [0] * WORKERS
    for line in re.findall(r"worker (\d+) ok (\d+)\r?\n", text):
        worker, number = int(line[0]), int(line[1])
        assert number == counts[worker] + 1, f"worker {worker} went from {counts[worker]} to {line}"
        counts[worker] = number
    return counts
