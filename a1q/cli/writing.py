"""What `generate` and `chat` share: options about how text is drawn, and where answers are shown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from a1q.cli.common import Number

Function = TypeVar("Function", bound=Callable[..., Any])
DEVICES = ("auto", "cpu", "cuda", "mps")


def writing_options(max_tokens: int) -> Callable[[Function], Function]:
    """Add the options that say what computes and how tokens are drawn; `max_tokens` is the default of one."""
    options = (
        click.option(
            "--max-tokens",
            type=click.IntRange(min=1),
            default=max_tokens,
            show_default=True,
            help="Most tokens to write.",
        ),
        click.option(
            "--temperature",
            type=Number(min=0),
            default=0.7,
            show_default=True,
            help="0 takes the likeliest token.",
        ),
        click.option(
            "--top-p",
            type=Number(min=0, max=1, min_open=True),
            default=0.95,
            show_default=True,
            help="Draw from the likeliest tokens that together have this probability.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Draw from so many of the likeliest tokens; 0: from all.",
        ),
        click.option(
            "--repetition-penalty",
            type=Number(min=0, min_open=True),
            default=1.0,
            show_default=True,
            help="Above 1, tokens that the text has already become less likely.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0, max=2**63 - 1),
            default=0,
            show_default=True,
            help="Same seed, same text.",
        ),
        click.option("--base", metavar="MODEL", help="The model that an adapter belongs to, if it doesn't say so."),
        click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="For models."),
        click.option(
            "--dense",
            is_flag=True,
            help="Write a quantized model's weights out in fp32: in more memory, slower. Always so off the CPU.",
        ),
        click.option(
            "--precision",
            type=click.Choice(("fp32", "fp16")),
            default="fp16",
            show_default=True,
            help="For Core ML packages off a Mac: how the interpreter rounds.",
        ),
    )

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


thinking_option = click.option(
    "--thinking",
    type=click.Choice(("on", "off")),
    help="Tell the chat template whether to think; left out, it does as it does by itself.",
)
hide_thinking_option = click.option("--hide-thinking", is_flag=True, help="Leave thoughts out of what is shown.")
system_option = click.option("--system", metavar="TEXT", default="", help="What the system says first.")


def thinking_switch(value: str | None) -> bool | None:
    """What the template is told."""
    return None if value is None else value == "on"


def shower(hide: bool) -> Callable[[str, bool], None]:
    """A function that writes text of an answer to standard output, thoughts dimmed on a terminal or left out."""
    colours = sys.stdout.isatty()

    def show(text: str, thought: bool) -> None:
        if thought and hide:
            return
        click.echo(click.style(text, dim=True) if thought and colours else text, nl=False)
        sys.stdout.flush()

    return show
