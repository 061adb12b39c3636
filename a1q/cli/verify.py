"""`a1q verify`: does a Core ML package compute what its model computes?"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from a1q.cli.common import Number, errors_as_json, json_option, print_json
from a1q.coreml.thresholds import SECOND_CHUNK, Verify, default_verify
from a1q.errors import GateError

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle
    from a1q.coreml.device import ComputeUnits
    from a1q.coreml.verify import Report

DEFAULT = default_verify()
UNITS = ("CPU_AND_NE", "ALL", "CPU_AND_GPU", "CPU_ONLY")
COUNT = click.IntRange(min=0)

SHARE, COSINE = Number(0, 1), Number(-1, 1)


@click.command(
    epilog="""\b
Examples:
  a1q verify runs/q4-to-q2/export/ane --against runs/q4-to-q2:final
  a1q verify q4-to-q2:ane --against q4-to-q2:final --lint
  a1q verify exported/model.mlpackage --against Qwen/Qwen3-0.6B --prompt 32 --generate 8 --random 0
"""
)
@click.argument("package")
@click.option("--against", required=True, metavar="MODEL", help="The model: a folder, Hub id, run or RUN:STAGE_ID.")
@click.option(
    "--prompt",
    type=COUNT,
    help=f"Tokens of text; 0 for none.  [default: {SECOND_CHUNK} more than the package's prefill]",
)
@click.option(
    "--generate", type=COUNT, default=DEFAULT.generate, show_default=True, help="Tokens the model adds to it."
)
@click.option("--random", type=COUNT, default=DEFAULT.random, show_default=True, help="Random tokens, apart from it.")
@click.option(
    "--min-cosine", type=COSINE, default=DEFAULT.min_cosine, show_default=True, help="Of any position, in fp32."
)
@click.option(
    "--min-cosine-fp16", type=COSINE, default=DEFAULT.min_cosine_fp16, show_default=True, help="The same in fp16."
)
@click.option(
    "--max-error",
    type=Number(min=0, min_open=True),
    default=DEFAULT.max_error,
    show_default=True,
    help="Of a logit in fp32, over the standard deviation of its position's logits.",
)
@click.option(
    "--min-agreement",
    type=SHARE,
    default=DEFAULT.min_agreement,
    show_default=True,
    help="Share of the model's own continuation that the package writes too, in fp32.",
)
@click.option("--adapter", metavar="NAME", help="Check the functions infer_NAME; `base` is the model without adapters.")
@click.option("--lint", is_flag=True, help="Print what the Neural Engine may dislike, each with its source.")
@click.option("--compute-units", type=click.Choice(UNITS), default=UNITS[0], show_default=True, help="On a Mac.")
@click.option("--placements", is_flag=True, help="On a Mac: print where every operation would run.")
@click.option(
    "--compile", "compile_to", type=click.Path(path_type=Path), metavar="DIR", help="On a Mac: write .mlmodelc."
)
@json_option
def command(
    package: str,
    against: str,
    adapter: str | None,
    lint: bool,
    placements: bool,
    compute_units: ComputeUnits,
    compile_to: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Run PACKAGE, an exported folder or one of its packages, without a Mac, and compare every logit with the model's.

    The saved files are interpreted in fp32, which shows whether they say what the model says, and in fp16 with
    rounding after each operation, which shows whether the numbers fit. On a Mac, Core ML itself runs too. Exit code 4
    if a threshold is missed, 3 if PACKAGE is damaged or of another model.
    """
    from a1q.coreml.device import require
    from a1q.report.verification import text_of

    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the libraries between our lines

    with errors_as_json(as_json):
        if compile_to is not None:
            require(f"a1q verify {package} --against {against} --compile {compile_to}")
        found = _examine(package, against, Verify(**asked), adapter, compute_units, compile_to)
    if as_json:
        print_json(found)
    else:
        click.echo(text_of(found, lint=lint, placements=placements))
    if found["failures"]:
        reasons = "\n    ".join(found["failures"])
        raise GateError(f"{found['package']} does not compute what {against} computes:\n    {reasons}")


def _examine(
    package: str, against: str, wanted: Verify, adapter: str | None, units: ComputeUnits, compile_to: Path | None
) -> dict[str, Any]:
    """Everything that is found out about a package, as JSON says it.

    Raises:
        MismatchError: if the package is damaged, or not of this model.
        UsageError: if the tokens do not fit its context.
    """
    from a1q.coreml.accounting import account_bundle
    from a1q.coreml.bundle import read_bundle
    from a1q.coreml.lint import lint_bundle
    from a1q.coreml.matching import require_match
    from a1q.coreml.runner import check_adapter
    from a1q.models.locate import locate_folder, locate_model
    from a1q.models.view import read_view

    stage_of_run = ":" in package and not Path(package).exists()
    bundle = read_bundle(locate_folder(package) if stage_of_run else Path(package).expanduser())
    check_adapter(bundle, adapter)
    folder = locate_model(against)
    require_match(bundle, folder)
    report = _compare(bundle, folder, wanted, adapter, units)
    return {
        "ok": not report.failures,
        "package": str(bundle.folder),
        "against": against,
        "model": str(folder),
        "layout": bundle.meta["layout"],
        "tokens": {
            "prompt": wanted.prompt_length(int(bundle.meta["prefill"])),
            "generate": wanted.generate,
            "random": wanted.random,
        },
        "figures": {way: figures.as_json() for way, figures in report.figures.items()},
        "repalettized": bundle.meta.get("repalettized", {}),
        "trace": report.trace(),
        "failures": report.failures,
        "costs": asdict(account_bundle(bundle, read_view(folder).parameters)),
        "lint": [asdict(finding) | {"text": str(finding)} for finding in lint_bundle(bundle)],
        "coreml": _core_ml(bundle, units, compile_to) | {"command": f"a1q verify {package} --against {against}"},
    }


def _compare(bundle: Bundle, folder: Path, wanted: Verify, adapter: str | None, units: ComputeUnits) -> Report:
    """Model first, then package, so that never both are in memory."""
    from a1q.coreml.architecture import read_architecture
    from a1q.coreml.device import CoreMLBackend, available
    from a1q.coreml.reference import beyond_window, load_for_package, references, sequences
    from a1q.coreml.stored import differences
    from a1q.coreml.verify import PRECISIONS, check_length, total_calls, verify_bundle
    from a1q.coreml.weights import decoder_weights
    from a1q.models.view import read_view

    prefill = int(bundle.meta["prefill"])
    prompt = wanted.prompt_length(prefill)
    lengths = (prompt and prompt + wanted.generate, wanted.random)
    check_length(bundle, [length for length in lengths if length])
    beyond = beyond_window(read_architecture(read_view(folder).config), prefill, bundle.context)
    tokens = sequences(bundle.folder, bundle.vocabulary, prompt, wanted.generate, wanted.random, beyond)
    click.echo(f"running the model in {folder}", err=True)
    model = load_for_package(folder, adapter != "base", bundle.meta.get("repalettized"))
    unequal = differences(bundle, decoder_weights(model))
    expected = references(model, tokens)
    del model
    device = CoreMLBackend(bundle, units) if available() is None else None
    calls = total_calls(expected, prefill, len(PRECISIONS) + (device is not None))
    click.echo(f"running the package in {bundle.folder}, {calls} calls", err=True)
    with click.progressbar(length=calls, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        report = verify_bundle(bundle, expected, wanted, lambda: bar.update(1), adapter, device)
    return replace(report, failures=unequal + report.failures)


def _core_ml(bundle: Bundle, units: ComputeUnits, compile_to: Path | None) -> dict[str, Any]:
    """What Core ML itself says, on a Mac: where each operation would run; elsewhere why it was not asked."""
    from a1q.coreml.device import available, compile_package, placements, summarize

    reason = available()
    if reason is not None:
        return {"ran": False, "reason": reason}
    paths = {part["name"]: bundle.folder / part["file"] for part in bundle.meta["parts"]}
    compiled = []
    if compile_to is not None:
        compile_to.mkdir(parents=True, exist_ok=True)
        compiled = [compile_package(path, compile_to / f"{path.stem}.mlmodelc") for path in paths.values()]
    found = {name: placements(path, units) for name, path in paths.items()}
    return {
        "ran": True,
        "compute_units": units,
        "compiled": [str(path) for path in compiled],
        "placement": {name: asdict(summarize(items)) for name, items in found.items()},
        "operations": {name: [asdict(item) for item in items] for name, items in found.items()},
    }
