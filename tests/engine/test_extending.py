"""The pages' examples, taken from docs/extending.md as they stand and run by the real command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.tiny import tiny_folder

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def run(*arguments: object, home: Path, path: object) -> subprocess.CompletedProcess[str]:
    """`python -m a1q` with `path` first on the import path."""
    environment = {**os.environ, "A1Q_HOME": str(home), "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "a1q", *(str(item) for item in arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home.parent, timeout=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


def recipe(tmp_path: Path, name: str, model: Path) -> Path:
    path = tmp_path / name
    path.write_text(BLOCKS[name].replace("builtin:pico", str(model)))
    return path


def test_the_page_has_every_example() -> None:
    assert list(BLOCKS) == [
        "schemas/stages/noise.json",
        "a1q/stages/noise.py",
        "noise.yaml",
        "sign.py",
        "sign.yaml",
        "a1q_npz.py",
        "pyproject.toml",
    ]


def test_the_toy_stage_in_the_tree(tmp_path: Path, model: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("a1q", "exporters", "schemas", "recipes"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("schemas/stages/noise.json", "a1q/stages/noise.py"):
        (tree / name).write_text(BLOCKS[name])
    noise, folder = recipe(tmp_path, "noise.yaml", model), tmp_path / "run"
    first = run("run", noise, "-o", folder, home=tmp_path / "home", path=tree)
    assert first.returncode == 0, first.stdout + first.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["stages"][0]["metrics"] == {"modules": 6}

    from safetensors.numpy import load_file

    before, after = load_file(model / "model.safetensors"), load_file(folder / "export" / "hf" / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        change = (after[name].astype("f4") - before[name]).std() / before[name].std()
        assert 0.045 < change < 0.055 if ".mlp." in name else change < 0.001

    second = run("run", noise, "-o", folder, home=tmp_path / "home", path=tree)
    assert second.returncode == 0, second.stderr
    assert [item["cache"] for item in json.loads((folder / "report.json").read_text())["stages"]] == ["hit", "hit"]

    noise.write_text(noise.read_text().replace("strength", "strenght"))
    wrong = run("plan", noise, home=tmp_path / "home", path=tree)
    assert wrong.returncode == 2 and "noise.yaml:8:28" in wrong.stderr and "'strength'" in wrong.stderr


def test_the_scheme_as_a_file_and_the_exporter_as_a_package(tmp_path: Path, model: Path) -> None:
    (tmp_path / "sign.py").write_text(BLOCKS["sign.py"])
    site = tmp_path / "site"
    info = site / "a1q_npz-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "a1q_npz.py").write_text(BLOCKS["a1q_npz.py"])
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a1q-npz\nVersion: 1.0\n")
    for group, points in tomllib.loads(BLOCKS["pyproject.toml"])["project"]["entry-points"].items():
        text = "".join(f"{name} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{text}")
    sign = recipe(tmp_path, "sign.yaml", model)
    sign.write_text(sign.read_text() + "  - id: arrays\n    export: {format: npz, compress: true}\n")
    arguments = (sign, "-o", tmp_path / "run", "--plugin", tmp_path / "sign.py")
    done = run("run", *arguments, home=tmp_path / "home", path=f"{site}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stdout + done.stderr

    import numpy
    from safetensors.numpy import load_file

    before = load_file(model / "model.safetensors")
    exported = load_file(tmp_path / "run" / "export" / "hf" / "model.safetensors")
    arrays = numpy.load(tmp_path / "run" / "export" / "arrays" / "weights.npz")
    assert set(arrays) == set(exported) == set(before)
    for name, weight in before.items():
        expected = weight
        if ".mlp." in name:
            expected = numpy.where(weight >= 0, 1, -1) * numpy.abs(weight).mean(1, keepdims=True)
        numpy.testing.assert_allclose(exported[name], expected, rtol=1e-3, atol=1e-6)
        numpy.testing.assert_array_equal(arrays[name], exported[name])
