"""`a1q doctor`: can this machine do the work?"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import click

from a1q import __version__
from a1q.cli.common import json_option, print_json

LOW_DISK = 5_000_000_000


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Check devices, bf16, MPS fallback, coremltools, disk and the Hub cache, and say what each means for a run."""
    facts = [*_machine(), *_devices(), *_coreml(), *_disk(), *_hub()]
    if as_json:
        print_json([{"ok": ok, "what": what, "found": found} for ok, what, found in facts])
        return
    for ok, what, found in facts:
        click.echo(f"{'ok  ' if ok else 'note'}  {what}: {found}")


Fact = tuple[bool, str, str]


def _machine() -> list[Fact]:
    from a1q.engine.cachekey import package_versions
    from a1q.engine.rundir import processor

    facts = [
        (True, "a1q", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        (True, "processor", f"{processor()}, {os.cpu_count()} cores"),
    ]
    return facts + [(bool(text), name, text or "not installed") for name, text in package_versions().items()]


def _devices() -> list[Fact]:
    from a1q.recipe.runtime import multiplies_bf16

    try:
        import torch
    except ImportError as error:
        return [(False, "devices", f"torch can't be imported ({error}); only validate and plan work")]
    bf16 = {True: "yes", False: "no, so `amp: bf16` is slow", None: "not known"}[multiplies_bf16()]
    facts = [(True, "device cpu", f"{torch.get_num_threads()} threads, bf16 instructions: {bf16}")]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        good = torch.cuda.is_bf16_supported()
        facts.append((good, "device cuda", f"{torch.cuda.get_device_name()}, {memory:.0f} GB, bf16 {_yes(good)}"))
    if torch.backends.mps.is_available():
        fallback = os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1"
        text = "on" if fallback else "off: set PYTORCH_ENABLE_MPS_FALLBACK=1 if an operation is not implemented on mps"
        facts.append((fallback, "device mps", f"available, CPU fallback {text}"))
    if len(facts) == 1:
        facts.append((True, "accelerator", "none; `device: auto` is cpu"))
    return facts


def _coreml() -> list[Fact]:
    from importlib.util import find_spec

    if find_spec("coremltools") is None:
        return [(False, "Core ML", "coremltools is not installed; `export: {format: coreml}` can't write")]
    if sys.platform == "darwin":
        return [(True, "Core ML", "packages can be written, compiled and run here")]
    return [(True, "Core ML", "packages can be written and verified here; running on the Neural Engine needs macOS")]


def _disk() -> list[Fact]:
    from a1q.engine.files import free_bytes, home
    from a1q.report.table import size

    facts = []
    for what, folder in (("store", home()), ("this folder", Path.cwd())):
        free = free_bytes(folder)
        facts.append((free > LOW_DISK, f"disk of {what}", f"{folder}: {size(free)} free"))
    place = next(path for path in (home(), *home().parents) if path.exists())
    if not os.access(place, os.W_OK):
        facts.append((False, "store", f"{place} can't be written; point A1Q_HOME elsewhere"))
    return facts


def _hub() -> list[Fact]:
    from a1q.report.table import size

    try:
        from huggingface_hub import constants, scan_cache_dir
    except ImportError:
        return [(False, "Hub cache", "huggingface_hub is not installed; only local and built-in models work")]
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.exists():
        found = f"{cache}: empty"
    else:
        scan = scan_cache_dir(cache)
        found = f"{cache}: {len(scan.repos)} repositories, {size(scan.size_on_disk)}"
    offline = ", offline by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""
    return [(True, "Hub cache", found + offline)]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
