"""`a1q run` from the command line, on a plug-in's stages and without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from a1q.engine.world import World
from tests.cli.support import PLUGIN, RECIPE, ROOT, a1q, caches, process, report
from tests.report.test_trackers import FakeWandB


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "numbers.yaml"
    path.write_text(RECIPE)
    return path


def test_a_run_and_its_second_time(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "exactly" / "here"
    first = a1q("run", recipe, "-o", run, "--plugin", PLUGIN)
    assert first.exit_code == 0, first.output
    assert (run / "export" / "box" / "number.txt").read_text() == "3"
    assert (run / "recipe.yaml").read_text() == RECIPE
    assert "export box:" in first.output and "total 3" in first.output and "\x1b" not in first.output
    assert a1q("run", recipe, "-o", run, "--plugin", PLUGIN).exit_code == 0
    assert caches(run) == ["hit"] * 4
    assert [item["id"] for item in report(run)["stages"]] == ["begin", "more", "check", "box"]


def test_the_default_folder_is_stable_and_smoke_has_its_own(recipe: Path, tmp_path: Path) -> None:
    assert a1q("run", recipe, "--plugin", PLUGIN, "--smoke").exit_code == 0
    assert a1q("run", recipe, "--plugin", PLUGIN).exit_code == 0
    smoke, full = (report(tmp_path / "runs" / name) for name in ("numbers-smoke", "numbers"))
    assert [run["stages"][1]["metrics"]["steps"] for run in (smoke, full)] == [1, 5]
    assert caches(tmp_path / "runs" / "numbers") == ["miss"] * 4


def test_one_changed_number_runs_from_there(recipe: Path, tmp_path: Path) -> None:
    a1q("run", recipe, "--plugin", PLUGIN)
    changed = a1q("run", recipe, "--plugin", PLUGIN, "--set", "stages.check.most=50")
    assert changed.exit_code == 0, changed.output
    assert caches(tmp_path / "runs" / "numbers") == ["hit", "hit", "miss", "hit"]
    assert a1q("run", recipe, "--plugin", PLUGIN, "--set", "stages.more.value=5").exit_code == 0
    assert caches(tmp_path / "runs" / "numbers") == ["hit", "miss", "miss", "miss"]


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (["--only", "box"], ["begin", "more", "box"]),
        (["--until", "more"], ["begin", "more"]),
        (["--from", "check", "--until", "check"], ["begin", "more", "check"]),
    ],
)
def test_selection(recipe: Path, tmp_path: Path, options: list[str], ids: list[str]) -> None:
    result = a1q("run", recipe, "--plugin", PLUGIN, *options)
    assert result.exit_code == 0, result.output
    assert [item["id"] for item in report(tmp_path / "runs" / "numbers")["stages"]] == ids


def test_force_and_no_cache(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "numbers"
    a1q("run", recipe, "--plugin", PLUGIN)
    a1q("run", recipe, "--plugin", PLUGIN, "--force", "--only", "more")
    assert caches(run) == ["hit", "miss"]
    a1q("run", recipe, "--plugin", PLUGIN, "--no-cache")
    assert caches(run) == ["miss"] * 4 and (run / "store").is_dir()


def test_a_failed_gate_exits_4_both_times_and_keeps_the_figure(recipe: Path, tmp_path: Path) -> None:
    for cache in ("miss", "hit"):
        result = a1q("run", recipe, "--plugin", PLUGIN, "--set", "stages.check.most=2")
        assert result.exit_code == 4
        assert "stage check: total 3 is more than 2" in result.output and "Traceback" not in result.output
        found = report(tmp_path / "runs" / "numbers")
        assert found["status"] == "gate failed"
        assert (found["stages"][-1]["cache"], found["stages"][-1]["metrics"]["total"]) == (cache, 3)


def test_a_failing_stage_exits_1_and_the_table_says_where(recipe: Path) -> None:
    result = a1q("run", recipe, "--plugin", PLUGIN, "--set", "stages.box.value=-1")
    assert result.exit_code == 1
    assert "in stage box: a package can't be negative" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--only", "boxx"], 2, "there is no such stage; this recipe has begin, more, check, box"),
        (["--set", "stages.more.valeu=1"], 2, "value"),
        (["--plugin", "missing.py"], 2, "missing.py"),
        (["-o", "numbers.yaml"], 2, "is a file"),
    ],
)
def test_a_users_mistake_changes_nothing(
    recipe: Path, tmp_path: Path, options: list[str], code: int, text: str
) -> None:
    result = a1q("run", recipe, "--plugin", PLUGIN, *options)
    assert result.exit_code == code, result.output
    assert text in result.output and "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.yaml"]


def test_json_lines(recipe: Path) -> None:
    good = a1q("run", recipe, "--plugin", PLUGIN, "--json")
    events = [json.loads(line) for line in good.stdout.splitlines()]
    assert [item["event"] for item in events if item["event"] != "progress"] == [
        "run_start",
        *["stage_start", "stage_run", "stage_end"] * 4,
        "run_end",
    ]
    assert {"id": "more", "step": 5, "total": 5, "loss": 0.2}.items() <= next(
        item.items() for item in reversed(events) if item["event"] == "progress" and item["id"] == "more"
    )
    bad = a1q("run", recipe, "--plugin", PLUGIN, "--json", "--set", "stages.more.valeu=1")
    last = json.loads(bad.stdout.splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("error", 2) and last["problems"][0]["path"] == "stages.more.valeu"


def test_a_tracker_looks_on_and_changes_no_key(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracked = a1q("run", recipe, "--plugin", PLUGIN, "--track", "wandb", "--track", "wandb")
    assert tracked.exit_code == 0, tracked.output
    (made,) = wandb.runs
    assert made.asked["name"] == "numbers" and made.asked["config"]["seed"] == 7
    assert {"more/step": 5, "more/loss": 0.2, "more/tokens_per_second": 1000.0} in made.logged
    assert made.ended == 0
    assert a1q("run", recipe, "--plugin", PLUGIN).exit_code == 0
    assert caches(tmp_path / "runs" / "numbers") == ["hit"] * 4


def test_a_tracker_whose_package_is_missing_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("a1q.report.trackers.find_spec", lambda name: None)
    result = a1q("run", recipe, "--plugin", PLUGIN, "--track", "tensorboard")
    assert result.exit_code == 3 and 'pip install "a1q[tensorboard]"' in result.output
    assert "Traceback" not in result.output and not (tmp_path / "runs").exists()


def test_only_the_leading_process_has_trackers(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    monkeypatch.setattr("a1q.engine.run.run_plan", lambda *given: heard.append(len(given[3])))
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB())
    for rank in (0, 1):
        monkeypatch.setattr("a1q.engine.world.world_here", lambda rank=rank: World(rank, 2))
        assert a1q("run", recipe, "--plugin", PLUGIN, "--track", "wandb").exit_code == 0
    assert heard == [2, 1]


def test_kill_and_the_same_command_again(recipe: Path, tmp_path: Path) -> None:
    command = ["run", recipe, "-o", tmp_path / "run", "--plugin", PLUGIN, "--set", "stages.more.die_at=3"]
    assert process(*command, home=tmp_path / "home").returncode == -9
    second = process(*command, home=tmp_path / "home")
    assert second.returncode == 0, second.stderr
    assert caches(tmp_path / "run") == ["hit", "miss", "miss", "miss"]


def test_editing_a_plug_in_file_reruns_its_stages(recipe: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(PLUGIN.read_text())
    run = tmp_path / "run"
    assert process("run", recipe, "-o", run, "--plugin", own, home=tmp_path / "home").returncode == 0
    own.write_text(PLUGIN.read_text().replace("start + ctx.config.value", "start + ctx.config.value + 10"))
    assert process("run", recipe, "-o", run, "--plugin", own, home=tmp_path / "home").returncode == 0
    assert caches(run) == ["miss"] * 4
    assert (run / "export" / "box" / "number.txt").read_text() == "33"


def test_a_third_party_package_brings_stages_by_entry_points(recipe: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "numbers_stages-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "numbers_stages.py").write_text(PLUGIN.read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numbers-stages\nVersion: 1.0\n")
    names = {"begin": "Begin", "add": "Add", "limit": "Limit", "ship": "Ship"}
    points = "".join(f"{name} = numbers_stages:{cls}\n" for name, cls in names.items())
    (info / "entry_points.txt").write_text(f"[a1q.stages]\n{points}")
    run = tmp_path / "run"
    result = process("run", recipe, "-o", run, home=tmp_path / "home", python_path=site)
    assert result.returncode == 0, result.stderr
    assert (run / "export" / "box" / "number.txt").read_text() == "3"
    plugins = json.loads((run / "lock.json").read_text())["keys"]["more"]["plugins"]
    assert len(plugins["stages/add"]) == 64


def test_a_fully_cached_run_imports_nothing_heavy(recipe: Path, tmp_path: Path) -> None:
    import os
    import subprocess

    command = ["run", str(recipe), "-o", str(tmp_path / "run"), "--plugin", str(PLUGIN)]
    assert process(*command, home=tmp_path / "home").returncode == 0
    code = (
        "import sys; from a1q.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('HEAVY', sorted({'torch', 'transformers', 'numpy', 'coremltools', 'datasets', 'peft'} "
        "& set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env={**os.environ, "A1Q_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert caches(tmp_path / "run") == ["hit"] * 4
    assert "HEAVY []" in done.stdout
