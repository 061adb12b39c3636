"""`a1q eval`: how well a model predicts text, and how far it is from another."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

import click

from a1q.cli.common import errors_as_json, json_option, print_json
from a1q.errors import StageError, UsageError

TOKENS = {"model": 16_384, "package": 256}
"""Tokens that are read where nobody says how many: an interpreted package takes its time."""


@click.command(
    "eval",
    epilog="""\b
Examples:
  a1q eval runs/q4-to-q2 --against builtin:pico
  a1q eval Qwen/Qwen3-0.6B --data wikitext.txt --window 2048 --stride 512 --tokens all
  a1q eval q4-to-q2:ane --against q4-to-q2 --tokens 512 --json
""",
)
@click.argument("model")
@click.option("--against", metavar="MODEL", help="A model to compare with: KL from it, same likeliest token.")
@click.option(
    "--data",
    default="builtin:prose",
    show_default=True,
    metavar="SOURCE",
    help="Text: a file, a folder, a Hub data set, or built-in text, of which the test side is read.",
)
@click.option("--tokens", default="", metavar="N|all", help="How many tokens.  [default: 16384; 256 of a package]")
@click.option("--window", type=click.IntRange(min=2), help="Tokens of a window.  [default: 512, or the context]")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens between windows.  [default: half a window]")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda", "mps")), default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(("fp32", "fp16")),
    default="fp16",
    show_default=True,
    help="Of interpreted packages.",
)
@json_option
def command(
    model: str,
    against: str | None,
    data: str,
    tokens: str,
    window: int | None,
    stride: int | None,
    device: str,
    precision: Literal["fp32", "fp16"],
    as_json: bool,
) -> None:
    """Perplexity of MODEL over sliding windows of a text, and with --against its KL and top-1 agreement. MODEL is a
    run, RUN:STAGE_ID, a model folder, a Hub id, or a Core ML package. Nothing is written.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the libraries between our lines
    with errors_as_json(as_json):
        found = _measured(model, against, data, tokens, window, stride, device, precision)
    if as_json:
        print_json({"ok": True, "model": model, "against": against, "data": data, **found})
        return
    click.echo(f"{found['ppl']:.4f} perplexity, {found['loss']:.5f} nats a token, over {found['tokens']:,} tokens")
    if against is not None:
        click.echo(f"{found['reference_ppl']:.4f} perplexity of {against}")
        click.echo(f"{found['kl']:.6f} nats of KL a token, {found['top1']:.2%} the same likeliest token")


def _measured(
    model: str,
    against: str | None,
    data: str,
    tokens: str,
    window: int | None,
    stride: int | None,
    device: str,
    precision: Literal["fp32", "fp16"],
) -> dict[str, Any]:
    from a1q.looking.sources import open_speaker, require_same_text, text_tokens
    from a1q.looking.target import find, require_predicting
    from a1q.looking.windows import check_windows, measure

    target = find(model)
    other = find(against) if against is not None else None
    if other is not None:
        require_same_text(target, other, model, str(against))
    require_predicting(target, model)
    count = _count(tokens, min(TOKENS[item.kind] for item in (target, other) if item is not None))
    try:
        ids = text_tokens(data, target.folder, count)
    except StageError as error:
        raise UsageError(str(error)) from None
    speaker = open_speaker(target, device, precision)
    reference = None
    if other is not None:
        reference = open_speaker(other, "auto" if other.kind == "package" else device, precision)
    context = min(item.context for item in (speaker, reference) if item is not None)
    window = min(512, context) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    vocabulary = min(item.vocabulary for item in (speaker, reference) if item is not None)
    check_windows(ids, window, stride, context, vocabulary)
    with click.progressbar(length=len(ids) - 1, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        found = measure(
            ids,
            speaker.logits,
            None if reference is None else reference.logits,
            window,
            stride,
            lambda done: bar.update(done - bar.pos),
        )
    return {**found, "window": window, "stride": stride}


def _count(text: str, usual: int) -> int | None:
    if text in ("", "all"):
        return None if text else usual
    if not text.isascii() or not text.isdigit() or int(text) < 2:
        raise UsageError(f"--tokens is {text!r}; expected a number of at least 2, or `all`")
    return int(text)
