# SPDX-License-Identifier: Apache-2.0
"""``vmth demo``: a running guest moves live, and everything about it is shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vmth.channel.sockets import LinkOptions
from vmth.cli.answers import answer, complain
from vmth.cli.forms import form_choices, form_options
from vmth.cli.job import job_socket_option
from vmth.cli.link import link_choices, link_options
from vmth.cli.reuse import reuse_choice, reuse_options
from vmth.cli.switchover import realtime_option
from vmth.cli.values import DURATION_MS, DURATION_S, JUMP, ON_OFF, RATE, SIZE
from vmth.demo.outcome import Outcome
from vmth.demo.report import json_object, summary_lines
from vmth.demo.run import run_local, run_receive, run_send
from vmth.demo.settings import DIRTY_SOURCES, GUEST_KINDS, ArrivalSettings, DemoSettings, new_seed
from vmth.errors import UsageError
from vmth.guests.content import DEFAULT_CONTENT
from vmth.guests.machine import VCPUS_MAX
from vmth.guests.schedule import WORKLOADS
from vmth.options import MigrateOptions, ReceiveOptions
from vmth.policy.interface import OnStall
from vmth.progress import Console
from vmth.wire.messages import Mode

__all__ = ["demo"]

#: What --receive may stand beside.
_OF_DESTINATION = frozenset(
    {"receive", "guest", "run_on", "reuse", "reuse_index", "reuse_memory", "insecure", "dscp"}
    | {"realtime", "state_dir", "as_json"}
)


@click.command()
@click.option("--memory", type=SIZE, default="1GiB", show_default=True, help="Memory of the guest.")
@click.option(
    "--guest",
    type=click.Choice(GUEST_KINDS),
    help="kvm: a micro-VM on /dev/kvm; process: a process, its memory tracked with userfaultfd. "
    "Without: kvm where it runs.",
)
@click.option(
    "--vcpus",
    type=click.IntRange(1, VCPUS_MAX),
    default=1,
    show_default=True,
    help="Of a kvm guest. The first one works, the others count and beat.",
)
@click.option(
    "--content",
    default=DEFAULT_CONTENT,
    show_default=True,
    metavar="KIND=PERCENT,...",
    help="What lies in guest memory: zero, hole, dup, files, random, template, file-copy.",
)
@click.option(
    "--workload",
    type=click.Choice(WORKLOADS),
    default="zipf",
    show_default=True,
    help="How the guest dirties memory.",
)
@click.option(
    "--dirty-rate",
    type=RATE,
    help="How fast; 0: as fast as it can.  [default: 50MB/s; as fast as it can for always]",
)
@click.option(
    "--working-set",
    type=SIZE,
    default="0",
    help="How much of its memory it dirties.  [default: 256MiB, at most a quarter]",
)
@click.option(
    "--phase-jump",
    type=JUMP,
    metavar="TIME:RATE",
    help="Another dirty rate from then on: 5s:400MB/s.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), help="Of content and workload.  [random]"
)
@click.option(
    "--warm-up",
    type=DURATION_S,
    default="500ms",
    show_default=True,
    help="It runs before the move.",
)
@click.option(
    "--run-on", type=DURATION_S, default="500ms", show_default=True, help="It runs after the move."
)
@click.option(
    "--dirty-source",
    type=click.Choice(DIRTY_SOURCES),
    help="What reports dirtied pages.  [default: kvm-log for kvm, uffd-wp for process]",
)
@click.option("--mode", type=click.Choice(["live", "cold"]), default="live", show_default=True)
@click.option(
    "--bandwidth", type=RATE, default="0", help="Cap over all channels, as 1Gbit/s or 125MB/s."
)
@click.option(
    "--downtime-limit",
    type=DURATION_MS,
    default="300ms",
    show_default=True,
    help="Switch over when the rest fits into this.",
)
@click.option("--channels", type=int, default=1, show_default=True, help="Page channels, 1 to 64.")
@click.option(
    "--digest",
    type=ON_OFF,
    default="on",
    show_default=True,
    help="Digest of all memory, compared before the source is let go. Off: nothing is verified.",
)
@click.option(
    "--audit",
    is_flag=True,
    help="Both paused ends hash all memory anew and compare page by page; on one machine all bytes "
    "are compared as well. Adds to the downtime.",
)
@click.option(
    "--zero-copy", type=ON_OFF, default="on", show_default=True, help="MSG_ZEROCOPY where it helps."
)
@form_options("256MiB")
@reuse_options
@click.option(
    "--keep-image",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep the guest's memory here once it runs over there, for --reuse when it comes back.",
)
@click.option("--timeout", type=DURATION_S, default="0", help="Of the rounds; 0: none.")
@click.option(
    "--on-stall",
    type=click.Choice([choice.value for choice in OnStall]),
    default=OnStall.PAUSE.value,
    show_default=True,
    help="When rounds stop shrinking or the timeout comes: pause the guest and send the rest, "
    "cancel, or throttle the guest.",
)
@click.option("--send", metavar="URI", help="Move the guest to the vmth demo --receive at URI.")
@click.option("--receive", metavar="URI", help="Take in one guest of a vmth demo --send.")
@click.option("--insecure", is_flag=True, help="Allow plaintext beyond this machine.")
@link_options
@realtime_option
@job_socket_option
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where decisions are journaled.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout, the rest on stderr."
)
@click.pass_context
def demo(context: click.Context, /, as_json: bool, **given: Any) -> None:
    """Move a running guest live and prove that nothing was lost.

    Without --send and --receive both ends are here: the guest runs in one process, is moved over
    loopback TCP into a second one, and runs on there. A line a round is printed, and at the end how
    long it took and what was checked: the digest of all memory at both ends, and the guest's own
    counters of its writes and heartbeats.

    Ctrl-C cancels, the source guest runs on; a second Ctrl-C ends everything at once.

    \b
    Examples:
      vmth demo
      vmth demo --memory 4GiB --workload zipf --dirty-rate 200MB/s --channels 4 --audit
      vmth demo --workload always --on-stall cancel --timeout 10s
      vmth demo --vcpus 2 --dirty-source kvm-ring --dirty-rate 200MB/s --on-stall throttle
      vmth demo --seed 7 --keep-image vm.memory           and then, with nearly nothing to send:
      vmth demo --seed 7 --reuse vm.memory
      vmth demo --receive tcp:0.0.0.0:4444 --insecure     and on another host:
      vmth demo --send tcp:HOST:4444 --insecure
    """
    console = Console(sys.stderr if as_json else sys.stdout)
    if given["receive"]:
        _refuse_of_source(context)
    outcome = _run(given, console)
    if as_json:
        answer(json_object(outcome))
    for line in () if as_json else summary_lines(outcome):
        console.say(line)
    if outcome.error:
        complain(outcome.error)
    context.exit(int(outcome.exit_code))


def _refuse_of_source(context: click.Context) -> None:
    """Of the options that were given with --receive those that belong to the other end."""
    if context.get_parameter_source("send") is ParameterSource.COMMANDLINE:
        raise UsageError("received both --send and --receive, allowed one of them")
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in _OF_DESTINATION:
            value = context.params[name]
            shown = ",".join(value) if isinstance(value, tuple) else value
            raise UsageError(
                f"{parameter.opts[0]}: received {shown} with --receive, allowed where the guest "
                "leaves"
            )


def _run(given: dict[str, Any], console: Console) -> Outcome:
    link = link_choices(given)
    if given["receive"]:
        return run_receive(
            ArrivalSettings(given["guest"] or "", given["run_on"], reuse_choice(given)),
            ReceiveOptions(
                insecure=given["insecure"],
                realtime=given["realtime"],
                state_dir=given["state_dir"],
                link=link,
            ),
            given["receive"],
            console,
        )
    settings = _settings(given, link)
    if given["send"] and given["reuse"]:
        raise UsageError("received --reuse with --send, allowed where a guest arrives")
    if given["send"]:
        return run_send(settings, given["send"], console)
    return run_local(settings, console)


def _settings(given: dict[str, Any], link: LinkOptions) -> DemoSettings:
    migrate = MigrateOptions(
        mode=Mode.COLD if given["mode"] == "cold" else Mode.LIVE,
        channels=given["channels"],
        bandwidth_bps=given["bandwidth"],
        downtime_limit_ns=given["downtime_limit"],
        timeout_ns=given["timeout"],
        on_stall=OnStall(given["on_stall"]),
        digest=given["digest"],
        audit=given["audit"],
        zerocopy=given["zero_copy"],
        **form_choices(given),
        insecure=given["insecure"],
        realtime=given["realtime"],
        state_dir=given["state_dir"],
        keep_image=given["keep_image"],
        link=link,
    )
    return DemoSettings(
        memory_bytes=given["memory"],
        guest=given["guest"] or "",
        dirty_source=given["dirty_source"] or "",
        vcpus=given["vcpus"],
        workload=given["workload"],
        dirty_rate_bps=given["dirty_rate"],
        working_set_bytes=given["working_set"],
        phase_jump=given["phase_jump"],
        content=given["content"],
        seed=new_seed() if given["seed"] is None else given["seed"],
        warm_up_ns=given["warm_up"],
        run_on_ns=given["run_on"],
        migrate=migrate,
        reuse=reuse_choice(given),
        job_socket=given["job_socket"],
    )
