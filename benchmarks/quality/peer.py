"""Other libraries: a program per method below `peers/`, run by the Python of the peers' own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.errors import StageError
from benchmarks.quality.job import Job, Outcome
from benchmarks.quality.protocol import THREADS, write_tokens

PROGRAMS = Path(__file__).parent / "peers"
ROOT = Path(__file__).parents[2]
VARIABLE = "A1Q_PEERS_PYTHON"
SHOWN = 30
"""Lines of a failed program's last words."""


def python() -> Path:
    """The Python of the peers' environment: `$A1Q_PEERS_PYTHON`, or the one that `peers/setup.sh` makes.

    Raises:
        StageError: if there is none.
    """
    path = Path(os.environ.get(VARIABLE) or ROOT / ".venv-peers" / "bin" / "python")
    if not path.is_file():
        raise StageError(
            f"the peers' Python is not at {path}; run benchmarks/quality/peers/setup.sh, or set {VARIABLE}"
        )
    return path


def run(job: Job, options: Mapping[str, Any]) -> Outcome:
    """Run `peers/PROGRAM.py`, `options["program"]` being its name, with the other options and the setting's bits.

    Raises:
        StageError: if the program fails, with its last lines.
    """
    from safetensors.torch import load_file

    tokens, out, written = (job.scratch / name for name in ("tokens.safetensors", "out", "job.json"))
    write_tokens(tokens, job.tokens)
    written.write_text(json.dumps(description(job, options, tokens, out)), encoding="utf-8")
    program = PROGRAMS / f"{options['program']}.py"
    command = [str(python()), str(program), str(written)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        last = "\n".join(done.stdout.decode("utf-8", "replace").splitlines()[-SHOWN:])
        raise StageError(f"{program.name} ended with {done.returncode}:\n{last}")
    found = json.loads((out / "result.json").read_text(encoding="utf-8"))
    weights = load_file(out / "weights.safetensors")
    if sum(weight.numel() for weight in weights.values()) != found["weights"]:
        raise StageError(f"{program.name} says it has {found['weights']} weights, and wrote others")
    known = ("bits", "weights", "seconds", "peak_rss_bytes")
    facts = {name: value for name, value in found.items() if name not in known}
    return Outcome(weights, found["bits"], {"fit": found["seconds"]}, facts, found["peak_rss_bytes"])


def description(job: Job, options: Mapping[str, Any], tokens: Path, out: Path) -> dict[str, Any]:
    """The job's file, as `peers/common.py` reads it."""
    given = {name: value for name, value in options.items() if name != "program"}
    bits: Any = job.setting.bits
    given["bits"] = bits if isinstance(bits, int) else dict(bits)
    if job.lr is not None:
        given["lr"] = job.lr
    return {
        "model": str(job.teacher),
        "tokens": str(tokens),
        "out": str(out),
        "seed": job.seed,
        "threads": THREADS,
        "options": given,
    }


def pins() -> str:
    """Digest of the pinned versions of the peers' environments."""
    from a1q.engine.digests import content_digest

    return content_digest(PROGRAMS, [path.name for path in PROGRAMS.glob("requirements*.txt")])
