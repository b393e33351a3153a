# SPDX-License-Identifier: Apache-2.0
"""Several local addresses carry one migration: each is used, and none that is wrong goes unseen."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listener_world import World, one_world

import vmth
from vmth.channel.pages import NativeReceiver, NativeSender
from vmth.channel.sockets import DialError, LinkOptions, dial
from vmth.errors import OptionError, UsageError
from vmth.memory import MappedBlock, address_of
from vmth.options import MigrateOptions
from vmth.types import Mapping, RamBlock
from vmth.uri import parse_endpoint

PAGE = 4096
BENCH = Path(__file__).parents[1] / "bench" / "several_links.py"


@pytest.mark.parametrize("host", ["127.0.0.1", "h.example"])
def test_a_host_needs_no_codec_for_names(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Its first use takes milliseconds, in which a source QEMU waits."""
    seen: list[object] = []

    def getaddrinfo(name: object, *_: object, **__: object) -> list[Any]:
        seen.append(name)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match="no address found"):
        dial(parse_endpoint(f"tcp:{host}:9"), LinkOptions())
    assert seen == [host.encode()]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with one_world(tmp_path) as made:
        yield made


# ---- pages over several channels -----------------------------------------------------------------


def _mapped(array: np.ndarray) -> list[MappedBlock]:
    block = RamBlock("ram", array.nbytes, 0, Mapping(address=address_of(array)))
    return [MappedBlock(block, address_of(array), array.reshape(-1))]


ROUND = st.tuples(
    st.integers(0, 2**32 - 1),  # which pages, and what they hold
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),  # how many of them are sent
    st.sampled_from([0, 1, 300_000, 4_000_000]),  # window
    st.sampled_from([0, 400_000_000]),  # bandwidth
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(channels=st.integers(1, 6), rounds=st.lists(ROUND, min_size=1, max_size=4))
def test_every_page_is_on_one_channel(
    channels: int, rounds: Sequence[tuple[int, float, int, int]]
) -> None:
    npages = 1000
    source = np.zeros((npages, PAGE), dtype=np.uint8)
    destination = np.zeros((npages, PAGE), dtype=np.uint8)
    nonzero = np.full(((npages + 63) // 64), 2**64 - 1, dtype=np.uint64)
    with (
        NativeSender(_mapped(source), PAGE, hash_seed=1) as sender,
        NativeReceiver(
            _mapped(destination), PAGE, hash_seed=1, maybe_nonzero=[nonzero], channels=channels
        ) as receiver,
    ):
        for index in range(channels):
            near, far = socket.socketpair()
            with near, far:
                sender.add_channel(near.fileno(), index)
                receiver.attach(far.fileno(), index)
        asked = 0
        for number, (seed, part, window, bandwidth_bps) in enumerate(rounds):
            rng = np.random.default_rng(seed)
            chosen = rng.random(npages) < part
            for page in np.flatnonzero(chosen):
                source[page] = rng.integers(0, 3)  # a third of them is zero
            bits = np.zeros(len(nonzero) * 64, dtype=np.bool_)
            bits[:npages] = chosen
            sender.set_window(window)
            sender.set_bandwidth(bandwidth_bps)
            words = np.packbits(bits, bitorder="little").view(np.uint64)
            for first in range(0, npages, 300):
                sender.send(0, first, min(300, npages - first), words, number)
            assert sender.barrier(number)
            asked += int(chosen.sum())
            counters = sender.counters()
            assert sum(one.pages for one in counters.channels) == asked
            assert counters.normal_pages + counters.zero_pages == asked
            assert receiver.counters().normal_pages == counters.normal_pages
            for name in ("wire_bytes", "acked_bytes", "packets"):
                total = sum(getattr(one, name) for one in counters.channels)
                assert total == getattr(counters, name)
            assert np.array_equal(source[chosen], destination[chosen])
            assert sender.digest() == receiver.digest()
        assert [one.index for one in counters.channels] == list(range(channels))


# ---- addresses -----------------------------------------------------------------------------------


def _bound(*addresses: str, channels: int = 2) -> MigrateOptions:
    return MigrateOptions(channels=channels, link=LinkOptions(source_addresses=addresses))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: _bound("10.0.0.1", "ten"),
            "source_addresses: received 'ten', allowed IP addresses",
        ),
        (lambda: _bound("", "::1"), "source_addresses: received '', allowed IP addresses"),
        (
            lambda: _bound("127.0.0.1", "127.0.0.2", channels=1),
            "source_addresses: received 2 for 1 channels, allowed at most one a channel",
        ),
        (lambda: LinkOptions(interfaces=("a" * 16,)), "interfaces: received 'aaaaaaaaaaaaaaaa'"),
        (lambda: LinkOptions(interfaces=("eth0", "")), "interfaces: received '', allowed names"),
        (
            lambda: MigrateOptions(link=LinkOptions(interfaces=("a", "b"))),
            "interfaces: received 2 for 1 channels",
        ),
    ],
)
def test_what_is_no_address_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def _sent_from(told: dict[str, Any]) -> list[str]:
    return [one["local"].rpartition(":")[0] for one in told["transfer"]["channels"]]


def test_channels_take_the_addresses_in_turns(world: World) -> None:
    listener = world.listen()
    link = LinkOptions(source_addresses=("127.0.0.2", "127.0.0.3"))
    result = world.moves(listener, channels=3, link=link)
    counted = result.transfer.channels
    assert [one.local.rpartition(":")[0] for one in counted] == [
        "127.0.0.2",
        "127.0.0.3",
        "127.0.0.2",
    ]
    assert sum(one.wire_bytes for one in counted) == result.wire_bytes
    assert all(one.acked_bytes == one.wire_bytes > 0 for one in counted)


@pytest.mark.parametrize("good_first", [True, False])
def test_an_address_of_another_host_ends_it_before_the_guest_is_touched(
    world: World, good_first: bool
) -> None:
    listener = world.listen()
    source = world.guest()
    source.resume()
    addresses = ("127.0.0.2", "203.0.113.7") if good_first else ("203.0.113.7", "127.0.0.2")
    link = LinkOptions(source_addresses=addresses)
    with pytest.raises(OptionError, match=r"received '203\.0\.113\.7', allowed IP "):
        vmth.migrate(source, listener.endpoint.display, world.options(channels=2, link=link))
    index = addresses.index("203.0.113.7") + 1  # as when it goes away after the check
    with pytest.raises(DialError, match=r"cannot connect to tcp:127.* from 203\.0\.113\.7: "):
        dial(listener.endpoint, link, index)
    assert source.running and "pause" not in source.calls
    world.moves(listener)


# ---- links of their own --------------------------------------------------------------------------


def _bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("several_links", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_links_carry_what_their_rates_allow(tmp_path: Path) -> None:
    """Between two network namespaces, at 200 and 20 Mbit/s."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    links = _bench()
    try:
        with links.several_links((200_000_000, 20_000_000)) as hosts:
            told = _moves_between(hosts, tmp_path)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert told["verified"]
    assert _sent_from(told) == list(hosts.local_addresses)
    fast, slow = told["transfer"]["channels"]
    assert fast["pages"] > slow["pages"] > 0
    assert fast["acked_bytes"] == fast["wire_bytes"] > slow["acked_bytes"] == slow["wire_bytes"] > 0


def _moves_between(hosts: Any, folder: Path) -> dict[str, Any]:
    command = (sys.executable, "-m", "vmth", "demo", "--guest", "process", "--insecure")
    there = subprocess.Popen(
        [
            *hosts.destination,
            *command,
            "--receive",
            "tcp:0.0.0.0:4444",
            "--run-on",
            "0s",
            "--state-dir",
            str(folder / "d"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with there:
        assert there.stdout is not None
        try:
            for line in there.stdout:
                if "listening" in line:
                    break
            said = subprocess.run(
                [
                    *hosts.source,
                    *command,
                    "--send",
                    f"tcp:{hosts.address}:4444",
                    "--json",
                    "--memory",
                    "64MiB",
                    "--content",
                    "random=100",
                    "--workload",
                    "idle",
                    "--forms",
                    "zero",
                    "--channels",
                    "2",
                    "--bind",
                    ",".join(hosts.local_addresses),
                    "--warm-up",
                    "0s",
                    "--state-dir",
                    str(folder / "s"),
                ],
                stdout=subprocess.PIPE,
                text=True,
                timeout=100,
                check=False,
            )
            there.communicate(timeout=30)
        finally:
            there.kill()
    told: dict[str, Any] = json.loads(said.stdout)
    return told
