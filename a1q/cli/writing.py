"""What `generate` and `chat` share: options about how text is drawn, and where answers are shown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from a1q.cli.common import Number
from a1q.generation.ranges import RANGES
from a1q.generation.text import harmless

Function = TypeVar("Function", bound=Callable[..., Any])
DEVICES = ("auto", "cpu", "cuda", "mps")


def writing_options(max_tokens: int) -> Callable[[Function], Function]:
    """Add the options that say what computes and how tokens are drawn; `max_tokens` is the default of one."""
    options = (
        _setting("max_tokens", max_tokens, "Most tokens to write."),
        _setting("temperature", 0.7, "0 takes the likeliest token."),
        _setting("top_p", 0.95, "Draw from the likeliest tokens that together have this probability."),
        _setting("top_k", 0, "Draw from so many of the likeliest tokens; 0: from all."),
        _setting("repetition_penalty", 1.0, "Above 1, tokens that the text has already become less likely."),
        _setting("seed", 0, "Same seed, same text."),
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


def _setting(name: str, default: float, text: str) -> Callable[[Function], Function]:
    kind, low, high = RANGES[name]
    within = click.IntRange(int(low), int(high)) if kind is int else Number(low, high)
    return click.option(f"--{name.replace('_', '-')}", type=within, default=default, show_default=True, help=text)


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
    """A function that writes text of an answer to standard output, thoughts left out or, on a terminal, dimmed."""
    terminal = sys.stdout.isatty()

    def show(text: str, thought: bool) -> None:
        if thought and hide:
            return
        if terminal:
            text = click.style(harmless(text), dim=True) if thought else harmless(text)
        click.echo(text, nl=False)
        sys.stdout.flush()

    return show
