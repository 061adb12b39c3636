"""What the peers' programs share: the job they read, how they count bits, and the result they write.

A program sees a model, calibration and training tokens; never the text it is judged on. The weights it hands back are
checked three times: they lie on the grid that was paid for, they compute what the library's own model computes, and
nothing but the quantized linears is written.
"""

from __future__ import annotations

import difflib
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALE_BITS = 16
"""A group's scale is stored in fp16."""
CHECKED_SEQUENCES = 4
LOGITS_TOLERANCE = 1e-5
"""Of the largest logit: float32 rounding in another order stays well below, a wrong weight far above."""


class JobError(Exception):
    """A job that can't be run as written."""


@dataclass(frozen=True)
class Job:
    """One run of one method."""

    model: Path
    """A Hugging Face folder."""
    calibration: Tensor
    """int64 [n, 128]"""
    training: Tensor
    """int64 [3200, 128], in the order of training."""
    out: Path
    seed: int
    threads: int
    options: dict[str, Any]
    """The program's defaults with the job's changes."""


@dataclass(frozen=True)
class Quantized:
    """What a method gives back."""

    weights: dict[str, Tensor]
    """The float32 weight [out, in] of every quantized linear, by its parameter's name, as the stored parts give it."""
    bits: int
    """Everything stored for them: indices, scales, zero points, tables."""
    model: torch.nn.Module
    """The library's own model."""
    exact: dict[str, Tensor]
    """The weights that `model` answers with: those stored, but for scales that are kept in fp16 only when stored."""
    found: dict[str, Any] | None = None
    """What the method wants to report besides."""


def main(quantize: Callable[[torch.nn.Module, Job], Quantized], defaults: Mapping[str, Any], packages: Sequence[str]):
    """Run `quantize` on the job named by the command line and write what it found.

    Args:
        quantize: gets the model (float32, evaluation mode) and the job; may change the model. Its time is the result's.
        defaults: every option the program knows.
        packages: whose versions the result names, besides torch and transformers.
    """
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} JOB.json")
    try:
        run(Path(sys.argv[1]), quantize, defaults, packages)
    except JobError as error:
        sys.exit(f"error: {error}")


def run(path: Path, quantize: Callable[..., Quantized], defaults: Mapping[str, Any], packages: Sequence[str]) -> None:
    """The program behind `main`."""
    import torch
    from safetensors.torch import load_file, save_file

    written = read_job(path)
    options = merge_options(defaults, written["options"])
    tokens = load_file(written["tokens"])
    job = Job(
        Path(written["model"]), tokens["calibration"], tokens["training"], Path(written["out"]),
        written["seed"], written["threads"], options,
    )  # fmt: skip
    torch.set_num_threads(job.threads)
    random.seed(job.seed)
    torch.manual_seed(job.seed)
    model = load_model(job.model)
    linears = quantized_linears(model)

    began = time.perf_counter()
    result = quantize(model, job)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    wanted = {f"{name}.weight" for name in linears}
    if set(result.weights) != wanted or set(result.exact) != wanted:
        raise RuntimeError("the method's weights are not those of the linears of the decoder layers")
    difference = logits_difference(job, result.model, result.exact)
    job.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "bits": result.bits,
        "weights": sum(weight.numel() for weight in result.weights.values()),
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
        "options": options,
        "logits_difference": difference,
        **(result.found or {}),
    }
    save_file({name: weight.contiguous() for name, weight in result.weights.items()}, job.out / "weights.safetensors")
    aside = job.out / f".result.{os.getpid()}"
    aside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, job.out / "result.json")  # last: a result that is there is whole


def read_job(path: Path) -> dict[str, Any]:
    """The job's file, its names and types checked.

    Raises:
        JobError: if the file is no job.
    """
    kinds = {"model": str, "tokens": str, "out": str, "seed": int, "threads": int, "options": dict}
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{path} can't be read: {error}") from None
    if not isinstance(job, dict) or set(job) != set(kinds):
        raise JobError(f"{path} must be an object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(job[name], kind) or isinstance(job[name], bool):
            raise JobError(f"{path}: {name} must be of type {kind.__name__}")
    return job


def merge_options(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the job's changes.

    Raises:
        JobError: if an option is unknown; with the nearest one that is known.
    """
    for name in options:
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(defaults)}"
            raise JobError(f"there is no option {name}; {hint}")
    return {**defaults, **options}


def layer_bits(bits: int | Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Bits of each linear, from one number or from `{pattern: bits}` as in `{"*.mlp.*": 2, "*.self_attn.*": 4}`.

    Raises:
        JobError: unless every name matches exactly one pattern, and every pattern some name.
    """
    if isinstance(bits, int):
        return dict.fromkeys(names, bits)
    found = {}
    for name in names:
        matching = [pattern for pattern in bits if fnmatchcase(name, pattern)]
        if len(matching) != 1:
            raise JobError(f"{name} matches {' and '.join(matching) or 'no pattern'} in bits; it must match one")
        found[name] = bits[matching[0]]
    for pattern in bits:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise JobError(f"the pattern {pattern} in bits matches nothing")
    return found


def group_bits(shape: Sequence[int], bits: int, group_size: int) -> int:
    """Stored bits of one weight [out, in]: an index each, and per group an fp16 scale and a zero point of `bits` bits.

    Raises:
        JobError: if the groups don't divide the rows.
    """
    rows, columns = shape
    if columns % group_size:
        raise JobError(f"groups of {group_size} don't divide rows of {columns} weights")
    return rows * columns * bits + rows * (columns // group_size) * (SCALE_BITS + bits)


def table_bits(bits: int) -> int:
    """Stored bits of one table of 2^bits values in fp16."""
    return 2**bits * SCALE_BITS


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """The weight as its stored parts give it: `fp16(scale) * (index - zero)`.

    Args:
        weight: float32 [out, in], dequantized by the library.
        scale: [out, in / group_size].
        zero: integers 0 .. 2^bits - 1 of any type, same shape.

    Returns:
        float32 [out, in].

    Raises:
        RuntimeError: if the weight isn't on the grid, or the grid needs more than `bits` bits.
    """
    scale, zero = scale.float()[..., None], zero.float()[..., None]
    parts = weight.unflatten(1, (-1, group_size))
    exact = parts / scale + zero
    index = exact.round()
    if (exact - index).abs().max() > 1e-3:  # an index off by float32 rounding is far nearer
        raise RuntimeError("the library's weights are not on the grid of its scales and zero points")
    for name, values in (("an index", index), ("a zero point", zero)):
        if values.min() < 0 or values.max() > 2**bits - 1 or (values != values.round()).any():
            raise RuntimeError(f"{name} doesn't fit {bits} bits: {values.min().item()} to {values.max().item()}")
    return (scale.half().float() * (index - zero)).flatten(1)


def load_model(folder: Path) -> torch.nn.Module:
    """The model in float32 and evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def quantized_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linears of the decoder layers by name; the head is none of them."""
    import torch

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def logits_difference(job: Job, model: torch.nn.Module, weights: Mapping[str, Tensor]) -> float:
    """The largest difference of `model`'s logits from a plain model's with `weights`, over the largest logit.

    Raises:
        RuntimeError: if it is more than rounding.
    """
    import torch

    plain = load_model(job.model)
    parameters = dict(plain.named_parameters())
    tokens = job.calibration[:CHECKED_SEQUENCES]
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
        expected = model.eval()(input_ids=tokens, use_cache=False).logits.float()
        answered = plain(input_ids=tokens, use_cache=False).logits
    difference = ((expected - answered).abs().max() / expected.abs().max()).item()
    if not difference <= LOGITS_TOLERANCE:
        raise RuntimeError(
            f"the weights written don't compute what the library computes: logits differ by {difference}"
        )
    return difference
