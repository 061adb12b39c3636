"""The `a1q` command. One file per command: `a1q/cli/NAME.py` defines a click command called `command`.

Commands are found by file name and imported when they are needed; nothing here or at the top of a command's
file imports anything heavier than click.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from a1q import __version__
from a1q.errors import A1QError, UsageError

NOT_COMMANDS = {"common", "writing"}


class CommandFolder(click.Group):
    """A group whose commands are the files of this folder; `list_runs.py` is typed `list-runs`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, sorted."""
        found = (item.name for item in pkgutil.iter_modules(__path__))
        return sorted(name.replace("_", "-") for name in found if name not in NOT_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command's file, or None if there is none of that name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"a1q.cli.{cmd_name.replace('-', '_')}")
        return module.command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name in the message when there is no such command."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"{error.format_message()}{hint}", ctx) from None


@click.command(cls=CommandFolder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="a1q")
def cli() -> None:
    """Make language models small enough for the Apple Neural Engine, by recipe.

    \b
    Start with:  a1q run recipes/q4_to_q2.yaml
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code that `a1q.errors` documents."""
    try:
        _refuse_broken_text(sys.argv[1:] if arguments is None else arguments)
        code = cli.main(args=arguments, prog_name="a1q", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = 130
    except A1QError as error:
        click.echo(f"a1q: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except OSError as error:
        from a1q.engine.files import disk_error

        if disk_error(error, Path()) is None:
            raise
        click.echo(f"a1q: {error.strerror}: {error.filename or 'standard output'}", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _refuse_broken_text(arguments: Sequence[str]) -> None:
    """Names that are not UTF-8 can't be written to any of the JSON and YAML files that a run leaves.

    Raises:
        UsageError: naming the argument, folder or variable.
    """
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder was removed; change to another one") from None
    named = {"the current folder": folder, "A1Q_HOME": os.environ.get("A1Q_HOME", "")}
    named |= {f"argument {number}": text for number, text in enumerate(arguments, 1)}
    for what, text in named.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{what}, {text!a}, is not UTF-8; rename it") from None
