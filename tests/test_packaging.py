"""The wheel: what is inside, and that it works away from the sources and beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("exporters", "schemas", "recipes")
SOURCES = ("a1q", *LINKED, "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is left in the sources."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in SOURCES:
        source, target = ROOT / name, folder / "sources" / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "-q")
    subprocess.run([sys.executable, "-m", "pip", "wheel", folder / "sources", *options, "-w", folder], check=True)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The programs of a virtual environment that has the wheel, and everything else from this one."""
    folder = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    (own / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    subprocess.run([*pip, "--no-deps", "--no-index", "-q", wheel], check=True)
    return folder / "bin"


def test_everything_is_inside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    patterns = ("a1q/**/*.py", "a1q/models/pico/*", "a1q/py.typed")
    linked = ("exporters/*.py", "schemas/**/*.json", "recipes/**/*.yaml")
    files = [path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)]
    files += [f"a1q/{path.relative_to(ROOT).as_posix()}" for pattern in linked for path in ROOT.glob(pattern)]
    assert {"a1q/models/pico/model.safetensors", "a1q/recipes/q4_to_q2.yaml", "a1q/exporters/coreml.py"} <= set(files)
    assert not [name for name in files if name not in found]


def test_nothing_else_is_inside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"a1q"}


@pytest.mark.parametrize("beside_the_sources", [False, True])
def test_it_works_where_it_is_installed(installed: Path, tmp_path: Path, beside_the_sources: bool) -> None:
    def run(program: str, *arguments: str) -> str:
        return subprocess.run(
            [installed / program, *arguments],
            cwd=ROOT if beside_the_sources else tmp_path,
            env={**os.environ, "A1Q_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "generate" in run("a1q", "--help")
    listed = run("a1q", "ls")
    assert all(name in listed for name in ("q4_to_q2", "qwen3-0.6b/q4_to_q2", "lora_recover", "lut_lowrank", "coreml"))
    assert f"{installed.parent}/" in run("a1q", "validate", "q4_to_q2")
    assert "model.layers.{0..3}.mlp.gate_proj" in run("a1q", "plan", "q4_to_q2")
    assert "generate" in run("python", "-m", "a1q", "--help")
