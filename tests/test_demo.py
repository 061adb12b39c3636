"""The demo recipe from end to end, shortened: what it writes, what it caches, and that killing it loses nothing."""

import json
import random
import subprocess
import sys

import pytest

from tests import demo

IDS = ["teacher", "calibrate", "q4", "q4_train", "q2", "q2_train", "recover", "final", "check", "hf", "ane", "anemll"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: (model folder, store, run folder)."""
    root = tmp_path_factory.mktemp("demo")
    model = demo.model_folder(root / "model")
    done = demo.run(demo.command(model, root / "run"), root / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    return model, root / "home", root / "run"


def test_the_report_has_every_stage_and_metric(finished):
    report = demo.report(finished[2])
    assert [stage["id"] for stage in report["stages"]] == IDS
    assert {stage["cache"] for stage in report["stages"]} == {"miss"}
    metrics = {stage["id"]: stage["metrics"] for stage in report["stages"]}
    assert {"kl", "ppl", "teacher_ppl", "top1", "bpw", "bpw_model"} <= set(metrics["check"])
    assert 0 < metrics["check"]["kl"] < 5 and 2 < metrics["check"]["bpw"] < 5
    assert {"kl_before", "kl_after"} <= set(metrics["q2"])
    assert metrics["hf"]["cosine"] > 0.9999
    assert metrics["ane"]["cosine_fp32"] > 0.9999 and metrics["ane"]["greedy_agreement_fp32"] == 1.0


def test_the_exports_are_there_and_plain_transformers_loads_one(finished):
    _, _, out = finished
    assert (out / "export" / "ane" / "model.mlpackage" / "Manifest.json").is_file()
    code = (
        "import sys; sys.modules['a1q'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder = sys.argv[1]\n"
        "tokens = AutoTokenizer.from_pretrained(folder)('Return a list', return_tensors='pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "print(model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1] - tokens.input_ids.shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, out / "export" / "hf"], capture_output=True, text=True)
    assert done.stdout.strip() == "4", done.stderr[-2000:]


def test_unchanged_is_all_hits_and_one_number_reruns_from_there(finished, tmp_path):
    model, home, out = finished
    before = demo.digests(out)
    again = demo.run(demo.command(model, tmp_path / "again"), home)
    assert again.returncode == 0, again.stderr[-2000:]
    assert {stage["cache"] for stage in demo.report(tmp_path / "again")["stages"]} == {"hit"}
    assert demo.digests(tmp_path / "again") == before
    changed = demo.run(demo.command(model, tmp_path / "changed", {"stages.q2_train.steps": 5}), home)
    assert changed.returncode == 0, changed.stderr[-2000:]
    cache = {stage["id"]: stage["cache"] for stage in demo.report(tmp_path / "changed")["stages"]}
    assert [name for name in IDS if cache[name] == "miss"] == IDS[IDS.index("q2_train") :]


def test_killed_once_in_every_stage_it_ends_the_same(finished, tmp_path):
    model, _, out = finished
    arguments = demo.command(model, tmp_path / "run")
    for name in IDS:
        # The first sign of work inside the stage: it has begun and, where it counts steps, made one.
        started = demo.run_until(
            arguments,
            tmp_path / "home",
            lambda event, name=name: event.get("id") == name and event["event"] in ("progress", "stage_run"),
        )
        assert started is None, f"{name} was never reached"
    done = demo.run(arguments, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-2000:]
    assert demo.digests(tmp_path / "run") == demo.digests(out)


def test_smoke_goes_through_every_stage(finished, tmp_path):
    model, _, _ = finished
    changes = {"stages.check.gate": "{kl: {max: 0.0001}}"}
    done = demo.run(demo.command(model, tmp_path / "run", changes, "--smoke"), tmp_path / "home")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [stage["id"] for stage in demo.report(tmp_path / "run")["stages"]] == IDS


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_the_same(finished, tmp_path):
    """`make test-slow`: kill -9 anywhere, imports and publications included, then the same command again."""
    model, _, out = finished
    expected, duration = demo.digests(out), sum(stage["seconds"] for stage in demo.report(out)["stages"])
    generator = random.Random(2026)
    unfinished = 0
    for number in range(10):
        home, folder = tmp_path / f"home{number}", tmp_path / f"run{number}"
        arguments = demo.command(model, folder)
        process = subprocess.Popen(
            arguments, env=demo.environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(generator.uniform(0.3, duration))
        except subprocess.TimeoutExpired:
            unfinished += 1
        process.kill()
        process.wait()
        done = demo.run(arguments, home)
        assert done.returncode == 0, done.stderr[-2000:]
        assert demo.digests(folder) == expected, f"kill number {number}"
    assert unfinished >= 8  # the kills did meet running processes


def test_the_readme_recipe_is_valid(tmp_path):
    text = (demo.RECIPE.parent.parent / "README.md").read_text(encoding="utf-8")
    start = text.index("    a1q: 1")
    lines = text[start : text.index("\n\n", start)].splitlines()
    recipe = tmp_path / "readme.yaml"
    recipe.write_text("\n".join(line[4:] for line in lines) + "\n", encoding="utf-8")
    model = demo.model_folder(tmp_path / "model")
    sets = ["--set", f"model.source={model}", "--set", "groups.mlp.expect=6"]
    arguments = [sys.executable, "-m", "a1q", "plan", str(recipe), "--json", *sets]
    done = subprocess.run(arguments, capture_output=True, text=True, env=demo.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [stage["stage"] for stage in json.loads(done.stdout)["stages"]][-1] == "export"
