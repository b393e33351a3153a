# SPDX-License-Identifier: Apache-2.0
"""URIs: what is read, what is refused and why, and what counts as loopback."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmth.errors import UsageError
from vmth.uri import Endpoint, Scheme, parse_endpoint

READ = [
    ("tcp:host:4444", Endpoint(Scheme.TCP, host="host", port=4444)),
    ("tcp://host:4444", Endpoint(Scheme.TCP, host="host", port=4444)),
    ("tcp://host:4444/", Endpoint(Scheme.TCP, host="host", port=4444)),
    ("tcp:192.0.2.7:1", Endpoint(Scheme.TCP, host="192.0.2.7", port=1)),
    ("tcp:a-b.example.:65535", Endpoint(Scheme.TCP, host="a-b.example.", port=65535)),
    ("tcp:[::1]:4444", Endpoint(Scheme.TCP, host="::1", port=4444)),
    ("tcp://[2001:db8::5]:4444", Endpoint(Scheme.TCP, host="2001:db8::5", port=4444)),
    ("tcp:[fe80::1%eth0]:9", Endpoint(Scheme.TCP, host="fe80::1%eth0", port=9)),
    ("unix:/run/a.sock", Endpoint(Scheme.UNIX, path="/run/a.sock")),
    ("unix:///run/a.sock", Endpoint(Scheme.UNIX, path="/run/a.sock")),
    ("unix:a.sock", Endpoint(Scheme.UNIX, path="a.sock")),
    ("unix:a:b%20c", Endpoint(Scheme.UNIX, path="a:b%20c")),
    ("unix:" + "p" * 107, Endpoint(Scheme.UNIX, path="p" * 107)),
    ("fd:3", Endpoint(Scheme.FD, fds=(3,))),
    ("fd:3,17,4", Endpoint(Scheme.FD, fds=(3, 17, 4))),
]


@pytest.mark.parametrize(("text", "expected"), READ)
def test_read_and_shown(text: str, expected: Endpoint) -> None:
    endpoint = parse_endpoint(text)
    assert endpoint == expected
    assert parse_endpoint(endpoint.display) == expected


REFUSED = [
    ("", "no scheme"),
    ("host", "no scheme"),
    ("rdma:host:1", "unknown scheme 'rdma'; allowed: tcp:"),
    ("TCP:host:1", "unknown scheme 'TCP'"),
    ("tcp:", "no port"),
    ("tcp:host", "no port"),
    ("tcp::4444", "0.0.0.0 or [::]"),
    ("tcp:host:", "allowed: 1 to 65535"),
    ("tcp:host:0", "allowed: 1 to 65535"),
    ("tcp:host:65536", "allowed: 1 to 65535"),
    ("tcp:host:-1", "allowed: 1 to 65535"),
    ("tcp:host:+1", "allowed: 1 to 65535"),
    ("tcp:host:1 ", "allowed: 1 to 65535"),
    ("tcp:host:٣", "allowed: 1 to 65535"),
    ("tcp:host:" + "1" * 5000, "allowed: 1 to 65535"),
    ("tcp:::1:4444", "IPv6"),
    ("tcp:[::1]", "brackets"),
    ("tcp:[::1]4444", "brackets"),
    ("tcp:[127.0.0.1]:1", "brackets"),
    ("tcp:[host]:1", "brackets"),
    ("tcp:ho st:1", "a name or an address"),
    ("tcp:-host:1", "a name or an address"),
    ("tcp://host/x:1", "a name or an address"),
    ("tcp:" + "h" * 254 + ":1", "a name or an address"),
    ("unix:", "1 to 107"),
    ("unix://run/a.sock", "unix:///PATH"),
    ("unix:" + "p" * 108, "108 bytes; allowed: 1 to 107"),
    ("unix:" + "ä" * 54, "108 bytes"),
    ("unix:a\0b", "no zero"),
    ("fd:", "list of numbers"),
    ("fd:x", "list of numbers"),
    ("fd:3,,4", "list of numbers"),
    ("fd:-1", "list of numbers"),
    ("fd:3,3", "twice"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_a_refusal_names_what_came_and_what_is_allowed(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    assert repr(text) in str(caught.value)
    assert "allowed" in str(caught.value)
    assert reason in str(caught.value)


def test_port_zero_is_for_listening() -> None:
    assert parse_endpoint("tcp:127.0.0.1:0", listening=True).port == 0
    with pytest.raises(UsageError, match="0 to 65535"):
        parse_endpoint("tcp:127.0.0.1:65536", listening=True)


LOOPBACK = [
    ("tcp:127.0.0.1:1", True),
    ("tcp:127.9.9.9:1", True),
    ("tcp:[::1]:1", True),
    ("tcp:[::ffff:127.0.0.1]:1", True),
    ("tcp:localhost:1", True),
    ("tcp:LocalHost.:1", True),
    ("unix:/x", True),
    ("tcp:0.0.0.0:1", False),
    ("tcp:[::]:1", False),
    ("tcp:[::ffff:192.0.2.7]:1", False),
    ("tcp:192.0.2.7:1", False),
    ("tcp:localhost.example.com:1", False),
    ("tcp:127.0.0.1.example.com:1", False),
    ("fd:3", False),
]


@pytest.mark.parametrize(("text", "expected"), LOOPBACK)
def test_loopback(text: str, expected: bool) -> None:
    assert parse_endpoint(text).is_loopback() is expected


@given(
    text=st.builds(
        str.__add__, st.sampled_from(["", "tcp:", "tcp://", "tcp:[", "unix:", "fd:"]), st.text()
    )
)
def test_any_text_is_read_or_refused_by_the_one_error(text: str) -> None:
    try:
        endpoint = parse_endpoint(text)
    except UsageError:
        return
    assert parse_endpoint(endpoint.display) == endpoint
