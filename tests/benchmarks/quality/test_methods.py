from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from a1q.distill.evaluate import evaluate_model
from a1q.errors import StageError
from a1q.models.checkpoint import load_model
from benchmarks.quality import peer
from benchmarks.quality.configurations import CONFIGURATIONS, Budget
from benchmarks.quality.job import Job
from benchmarks.quality.measure import put_weights
from benchmarks.quality.methods import METHODS
from benchmarks.quality.own import EMBEDDING, specs_of
from benchmarks.quality.protocol import Tokens
from benchmarks.quality.settings import SETTINGS, Setting, bits_by_module
from benchmarks.quality.teachers import linears
from tests.tiny import tiny_folder

STEPS = 3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))  # no fit of a run before
    for name in ("a1q", "a1q-budget"):  # fewer steps, for time
        found = CONFIGURATIONS[name]
        short = replace(found, reconstruct=replace(found.reconstruct, steps=20))
        monkeypatch.setitem(CONFIGURATIONS, name, short)


def job(teacher, scratch, setting, lr=None):
    random = np.random.default_rng(0)
    tokens = Tokens(random.integers(320, size=(8, 16)), random.integers(320, size=(16 * STEPS, 16)))
    return Job(teacher, setting, tokens, 0, lr, scratch)


def quality(folder, outcome):
    model, student = load_model(folder), load_model(folder)
    put_weights(student, outcome.weights)
    return evaluate_model(student, model, np.random.default_rng(1).integers(320, size=(8, 16)))["kl"]


@pytest.mark.parametrize("name", ["a1q", "a1q-published", "rtn"])
def test_untrained_methods_give_all_linears_at_the_bits_they_count(teacher, tmp_path, name, monkeypatch):
    if name == "rtn":  # hidden 64, intermediate 96: groups of 32 divide both
        spec = {**CONFIGURATIONS["rtn"].specs[4]["*"], "group_size": 32}
        monkeypatch.setitem(CONFIGURATIONS["rtn"].specs, 4, {"*": spec})
    outcome = METHODS[name].run(job(teacher, tmp_path, Setting(4)))
    model = load_model(teacher)
    assert set(outcome.weights) == {f"{each}.weight" for each, _ in linears(model)}
    for each, linear in linears(model):
        weight = outcome.weights[f"{each}.weight"]
        dense = linear.weight.detach()
        assert weight.shape == dense.shape and float((weight - dense).norm() / dense.norm()) < 0.2
    count = sum(weight.numel() for weight in outcome.weights.values())
    assert 4 < outcome.bits / count < 6 and outcome.seconds["fit"] > 0
    assert 0 < quality(teacher, outcome) < 1


def test_training_lowers_the_loss_of_ours(teacher, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    before = METHODS["a1q"].run(job(teacher, tmp_path / "a", Setting(2)))
    after = METHODS["a1q"].run(job(teacher, tmp_path / "b", Setting(2, STEPS), lr=1e-3))
    assert len(after.facts["losses"]) == STEPS and after.seconds["train"] > 0
    assert after.bits == before.bits
    assert any(not torch.equal(after.weights[name], before.weights[name]) for name in before.weights)


def test_the_whole_model_has_a_quantized_embedding(teacher, tmp_path):
    outcome = METHODS["a1q"].run(job(teacher, tmp_path, Setting(2, whole=True)))
    assert f"{EMBEDDING}.weight" in outcome.weights
    assert quality(teacher, outcome) > 0


@pytest.mark.parametrize("name", ["seq", "dwq"])
def test_other_trained_methods_run_on_the_same_loop(teacher, tmp_path, name, monkeypatch):
    monkeypatch.setitem(METHODS[name].options, "group_size", 32)
    outcome = METHODS[name].run(job(teacher, tmp_path, Setting(2, STEPS), lr=1e-3))
    count = sum(weight.numel() for weight in outcome.weights.values())
    assert outcome.bits / count == {"seq": 2 + 16 / 32, "dwq": 2 + 32 / 32}[name]
    assert len(outcome.facts["losses"]) == STEPS


def test_every_setting_of_every_own_method_has_specs():
    names = [name for name, _ in linears(_tiny())]
    for method in METHODS.values():
        for setting in method.settings if method.runner == "own" else ():
            configuration = CONFIGURATIONS[method.options["configuration"]]
            found = specs_of(configuration, SETTINGS[setting], names)
            assert set(names) <= set(found)


def test_mixed_bits_are_told_by_pattern():
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
    assert list(bits_by_module(SETTINGS["w2a4"], names).values()) == [2, 4]


PROGRAM = """
import json, sys, numpy
from safetensors.numpy import load_file, save_file
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
if job["options"].get("fail"):
    sys.exit("error: the peer says why")
tokens = load_file(job["tokens"])
assert tokens["calibration"].dtype == numpy.int64
out = Path(job["out"]); out.mkdir()
name = "model.layers.0.mlp.up_proj.weight"
save_file({name: numpy.ones((96, 64), "float32")}, out / "weights.safetensors")
facts = {"bits": 7, "weights": job["options"].get("says", 96 * 64), "seconds": 1.5, "peak_rss_bytes": 9,
         "versions": {"x": "1"}, "options": job["options"]}
(out / "result.json").write_text(json.dumps(facts))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "fake.py").write_text(PROGRAM)
    monkeypatch.setattr(peer, "PROGRAMS", tmp_path / "programs")
    monkeypatch.setenv(peer.VARIABLE, sys.executable)
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def test_a_peer_gets_the_job_and_gives_weights(teacher, program):
    outcome = peer.run(job(teacher, program, SETTINGS["w2a4"], lr=1e-3), {"program": "fake", "group_size": 64})
    assert outcome.bits == 7 and outcome.peak_bytes == 9 and outcome.seconds == {"fit": 1.5}
    assert outcome.facts["versions"] == {"x": "1"}
    assert outcome.facts["options"] == {"group_size": 64, "lr": 1e-3, "bits": {"*.mlp.*": 2, "*.self_attn.*": 4}}
    assert set(json.loads((program / "job.json").read_text())) == {
        "model",
        "tokens",
        "out",
        "seed",
        "threads",
        "options",
    }


def test_a_peer_that_fails_is_told_with_its_last_words(teacher, program):
    with pytest.raises(StageError, match="the peer says why"):
        peer.run(job(teacher, program, Setting(2)), {"program": "fake", "fail": True})


def test_a_peer_that_miscounts_is_refused(teacher, program):
    with pytest.raises(StageError, match="says it has 5 weights"):
        peer.run(job(teacher, program, Setting(2)), {"program": "fake", "says": 5})


def test_peers_without_their_python_are_told_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv(peer.VARIABLE, str(tmp_path / "python"))
    with pytest.raises(StageError, match=r"setup\.sh"):
        peer.python()


def test_weights_of_another_model_are_refused():
    model = _tiny()
    with pytest.raises(ValueError, match="no parameter nix"):
        put_weights(model, {"nix": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        put_weights(model, {"model.norm.weight": torch.zeros(1)})


def _tiny():
    from tests.tiny import tiny_model

    return tiny_model()


def test_a_budget_gives_linears_bits_of_their_own(teacher, tmp_path, monkeypatch):
    budget = Budget(3.1, (1, 2, 3, 4), sequences=2)
    monkeypatch.setitem(CONFIGURATIONS["a1q-budget"].budget, 2, budget)
    outcome = METHODS["a1q-budget"].run(job(teacher, tmp_path, Setting(2)))
    count = sum(weight.numel() for weight in outcome.weights.values())
    assert 2.9 < outcome.bits / count <= 3.1
    assert set(outcome.facts["module_bits"].values()) <= set(budget.bits)
    assert len(set(outcome.facts["module_bits"].values())) > 1
