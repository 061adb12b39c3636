"""`a1q chat`: talk with a model."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import click

from a1q.cli.writing import (
    hide_thinking_option,
    shower,
    system_option,
    thinking_option,
    thinking_switch,
    writing_options,
)
from a1q.errors import UsageError
from a1q.generation.text import harmless

QUOTES = '"""'
HISTORY = 1000
"""Lines that are kept for the next chats."""


@click.command(
    epilog="""\b
Examples:
  a1q chat runs/chat
  a1q chat Qwen/Qwen3-0.6B --thinking off --temperature 0.6 --repetition-penalty 1.1
  a1q chat runs/q2:recover --system "Answer in one sentence."
  printf 'Hello.\\nWho are you?\\n' | a1q chat runs/chat --temperature 0
"""
)
@click.argument("model")
@click.option("--load", type=click.Path(path_type=Path), metavar="FILE", help="Go on with a conversation of /save.")
@system_option
@thinking_option
@hide_thinking_option
@writing_options(max_tokens=512)
def command(
    model: str,
    load: Path | None,
    system: str,
    thinking: str | None,
    hide_thinking: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    seed: int,
    base: str | None,
    device: str,
    dense: bool,
    precision: Literal["fp32", "fp16"],
) -> None:
    """Talk with MODEL, named as for `a1q generate`. What you type goes through the model's chat template; a line that
    begins with / is a command, and /help lists them. Ctrl-C stops an answer, Ctrl-D leaves.

    Answers go to standard output, everything else to standard error. Without a terminal every line of standard input is
    a question or a command.
    """
    from a1q.generation.conversation import Conversation, load_conversation
    from a1q.generation.loading import open_voice
    from a1q.generation.sampling import Sampling
    from a1q.generation.session import Screen, Session

    conversation = load_conversation(load) if load is not None else Conversation()
    conversation.system = system or conversation.system
    typed = sys.stdin.isatty()
    if typed:
        click.echo(f"loading {model} ...", err=True)
    voice = open_voice(model, base, device, precision, dense)
    colours = sys.stderr.isatty()

    def tell(line: str) -> None:
        click.echo(click.style(harmless(line), dim=True) if colours else line, err=True)

    screen = Screen(shower(hide_thinking), tell)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    session = Session(voice, screen, conversation, sampling, thinking_switch(thinking), max_tokens, seed, typed)
    if typed:
        held = f", {voice.weights}" if voice.weights else ""
        room = f"{voice.writer.context} tokens of context"
        screen.tell(f"{room}, on {voice.writer.device}{held}; /help lists what you can type")
    if doubt := voice.doubt(session.chat):
        screen.tell(doubt)
    with _history() if typed else contextlib.nullcontext():
        for line, quoted in _typed() if typed else _piped():
            if not session.take(line, quoted):
                break


def _typed() -> Iterator[tuple[str, bool]]:
    """What is typed, several lines joined; Ctrl-C at the prompt drops what stands there."""
    while True:
        try:
            yield _joined(lambda first: _asked("> " if first else "… "))
        except KeyboardInterrupt:
            click.echo(err=True)
        except EOFError:
            click.echo(err=True)
            return
        except UnicodeError as error:
            click.echo(f"that is not UTF-8: {error}", err=True)


def _asked(prompt: str) -> str:
    """A line that is typed; the prompt goes where what isn't an answer goes.

    Raises:
        UnicodeError: if it isn't UTF-8.
    """
    if sys.stdout.isatty():
        line = input(prompt)
    else:
        click.echo(prompt, nl=False, err=True)
        line = input()
    line.encode()  # where there is no locale, Python lets broken text through
    return line


def _joined(read: Callable[[bool], str]) -> tuple[str, bool]:
    """A line and those that belong to it: behind a backslash at its end, or up to closing quotes; whether quoted."""
    line = read(True)
    if line.strip().startswith(QUOTES):
        text = line.strip()[len(QUOTES) :]
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + read(False)
        return text.rstrip().removesuffix(QUOTES).strip("\n"), True
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read(False)
    return line, False


def _piped() -> Iterator[tuple[str, bool]]:
    """The lines of standard input.

    Raises:
        UsageError: if one is not UTF-8, or the last doesn't end.
    """
    begun = False

    def read(first: bool) -> str:
        nonlocal begun
        line = sys.stdin.buffer.readline()  # Python would let broken text through where there is no locale
        if not line:
            if first:
                raise EOFError
            raise UsageError(f"standard input ends where a line should follow: behind a \\, or before closing {QUOTES}")
        text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        if not begun:
            begun, text = True, text.removeprefix("\ufeff")
        return text

    while True:
        try:
            yield _joined(read)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8: {error}") from None


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing, with the lines of earlier chats, which only their owner can read."""
    try:
        import readline
    except ImportError:  # Windows, and some builds of Python
        yield
        return
    from a1q.engine.files import home

    file = home() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(file)
            file.chmod(0o600)
