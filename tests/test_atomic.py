# SPDX-License-Identifier: Apache-2.0
"""A file that appears under its name only when it is whole."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from vmth.atomic import AtomicFile
from vmth.errors import RefusedError


@pytest.fixture(params=["unnamed", "named"])
def filesystem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that has O_TMPFILE, and one that has not."""
    kind: str = request.param
    real = os.open

    def without(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *rest, **named)

    if kind == "named":
        monkeypatch.setattr(os, "open", without)
    return kind


@pytest.mark.usefixtures("filesystem")
class TestAtomicFile:
    def test_it_appears_when_it_is_published(self, tmp_path: Path) -> None:
        path = tmp_path / "image"
        with AtomicFile(path) as file:
            file.write(b"some")
            file.write(memoryview(b" bytes"))
            assert not path.exists()
            assert Path(file.readable).read_bytes() == b"some bytes"
            file.publish()
            assert path.read_bytes() == b"some bytes"
            file.publish()
        assert os.listdir(tmp_path) == ["image"]
        assert path.stat().st_mode & 0o777 == 0o600

    def test_it_never_appears_when_it_is_not(self, tmp_path: Path) -> None:
        with AtomicFile(tmp_path / "image") as file:
            file.write(b"half")
        assert os.listdir(tmp_path) == []

    def test_an_existing_file_is_refused_and_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "image"
        path.write_bytes(b"old")
        with pytest.raises(RefusedError, match="exists; --force replaces it"):
            AtomicFile(path)
        path.unlink()
        with AtomicFile(path) as file:
            file.write(b"new")
            path.write_bytes(b"came meanwhile")
            with pytest.raises(RefusedError, match="exists"):
                file.publish()
        assert path.read_bytes() == b"came meanwhile" and os.listdir(tmp_path) == ["image"]

    def test_an_existing_file_is_replaced_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "image"
        path.write_bytes(b"old")
        with AtomicFile(path, replace=True) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
            file.publish()
        assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["image"]
        with AtomicFile(path, replace=True) as file:
            file.write(b"half")
        assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["image"]

    def test_a_name_of_the_greatest_length(self, tmp_path: Path) -> None:
        path = tmp_path / ("n" * 255)
        for _ in range(2):
            with AtomicFile(path, replace=True) as file:
                file.publish()
        assert os.listdir(tmp_path) == [path.name]

    @pytest.mark.parametrize("replace", [False, True])
    def test_what_is_no_file_is_not_replaced(self, tmp_path: Path, replace: bool) -> None:
        pipe, listening, link = (tmp_path / name for name in ("pipe", "socket", "link"))
        os.mkfifo(pipe)
        link.symlink_to(pipe)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(listening))
            for path, kind in ((pipe, "pipe"), (link, "pipe"), (listening, "socket")):
                with pytest.raises(RefusedError, match=f"{path} is a {kind}, allowed is a file"):
                    AtomicFile(path, replace=replace)
            with pytest.raises(RefusedError, match="/dev/null is a device, allowed is a file"):
                AtomicFile(Path("/dev/null"), replace=replace)
        assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()

    def test_what_became_something_else_meanwhile_is_not_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "image"
        with AtomicFile(path, replace=True) as file:
            os.mkfifo(path)
            with pytest.raises(RefusedError, match="is a pipe"):
                file.publish()
        assert os.listdir(tmp_path) == ["image"] and stat.S_ISFIFO(path.stat().st_mode)

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_link_stays_and_its_target_is_replaced(self, tmp_path: Path, exists: bool) -> None:
        target, link = tmp_path / "there" / "image", tmp_path / "link"
        target.parent.mkdir()
        if exists:
            target.write_bytes(b"old")
        link.symlink_to(target)
        with AtomicFile(link, replace=True) as file:
            file.write(b"new")
            file.publish()
        assert link.is_symlink() and target.read_bytes() == b"new" and not target.is_symlink()
        assert os.listdir(target.parent) == ["image"]

    def test_a_link_to_itself(self, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(link)
        with pytest.raises(RefusedError, match="exists"):
            AtomicFile(link)

    def test_places_that_cannot_be(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match="is a directory"):
            AtomicFile(tmp_path, replace=True)
        with pytest.raises(RefusedError, match="is no directory"):
            AtomicFile(tmp_path / "none" / "image")
        with pytest.raises(RefusedError, match="cannot be made"):
            AtomicFile(Path("/proc/self/image"))
