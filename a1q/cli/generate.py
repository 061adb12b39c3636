"""`a1q generate`: let a model write."""

from __future__ import annotations

import sys
from typing import Any, Literal

import click

from a1q.cli.common import errors_as_json, json_option, print_json
from a1q.cli.writing import (
    hide_thinking_option,
    shower,
    system_option,
    thinking_option,
    thinking_switch,
    writing_options,
)
from a1q.errors import UsageError


@click.command(
    epilog="""\b
Examples:
  a1q generate builtin:pico --prompt "Return the number of"
  a1q generate runs/q4-to-q2 --prompt "Return the number of" --temperature 0
  a1q generate q4-to-q2:q4_train --prompt - < prompt.txt
  a1q generate runs/chat --chat --prompt "What is 2 + 2?" --thinking off
  a1q generate adapter/ --base Qwen/Qwen3-0.6B --prompt "Once"  a PEFT adapter
  a1q generate runs/q4-to-q2/export/ane --prompt "Raise"        a Core ML package
"""
)
@click.argument("model")
@click.option("--prompt", default="-", metavar="TEXT", help="Text to continue; `-` reads standard input.  [default: -]")
@click.option("--chat", "as_chat", is_flag=True, help="The prompt is a question: put it through the chat template.")
@system_option
@thinking_option
@hide_thinking_option
@writing_options(max_tokens=128)
@json_option
def command(
    model: str,
    prompt: str,
    as_chat: bool,
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
    as_json: bool,
) -> None:
    """Continue a prompt with MODEL: `builtin:pico`, a model or exported folder, a PEFT adapter, a Hub id, a run (its
    last model) or RUN:STAGE_ID. Bits, ranks and shapes are read from the model. A Core ML package is run by Core ML on
    a Mac, and interpreted elsewhere.

    The text goes to standard output as it is written, the speed to standard error.
    """
    with errors_as_json(as_json):
        from a1q.generation.answer import answer
        from a1q.generation.conversation import Conversation
        from a1q.generation.loading import open_voice
        from a1q.generation.sampling import Sampler, Sampling
        from a1q.generation.text import Thoughts, begins_inside, said

        _refuse_without_chat(as_chat, system, thinking)
        text = _read_prompt(prompt)
        voice = open_voice(model, base, device, precision, dense)
        ends, doubt, inside = voice.ends, "", False
        if as_chat:
            conversation = Conversation(system)
            conversation.ask(text)
            chat = voice.chat(thinking_switch(thinking))
            ends, doubt = voice.ends_of(chat), voice.doubt(chat)
            whole, tokens, _ = conversation.prompt(voice, chat, room=1)
            inside = begins_inside(whole)
        else:
            tokens = voice.tokens(text)
        context = voice.writer.context
        if len(tokens) >= context:
            message = f"the prompt has {len(tokens)} tokens, and the context of {context} must hold an answer too"
            raise UsageError(message)
        show, thoughts = shower(hide_thinking), Thoughts(inside)

        def write(piece: str) -> None:
            for thought, part in thoughts(piece) if as_chat else ((False, piece),):
                if not as_json:
                    show(part, thought)

        sampler = Sampler(Sampling(temperature, top_k, top_p, repetition_penalty), seed)
        found = answer(voice, tokens, max_tokens, sampler, ends, write)
        for thought, part in thoughts.end():
            if not as_json:
                show(part, thought)
    facts: dict[str, Any] = {
        "text": said(found.text, inside) if as_chat and hide_thinking else found.text,
        "prompt_tokens": found.prompt_tokens,
        "prompt_seconds": found.prompt_seconds,
        "prompt_tokens_per_second": found.prompt_tokens_per_second,
        "tokens": len(found.tokens),
        "seconds": found.seconds,
        "tokens_per_second": found.tokens_per_second,
        "stopped_at": found.stopped_at,
        "device": voice.writer.device,
    }
    if as_json:
        print_json({"ok": True, "model": model, "folder": str(voice.folder), "seed": seed, "prompt": text, **facts})
    else:
        click.echo()
        held = f", {voice.weights}" if voice.weights else ""
        click.echo(f"{found.figures}; on {voice.writer.device}{held}", err=True)
        if doubt:
            click.echo(doubt, err=True)


def _refuse_without_chat(as_chat: bool, system: str, thinking: str | None) -> None:
    for name, given in (("--system", bool(system)), ("--thinking", thinking is not None)):
        if given and not as_chat:
            raise UsageError(f"{name} is for the chat template: add --chat")


def _read_prompt(prompt: str) -> str:
    """The prompt's text, from standard input for `-`; there the last line's end is no part of it."""
    text = prompt
    if prompt == "-":
        if sys.stdin.isatty():
            click.echo("the prompt, ended with Ctrl-D:", err=True)
        try:
            text = sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
            text.encode()  # where there is no locale, Python lets broken text through
        except UnicodeError as error:
            raise UsageError(f"the prompt on standard input is not UTF-8: {error}") from None
    if not text.strip():
        raise UsageError('the prompt is empty; give one with --prompt "Text", or on standard input')
    return text
