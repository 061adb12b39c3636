"""`a1q generate`: let a model write."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from a1q.cli.common import errors_as_json, json_option, print_json
from a1q.errors import MismatchError, StageError, UsageError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")


@click.command(
    epilog="""\b
Examples:
  a1q generate builtin:pico --prompt "Return the number of"
  a1q generate runs/q4-to-q2 --prompt "Return the number of" --temperature 0
  a1q generate q4-to-q2:q4_train --prompt - < prompt.txt
  a1q generate runs/q4-to-q2/export/hf --prompt "Raise" --json
  a1q generate runs/q4-to-q2/export/ane --prompt "Raise"       a Core ML package
"""
)
@click.argument("model")
@click.option("--prompt", default="-", metavar="TEXT", help="Text to continue; `-` reads standard input.  [default: -]")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens to write.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0 takes the likeliest token."
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.95,
    show_default=True,
    help="Draw from the likeliest tokens that together have this probability.",
)
@click.option(
    "--seed", type=click.IntRange(min=0, max=2**63 - 1), default=0, show_default=True, help="Same seed, same text."
)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="For models.")
@click.option(
    "--precision",
    type=click.Choice(("fp32", "fp16")),
    default="fp16",
    show_default=True,
    help="For Core ML packages off a Mac: how the interpreter rounds.",
)
@json_option
def command(
    model: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
    precision: Literal["fp32", "fp16"],
    as_json: bool,
) -> None:
    """Continue a prompt with MODEL: `builtin:pico`, a model or exported folder, a Hub id, a run (its last model) or
    RUN:STAGE_ID. Bits, ranks and shapes are read from the model. A Core ML package is run by Core ML on a Mac, and
    interpreted elsewhere.

    The text goes to standard output as it is written, the speed to standard error.
    """
    with errors_as_json(as_json):
        from a1q.models.locate import is_core_ml, locate_folder

        text = _read_prompt(prompt)
        folder = locate_folder(model)
        stream = not as_json
        if is_core_ml(folder):
            if device != "auto":
                raise UsageError(f"--device {device} is for models; {folder} is a Core ML package")
            facts = _generate_with_package(folder, text, max_tokens, (temperature, top_p, seed), precision, stream)
        else:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
            facts = _generate(
                folder, text, max_tokens, sampling if temperature else {"do_sample": False}, seed, device, stream
            )
    if as_json:
        print_json({"ok": True, "model": model, "folder": str(folder), "seed": seed, "prompt": text, **facts})
    else:
        click.echo(
            f"{facts['tokens']} tokens in {facts['seconds']:.1f} s, {facts['tokens_per_second']:.1f} tokens/s on "
            f"{facts['device']}, stopped at {facts['stopped_at']}",
            err=True,
        )


def _read_prompt(prompt: str) -> str:
    """The prompt's text, from standard input for `-`; there the last line's end is no part of it."""
    text = prompt
    if prompt == "-":
        if sys.stdin.isatty():
            click.echo("the prompt, ended with Ctrl-D:", err=True)
        try:
            text = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt on standard input is not UTF-8: {error}") from None
    if not text.strip():
        raise UsageError('the prompt is empty; give one with --prompt "Text", or on standard input')
    return text


def _generate(
    folder: Path, prompt: str, max_tokens: int, sampling: dict[str, Any], seed: int, device: str, stream: bool
) -> dict[str, Any]:
    """Load the model and let it continue the prompt, printing as it goes with `stream`.

    Raises:
        UsageError: if the prompt leaves no room in the model's context.
        MismatchError: if the model or its tokenizer can't be loaded, or there is no such device here.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the libraries between our lines
    import torch
    from transformers import GenerationConfig, TextStreamer

    from a1q.models.checkpoint import load_model
    from a1q.models.dense import write_out

    place = _device(device)
    tokenizer = _tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(place)
    length = inputs["input_ids"].shape[1]
    if not length:  # without its files transformers makes a tokenizer of no words
        raise MismatchError(f"the tokenizer of {folder} finds no token in the prompt; is its tokenizer.json there?")
    try:
        model = load_model(folder, device=place)
    except StageError as error:
        raise MismatchError(str(error)) from None
    context = model.config.max_position_embeddings
    _check_length(length, context, "model")
    write_out(model)
    ends = _end_tokens(folder, tokenizer, model.config.eos_token_id)
    model.generation_config = GenerationConfig()  # else its own sampling settings would fill in ours
    settings = GenerationConfig(
        max_new_tokens=min(max_tokens, context - length),
        eos_token_id=ends or None,
        pad_token_id=(ends or [0])[0],
        **sampling,
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    torch.manual_seed(seed)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs, generation_config=settings, streamer=streamer)
    written = output[0, length:].tolist()
    return _facts(tokenizer, length, written, ends, max_tokens, time.perf_counter() - start, str(place))


def _generate_with_package(
    folder: Path,
    prompt: str,
    max_tokens: int,
    sampling: tuple[float, float, int],
    precision: Literal["fp32", "fp16"],
    stream: bool,
) -> dict[str, Any]:
    """Let a Core ML package continue the prompt; `sampling` is (temperature, top_p, seed).

    Raises:
        UsageError: if the prompt leaves no room in the package's context.
        MismatchError: if the package is not whole, or its tokenizer is missing or another model's.
    """
    import numpy as np
    from transformers import TextStreamer

    from a1q.coreml.bundle import TOKENIZER, read_bundle
    from a1q.coreml.device import CoreMLBackend, available
    from a1q.coreml.runner import InterpreterBackend, make_runner
    from a1q.coreml.writing import Sampler, write

    bundle = read_bundle(folder)
    if not (folder / TOKENIZER).is_file():
        raise MismatchError(f"{folder} has no {TOKENIZER}, without which a package understands no text")
    tokenizer = _tokenizer(folder)
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise MismatchError(f"the tokenizer of {folder} finds no token in the prompt")
    _check_length(len(ids), bundle.context, "package")
    if max(ids) >= bundle.vocabulary:
        raise UsageError(f"the prompt has a token that this package does not know: {tokenizer.decode([max(ids)])!r}")
    ends = _end_tokens(folder, tokenizer, bundle.meta.get("eos_token_id"))
    backend = CoreMLBackend(bundle) if available() is None else InterpreterBackend(bundle, precision)
    runner = make_runner(bundle, backend)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    start, written = time.perf_counter(), []
    for token in write(runner, ids, min(max_tokens, bundle.context - len(ids)), ends, Sampler(*sampling)):
        written.append(token)
        if streamer is not None:
            streamer.put(np.array([token]))
    if streamer is not None:
        streamer.end()
    return _facts(tokenizer, len(ids), written, ends, max_tokens, time.perf_counter() - start, backend.name)


def _check_length(length: int, context: int, what: str) -> None:
    if length >= context:
        raise UsageError(
            f"the prompt has {length} tokens, and the {what}'s context of {context} must hold an answer too"
        )


def _facts(
    tokenizer: Any, length: int, written: list[int], ends: list[int], most: int, seconds: float, device: str
) -> dict[str, Any]:
    """What is told of the text that was written."""
    stopped_at = "--max-tokens" if len(written) == most else "the end of the context"
    return {
        "text": tokenizer.decode(written, skip_special_tokens=True),
        "prompt_tokens": length,
        "tokens": len(written),
        "seconds": seconds,
        "tokens_per_second": len(written) / seconds,
        "stopped_at": "the end of the text" if written[-1] in ends else stopped_at,
        "device": device,
    }


def _device(asked: str) -> torch.device:
    """The device to compute on.

    Raises:
        MismatchError: if it is not there.
    """
    import torch

    from a1q.training.device import available_devices

    found = available_devices()
    if asked not in ("auto", *found):
        raise MismatchError(f"--device {asked}: this machine has {', '.join(found)}")
    return torch.device(found[-1] if asked == "auto" else asked)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MismatchError(f"the tokenizer of {folder} can't be loaded: {reason}") from None


def _end_tokens(folder: Path, tokenizer: Any, usual: Any) -> list[int]:
    """The tokens that end a text: the model's own settings, else the tokenizer's, else the architecture's.

    Raises:
        MismatchError: if the model's own settings are damaged.
    """
    from transformers import GenerationConfig

    file, own = folder / "generation_config.json", None
    try:
        own = GenerationConfig.from_pretrained(folder) if file.is_file() else None
    except (ValueError, OSError, TypeError) as error:
        raise MismatchError(f"{file} is damaged: {error}") from None
    for ends in (own and own.eos_token_id, tokenizer.eos_token_id, usual):
        if ends is not None:
            return ends if isinstance(ends, list) else [ends]
    return []
