# SPDX-License-Identifier: Apache-2.0
"""What this host offers to vmth, found by trying: KVM, dirty sources, kernel faults, kernels."""

from __future__ import annotations

import os
from typing import Any

from vmth import __version__, kernels
from vmth.dirty.probe import probe
from vmth.guests.kvm_machine import probe as probe_kvm
from vmth.guests.spawn import available_memory_bytes
from vmth.realtime import LATENCY_PATH, NOT_PERMITTED, keeps_awake, permitted

__all__ = ["host_lines", "host_report"]


def host_report() -> dict[str, Any]:
    """JSON-able. A small virtual machine is run and a few pages are tracked; takes a second at
    most. ``tracking`` has ``vmth.dirty.probe``'s checks, ``kernels`` what is used of each
    family."""
    kvm, reason = probe_kvm()
    tracking = {
        name: {"status": finding.status.value, "reason": finding.reason}
        for name, finding in probe().items()
    }
    available_bytes, where = available_memory_bytes()
    return {
        "vmth_version": __version__,
        "kernel_release": os.uname().release,
        "machine": os.uname().machine,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_available_bytes": available_bytes,
        "memory_available_where": where,
        "realtime": permitted(),
        "keeps_awake": keeps_awake(),
        "kvm": {"usable": kvm, "reason": reason},
        "tracking": tracking,
        "kernels": {family: kernels.selected(family) for family in kernels.kernels()},
        "guest": "kvm" if kvm else "process",
    }


def host_lines(report: dict[str, Any]) -> list[str]:
    """The same for people, one fact a line."""
    kvm, memory_mib = report["kvm"], report["memory_available_bytes"] >> 20
    lines = [
        _line("host", f"Linux {report['kernel_release']}, {report['machine']}"),
        _line("cpus", str(report["cpus"])),
        _line("memory left", f"{memory_mib} MiB ({report['memory_available_where']})"),
        _line("kvm", f"{'usable' if kvm['usable'] else 'not usable'}: {kvm['reason']}"),
    ]
    name, _, refused = NOT_PERMITTED.partition(": ")
    lines.append(_line(name, "permitted" if report["realtime"] else refused))
    refused = f"not permitted ({LATENCY_PATH} cannot be written)"
    lines.append(_line("cores kept awake", "permitted" if report["keeps_awake"] else refused))
    for name, finding in report["tracking"].items():
        reason = f": {finding['reason']}" if finding["reason"] else ""
        lines.append(_line(name, finding["status"] + reason))
    for family, name in report["kernels"].items():
        lines.append(_line(f"kernel {family}", name))
    lines.append(_line("default guest", report["guest"]))
    return lines


def _line(name: str, text: str) -> str:
    return f"{name:<18} {text}"
