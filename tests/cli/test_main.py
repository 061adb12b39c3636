"""The command line as a whole: what is told without a traceback, and that JSON stays JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.support import PLUGIN, RECIPE, ROOT, a1q, process


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "numbers.yaml"
    path.write_text(RECIPE)
    return path


def test_names_that_are_not_utf8_are_refused_before_anything_is_written(recipe: Path) -> None:
    name = os.fsdecode(b"b\xffd")
    result = a1q("run", recipe, "-o", name, "--plugin", PLUGIN)
    assert result.exit_code == 2 and "argument 4, 'b\\udcffd', is not UTF-8" in result.output
    assert not Path(name).exists()


def test_a_current_folder_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = a1q("validate", "q4_to_q2")
    assert result.exit_code == 2 and "the current folder was removed" in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["ls"], ["schema"], ["run", "numbers.yaml", "--plugin", str(PLUGIN)]])
def test_standard_output_on_a_full_disk_is_told(recipe: Path, command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "a1q", *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode != 0
    assert "No space left on device" in done.stderr or "no space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [["validate"], ["plan"], ["run", "-o", "OUT"]])
def test_a_plug_in_that_prints_leaves_json_json(recipe: Path, tmp_path: Path, flags: list[str]) -> None:
    loud = PLUGIN.read_text().replace(
        "    def plan(self,",
        "    def plan(self, ctx):\n        print('noise')\n        return Outcome()\n\n    def quiet(self,",
    )
    loud = loud.replace("        before = ctx", "        print('noise')\n        before = ctx") + "\nprint('noise')\n"
    (tmp_path / "loud.py").write_text(loud)
    done = process(
        *flags[:1],
        recipe,
        "--plugin",
        tmp_path / "loud.py",
        "--json",
        *(flag.replace("OUT", str(tmp_path / "out")) for flag in flags[1:]),
        home=tmp_path / "home",
    )
    assert done.returncode == 0, done.stderr
    assert "noise" in done.stderr and "noise" not in done.stdout
    for document in done.stdout.splitlines() if flags[0] == "run" else [done.stdout]:
        json.loads(document)


def test_a_recipe_from_a_pipe(recipe: Path) -> None:
    command = f"{sys.executable} -m a1q validate <(cat {recipe}) --plugin {PLUGIN}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and "is a valid recipe: 4 stages" in done.stdout, done.stderr


@pytest.mark.parametrize(("name", "text"), [("", "is empty"), ("x" * 5000, "there is no recipe 'xxx")])
def test_odd_names_of_recipes(recipe: Path, name: str, text: str) -> None:
    result = a1q("validate", name)
    assert result.exit_code == 2 and text in result.output and len(result.output) < 1000


def test_ctrl_c_during_the_first_imports_leaves_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from a1q.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
