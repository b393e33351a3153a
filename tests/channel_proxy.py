# SPDX-License-Identifier: Apache-2.0
"""A relay between two sockets: delivers in random small pieces, damages a page on the way."""

from __future__ import annotations

import random
import socket
import struct
import threading

__all__ = ["PageProxy"]

_HEADER = struct.Struct("<IBBHIHHQIIIIQQQ")
_DESC = struct.Struct("<QIBBH")
_PAGES = 1
_NORMAL = 1


def _read(sock: socket.socket, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        piece = sock.recv(nbytes - len(data))
        if not piece:
            break
        data += piece
    return bytes(data)


class PageProxy:
    """Stands between ``near`` (a sender's peer) and ``far`` (a receiver's), which it owns."""

    def __init__(
        self, near: socket.socket, far: socket.socket, damage: set[tuple[int, int]], seed: int
    ) -> None:
        self._sockets = (near, far)
        self._damage = damage  #: shared with the test: (block, page), taken out when done
        self._random = random.Random(seed)
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._packets, near, far)),
            threading.Thread(target=self._guarded, args=(self._bytes, far, near)),
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _guarded(relay: object, source: socket.socket, target: socket.socket) -> None:
        assert callable(relay)
        try:
            relay(source, target)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # an end went away: the other one hears it

    def _packets(self, source: socket.socket, target: socket.socket) -> None:
        while len(header := _read(source, _HEADER.size)) == _HEADER.size:
            fields = _HEADER.unpack(header)
            kind, block, desc_bytes, payload_bytes = fields[1], fields[3], fields[8], fields[9]
            descs = _read(source, desc_bytes)
            payload = bytearray(_read(source, payload_bytes))
            if kind == _PAGES:
                self._flip(block, descs, payload)
            self._in_pieces(target, header + descs + payload)

    def _flip(self, block: int, descs: bytes, payload: bytearray) -> None:
        runs = [(page, n) for page, n, form, _, _ in _DESC.iter_unpack(descs) if form == _NORMAL]
        pages = [page + i for page, n in runs for i in range(n)]
        for index, page in enumerate(pages):
            if (block, page) in self._damage:
                self._damage.discard((block, page))
                payload[index * (len(payload) // len(pages))] ^= 0x55

    def _bytes(self, source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(4096):
            self._in_pieces(target, data)

    def _in_pieces(self, target: socket.socket, data: bytes) -> None:
        at = 0
        while at < len(data):
            size = self._random.choice((1, 7, 64, 1000, 65536))
            target.sendall(data[at : at + size])
            at += size

    def close(self) -> None:
        for sock in self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # gone already
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()
