"""`a1q import`: checkpoints and caches of the ANEMLL-QUANT-1 training programs."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from a1q.cli.common import errors_as_json, json_option, print_json
from a1q.errors import UsageError

if TYPE_CHECKING:
    from a1q.importing.checkpoint import Checkpoint
    from a1q.importing.settings import Settings

TEXT = "builtin:prose"


@click.command(
    epilog="""\b
Examples:
  a1q import runs/v1/model_state_dict.pt --base Qwen/Qwen3-0.6B -o imported/v1
  a1q import runs/v2/best_state_dict.pt --base models/qwen3 -o imported/v2 --data mine.jsonl
  a1q import runs/lora/lora_only_state_dict.pt --base Qwen/Qwen3-0.6B -o imported/adapter
  a1q import caches/alpaca_chat_think_both_L64_K64_R128 --base Qwen/Qwen3-0.6B -o imported/text
"""
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="The dense model that was trained, or asked.  [default: by its config]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A new folder.")
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="What says how it was trained.  [default: beside]"
)
@click.option("--alpha", type=click.FloatRange(min=0, min_open=True), help="Of adapters, where no config says it.")
@click.option(
    "--latent",
    type=click.Choice(("keep", "drop")),
    default="keep",
    show_default=True,
    help="The weights that indices are derived from: needed to train weights further.",
)
@click.option("--data", default=TEXT, show_default=True, metavar="SOURCE", help="Text to compare with the base on.")
@click.option(
    "--sequences", type=click.IntRange(min=0), default=16, show_default=True, help="How many; 0 compares nothing."
)
@click.option("--seq-len", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens of each.")
@json_option
def command(
    checkpoint: Path,
    base: str | None,
    output: Path,
    config: Path | None,
    alpha: float | None,
    latent: str,
    data: str,
    sequences: int,
    seq_len: int,
    as_json: bool,
) -> None:
    """Make a model folder of a V1, V2 or Apple-style CHECKPOINT, an adapter folder of one that holds LoRA alone, or,
    of a folder of cached teacher answers, a text and a recipe that makes the answers anew.

    CHECKPOINT is a `.pt` file or its folder. Nothing in it is executed: a file that would have to be is refused. Bits,
    ranks and the version are read off its tensors and checked against the config beside it. What is taken from where
    stands in docs/importing.md.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the libraries between our lines
    with errors_as_json(as_json):
        found = _import(checkpoint, base, output, config, alpha, latent == "keep", (data, sequences, seq_len))
    if as_json:
        print_json(found)
    else:
        from a1q.report.imports import text_of

        click.echo(text_of(found))


def _import(
    path: Path,
    base: str | None,
    output: Path,
    config: Path | None,
    alpha: float | None,
    keep_latents: bool,
    text: tuple[str, int, int],
) -> dict[str, Any]:
    """Import whatever `path` is; returns what was found, as JSON says it."""
    from a1q.importing.caches import is_cache
    from a1q.importing.checkpoint import read_checkpoint
    from a1q.importing.model import refuse_existing
    from a1q.importing.settings import read_settings

    refuse_existing(output)
    if is_cache(path):
        return _cache(path, base, output, text[1])
    checkpoint = read_checkpoint(path, config)
    settings = read_settings(checkpoint)
    if alpha is not None:
        settings = replace(settings, alpha=alpha)
    name, folder = _base(base or settings.model_id)
    facts = {
        "checkpoint": str(checkpoint.path),
        "base": name,
        "config": checkpoint.config_from or None,
        "not_read": list(checkpoint.unread),
        "output": str(output),
    }
    if checkpoint.adapters_only:
        return facts | _adapters(checkpoint, settings, folder, output)
    return facts | _model(checkpoint, settings, folder, output, keep_latents, text)


def _base(name: str | None) -> tuple[str, Path]:
    """The base as it was named, and its folder.

    Raises:
        UsageError: if nothing names one.
        MismatchError: if there is no such model.
    """
    from a1q.models.locate import locate_model

    if name is None:
        raise UsageError("no config says which model was trained; name it: --base Qwen/Qwen3-0.6B, or a folder")
    return name, locate_model(name)


def _adapters(checkpoint: Checkpoint, settings: Settings, base: Path, output: Path) -> dict[str, Any]:
    from a1q.importing.adapters import write_adapters
    from a1q.importing.model import new_folder
    from a1q.models.view import read_view

    view = read_view(base)
    with new_folder(output) as folder:
        ranks = write_adapters(checkpoint, settings, view, folder)
    return {"kind": "adapter", "adapters": ranks, "alpha": settings.alpha}


def _model(
    checkpoint: Checkpoint,
    settings: Settings,
    base: Path,
    output: Path,
    keep_latents: bool,
    text: tuple[str, int, int],
) -> dict[str, Any]:
    from a1q.importing.measure import divergence, read_text
    from a1q.importing.model import import_model, new_folder, require_alpha, require_fit, write_model
    from a1q.models.view import read_view
    from a1q.quant.bits import bpw, bpw_model

    require_fit(checkpoint, read_view(base))
    require_alpha(checkpoint, settings)
    source, sequences, length = text
    tokens = read_text(source, base, sequences, length) if sequences else None  # before the work, as it may be refused
    with new_folder(output) as folder:
        model, report = import_model(checkpoint, settings, base, keep_latents, _told("modules read"))
        write_model(model, folder, checkpoint, settings, report, base)
        measured = None
        if tokens is not None:
            figures = divergence(model, base, tokens, _told("sequences compared"))
            measured = {**figures, "data": source, "sequences": sequences, "seq_len": length}
        view = read_view(folder)
    return {
        "kind": "model",
        "modules": report.modules,
        "kinds": report.kinds(),
        "schemes": report.schemes,
        "adapters": report.adapters,
        "alpha": settings.alpha,
        "weights": report.weights,
        "derived": report.derived,
        "differing": report.differing,
        "floored": report.floored,
        "floored_error": report.floored_error,
        "latents": report.latents,
        "from_base": report.from_base,
        "untied": report.untied,
        "bpw": bpw(view),
        "bpw_model": bpw_model(view),
        "against_base": measured,
    }


def _cache(path: Path, base: str | None, output: Path, sequences: int) -> dict[str, Any]:
    from a1q.importing.caches import RECIPE, TEXT, data_set, read_cache, same_first, write_recipe, write_text
    from a1q.importing.model import new_folder

    cache = read_cache(path)
    name, folder = _base(base or cache.teacher)
    with new_folder(output) as out:
        documents = write_text(cache, folder, out)
        sizes = write_recipe(cache, name, folder, out, output / TEXT)
        agreed = same_first(cache, folder, sequences, _told("sequences compared")) if sequences else None
    return {
        "kind": "cache",
        "cache": str(path),
        "base": name,
        "output": str(output),
        "recipe": str(output / RECIPE),
        "cached": {
            "sequences": len(cache.tokens),
            "seq_len": cache.tokens.shape[1],
            "top_k": cache.top_k,
            "random_negatives": cache.negatives,
        },
        "data_set": data_set(cache.meta),
        "same_first": agreed,
        **documents,
        **sizes,
    }


def _told(what: str) -> Any:
    """A progress line on a terminal's standard error; nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda done, total: None

    def tell(done: int, total: int) -> None:
        click.echo(f"\r{done} of {total} {what}", nl=done == total, err=True)

    return tell
