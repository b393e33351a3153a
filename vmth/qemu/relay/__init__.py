# SPDX-License-Identifier: Apache-2.0
"""``vmth relay``: carries QEMU's migration connections for who drives QEMU itself (docs/relay.md).

Reading order: frames.py (what two relays say), ends.py (a socket's two kinds), link.py (one carried
connection), relay.py (all of them), migration.py and observe.py (what is understood on the side).
"""

from vmth.qemu.relay.relay import Peer, Relay, RelayOptions
from vmth.qemu.relay.report import RelayReport, report_lines, report_values
from vmth.qemu.relay.run import run_relay

__all__ = [
    "Peer",
    "Relay",
    "RelayOptions",
    "RelayReport",
    "report_lines",
    "report_values",
    "run_relay",
]
