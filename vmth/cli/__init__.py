# SPDX-License-Identifier: Apache-2.0
"""The command line: one file a command, no logic.

``main`` is called by the console script and ``python -m vmth``. Exit codes are those of
``vmth.errors.ExitCode``.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterable

import click

from vmth import __version__
from vmth.cli.answers import fail
from vmth.cli.check import check
from vmth.cli.demo import demo
from vmth.cli.index import index
from vmth.cli.inspect import inspect
from vmth.cli.job import job
from vmth.cli.migrate import migrate
from vmth.cli.probe import probe
from vmth.cli.receive import receive
from vmth.cli.recover import recover
from vmth.cli.relay import relay
from vmth.cli.restore import restore
from vmth.cli.save import save
from vmth.cli.version import version
from vmth.errors import ExitCode, VmthError
from vmth.interrupts import Terminated
from vmth.option_names import for_users

__all__ = ["cli", "main"]

#: Of the interpreter, between its threads. In a switchover threads hand over to one another some
#: ten times; by default a busy thread may let the others wait for 5 ms each time.
SWITCH_INTERVAL_S = 0.0005


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vmth", message="%(prog)s %(version)s")
def cli() -> None:
    """Move running virtual machines between hosts, with proof that nothing was lost.

    \b
    Exit codes of every command:
      0    done
      1    failed, the source guest runs
      2    usage: an option or a value that is not allowed
      3    refused before the start, the source guest runs
      4    cancelled (also by SIGTERM), the source guest runs
      5    did not converge or timed out, the source guest runs
      6    verification failed
      7    in doubt, or not resumed after a failure: paused here, an operator must decide
      130  interrupted (Ctrl-C), the source guest runs
    """


cli.add_command(check)
cli.add_command(demo)
cli.add_command(index)
cli.add_command(inspect)
cli.add_command(job)
cli.add_command(migrate)
cli.add_command(probe)
cli.add_command(receive)
cli.add_command(recover)
cli.add_command(relay)
cli.add_command(restore)
cli.add_command(save)
cli.add_command(version)


def main(arguments: list[str] | None = None, *, signal_mask: Iterable[int] | None = None) -> None:
    """Run and exit. With ``--json`` an error is a JSON object on stdout too. ``signal_mask``: set
    as soon as a signal that was held back ends as it should."""
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.freeze()  # what the imports made stays: to look through it takes longer than a switchover
    try:
        if signal_mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, signal_mask)
        _refuse_empty(given)
        code = cli.main(args=given, prog_name="vmth", standalone_mode=False)
    except click.ClickException as error:
        code = fail(error.format_message(), ExitCode(error.exit_code), as_json)
    except VmthError as error:
        code = fail(for_users(error), error.exit_code, as_json)
    except OSError as error:  # a help text that cannot be written, a file that cannot be read
        code = fail(str(error), ExitCode.FAILED, as_json)
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error, Terminated) or isinstance(error.__cause__, Terminated):
            code = fail("terminated", ExitCode.CANCELLED, as_json)
        else:
            code = fail("interrupted", ExitCode.INTERRUPTED, as_json)
    sys.exit(int(code or 0))


def _refuse_empty(arguments: list[str]) -> None:
    """Nothing takes an empty value, and a shell's unset variable gives one: it is not to be taken
    for an option that was left out. Behind ``--`` stands another program's command line."""
    before = ""
    for argument in arguments:
        if argument == "--":
            return
        name, equals, value = argument.partition("=")
        assigned = name.startswith("--") and bool(equals) and not value
        if assigned or not argument:
            option = name if assigned else before if before.startswith("-") else "an argument"
            raise click.UsageError(f"{option}: received '', allowed a value that is not empty")
        before = argument
