# SPDX-License-Identifier: Apache-2.0
"""``vmth relay``: carry QEMU's migration connections between its sockets."""

from __future__ import annotations

from typing import Any

import click

from vmth.channel.sockets import LinkOptions
from vmth.cli.answers import answer, say
from vmth.cli.link import congestion_option, dscp_choice
from vmth.qemu.relay import Peer, RelayOptions, report_lines, report_values, run_relay

__all__ = ["relay"]


@click.command()
@click.option("--listen", required=True, metavar="URI", help="Where QEMU (or a peer) connects.")
@click.option("--connect", required=True, metavar="URI", help="Where each connection goes on to.")
@click.option(
    "--peer",
    type=click.Choice([peer.value for peer in Peer]),
    help="On that side is a vmth relay too: what travels between the two is checked. connect on "
    "the source's host, listen on the destination's.",
)
@click.option("--compress", is_flag=True, help="Send zstd frames to the peer.")
@click.option("--once", is_flag=True, help="End when the first migration's connections are closed.")
@click.option("--insecure", is_flag=True, help="Allow plaintext beyond this machine.")
@click.option("--bind", default="", metavar="ADDRESS", help="Local address to connect from.")
@click.option("--interface", default="", help="Local network interface to use.")
@click.option("--dscp", type=int, help="DSCP of every packet, 0 to 63.")
@congestion_option
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout, the rest on stderr."
)
@click.pass_context
def relay(context: click.Context, /, as_json: bool, **given: Any) -> None:
    """Carry QEMU's migration connections from one address to another.

    Every connection to --listen is one to --connect: bytes unchanged both ways, half-closes and
    failures as they come. Migrations that are understood are reported. The first Ctrl-C or SIGTERM
    lets open connections end, the second breaks them.

    \b
    Examples:
      vmth relay --listen unix:/run/vmth/out.sock --connect tcp:DST:4444 --insecure
    with checked frames between two hosts:
      vmth relay --peer listen --listen tcp:0.0.0.0:4444 --connect unix:/run/in.sock --insecure
      vmth relay --peer connect --listen unix:/run/out.sock --connect tcp:DST:4444 --insecure
    """
    options = RelayOptions(
        listen=given["listen"],
        connect=given["connect"],
        peer=Peer(given["peer"]) if given["peer"] else None,
        compress=given["compress"],
        once=given["once"],
        insecure=given["insecure"],
        link=LinkOptions(
            source_addresses=(given["bind"],) if given["bind"] else (),
            interfaces=(given["interface"],) if given["interface"] else (),
            dscp=dscp_choice(given),
            congestion_control=given["congestion_control"],
            user_timeout_ms=0,
        ),
    )
    report = run_relay(options, lambda line: say(line, err=as_json))
    if as_json:
        answer(report_values(report))
    else:
        for line in report_lines(report):
            say(line)
    context.exit(int(report.exit_code))
