"""`a1q compare`: two models side by side."""

from __future__ import annotations

import os
from typing import Any

import click

from a1q.cli.common import errors_as_json, json_option, print_json, terminal_width
from a1q.errors import StageError, UsageError


@click.command(
    epilog="""\b
Examples:
  a1q compare builtin:pico runs/q4-to-q2
  a1q compare q4-to-q2:q2 q4-to-q2:q2_train --prompt "Return the"
  a1q compare runs/q4-to-q2 runs/q4-to-q2/export/ane --tokens 256
"""
)
@click.argument("first")
@click.argument("second")
@click.option("--data", default="builtin:prose", show_default=True, metavar="SOURCE", help="Text, as for `a1q eval`.")
@click.option("--tokens", type=click.IntRange(min=2), help="How many tokens.  [default: 4096; 256 with a package]")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Let both continue this. Repeatable.")
@click.option(
    "--max-tokens", type=click.IntRange(min=0), default=40, show_default=True, help="Tokens of a sample; 0: none."
)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda", "mps")), default="auto", show_default=True)
@json_option
def command(
    first: str,
    second: str,
    data: str,
    tokens: int | None,
    prompts: tuple[str, ...],
    max_tokens: int,
    device: str,
    as_json: bool,
) -> None:
    """Compare SECOND with FIRST: bits and bytes, perplexity, KL and agreement on one text, errors of weights module by
    module and of what every decoder layer answers, and what both write. Models, runs, RUN:STAGE_ID and Core ML packages
    (of which weights and layers are not compared). Nothing is written.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the libraries between our lines
    with errors_as_json(as_json):
        found = _compared(first, second, data, tokens, prompts, max_tokens, device)
    if as_json:
        print_json({"ok": True, "first": first, "second": second, **found})
        return
    from a1q.report.comparison import text_of

    click.echo(text_of(found, (first, second), terminal_width() or 100))


def _compared(
    first: str, second: str, data: str, tokens: int | None, prompts: tuple[str, ...], max_tokens: int, device: str
) -> dict[str, Any]:
    from a1q.looking.comparison import PROMPTS, figures, layer_errors, read_prompts, samples, sizes, weight_errors
    from a1q.looking.sources import open_speaker, require_same_text, text_tokens
    from a1q.looking.target import find
    from a1q.looking.windows import check_windows

    targets = find(first), find(second)
    require_same_text(*targets, first, second)
    packages = any(target.kind == "package" for target in targets)
    count = tokens or (256 if packages else 4096)
    try:
        ids = text_tokens(data, targets[0].folder, count)
    except StageError as error:
        raise UsageError(str(error)) from None
    one, other = (open_speaker(target, "auto" if target.kind == "package" else device) for target in targets)
    context = min(one.context, other.context)
    window = min(512, context)
    check_windows(ids, window, max(window // 2, 1), context, min(one.vocabulary, other.vocabulary))
    begun = read_prompts(prompts or PROMPTS, targets[0].folder, context) if max_tokens else {}
    both = one.model is not None and other.model is not None
    return {
        "sizes": [sizes(target) for target in targets],
        "figures": figures(ids, one, other, window),
        "modules": weight_errors(one.model, other.model) if both else {},
        "layers": layer_errors(one.model, other.model, ids, min(window, 256)) if both else [],
        "samples": samples(begun, targets[0].folder, (one, other), max_tokens),
    }
