import re
from pathlib import Path

import numpy
import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.errors import StageError
from a1q.models.checkpoint import load_model
from a1q.models.view import read_safetensors_header
from a1q.quant.bits import bpw, bpw_model
from a1q.quant.linear import quantized_modules
from a1q.quant.statistics import write_statistics
from tests.stages.quantizing import MLP4, plan, run, view_of
from tests.tiny import tiny_folder

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact("model", tiny_folder(tmp_path_factory.mktemp("source") / "model"), "s" * 64)


@pytest.mark.parametrize("latent", ["keep", "drop"])
def test_what_runs_is_what_was_planned(tmp_path: Path, source: Artifact, latent: str) -> None:
    options = {"rules": {"mlp": {**MLP4, "bits": 2}, "attn": MLP4}, "latent": latent}
    outcome, problems = plan("quantize", {"model": view_of(source)}, options)
    assert problems == []
    made, ctx = run("quantize", tmp_path, {"model": source}, options)
    assert view_of(made).modules == outcome.view.modules
    assert view_of(made).parameters == outcome.view.parameters
    header = read_safetensors_header(made.path / "model.safetensors")
    ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
    assert outcome.disk_bytes == max(ends)
    assert ctx.metrics["modules"] == 14
    assert ctx.metrics["bpw"] == bpw(outcome.view)
    assert ctx.metrics["bpw_model"] == bpw_model(outcome.view)
    assert 0 < ctx.metrics["error"]["attn"] < ctx.metrics["error"]["mlp"] < 0.2
    assert outcome.notes[0].startswith("mlp: 6 modules -> lut_lowrank 2 bit rank 1, 2.4")
    latents = [module.latent for _, module in quantized_modules(load_model(made.path))]
    dense = load_model(source.path)
    if latent == "keep":
        assert torch.equal(load_model(made.path).get_submodule(UP).latent, dense.get_submodule(UP).weight)
    else:
        assert latents == [None] * 14
    assert (made.path / "tokenizer.json").is_file()


def test_same_seed_same_bytes(tmp_path: Path, source: Artifact) -> None:
    first, second = (run("quantize", tmp_path, {"model": source}, {"rules": {"mlp": MLP4}})[0] for _ in range(2))
    assert (first.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()


def test_rest_takes_every_other_linear_and_keep_takes_none(source: Artifact) -> None:
    view = view_of(source)
    rest = {"scheme": "lut", "bits": 8}
    outcome, problems = plan("quantize", {"model": view}, {"rules": {"mlp": MLP4}, "rest": rest})
    assert problems == []
    kinds = {(module.kind, (module.scheme or {}).get("scheme")) for module in outcome.view.modules.values()}
    assert kinds == {("linear", "lut_lowrank"), ("linear", "lut"), ("embedding", None)}
    outcome, problems = plan("quantize", {"model": view}, {"rules": {"mlp": MLP4}, "rest": "error"})
    ((path, message, hint, mismatch),) = problems
    assert (path, message, mismatch) == ("rest", "8 linears are in no rule", True)
    assert "self_attn.q_proj" in hint


def test_wrong_targets_are_one_problem_each_at_the_rule(tmp_path: Path, source: Artifact) -> None:
    view = view_of(source)
    _, problems = plan("quantize", {"model": view}, {"rules": {"head": {**MLP4, "rank": 65}}})
    assert [(path, mismatch) for path, _, _, mismatch in problems] == [("rules.head", True)]
    assert "rank 65 is more than the smaller side of 320x64" in problems[0][1]
    _, problems = plan("quantize", {"model": view}, {"rules": {"lm": MLP4}})
    assert "model.embed_tokens" in problems[0][2]
    _, problems = plan("quantize", {"model": view}, {"rules": {"attn": {**MLP4, "rank": 50}}})
    assert [path for path, *_ in problems] == ["rules.attn"]
    assert "rank 50 is more than the smaller side of 32x64" in problems[0][1]
    _, problems = plan("quantize", {"model": view}, {"rules": {"mlp": MLP4, "up": MLP4}})
    assert "each may be in one rule" in problems[0][1]

    made, _ = run("quantize", tmp_path, {"model": source}, {"rules": {"mlp": MLP4}})
    _, problems = plan("quantize", {"model": view_of(made)}, {"rules": {"mlp": MLP4}})
    ((path, message, hint, mismatch),) = problems
    assert (path, mismatch) == ("rules.mlp", False)
    assert message.startswith("6 modules are already quantized")
    assert "convert" in hint


def test_statistics_change_the_fit_and_must_be_complete(tmp_path: Path, source: Artifact) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: module.shape[1] for name, module in view_of(source).modules.items() if module.kind == "linear"}
    values = {name: torch.rand(columns, generator=generator) ** 4 for name, columns in inputs.items()}
    rest = {"tokens": numpy.zeros((1, 4)), "embedding": ("model.embed_tokens", (320, 64)), "head": "model.embed_tokens"}
    write_statistics(tmp_path, values, **rest)
    statistics = Artifact("statistics", tmp_path, "t" * 64)
    options = {"rules": {"mlp": {**MLP4, "bits": 2}}}
    aware, _ctx = run("quantize", tmp_path / "a", {"model": source, "statistics": statistics}, options)
    blind, _ = run("quantize", tmp_path / "b", {"model": source}, options)
    dense = load_model(source.path).get_submodule(UP).weight.detach()
    errors = [
        float(((load_model(made.path).get_submodule(UP).dequantize() - dense).square() * values[UP]).sum())
        for made in (aware, blind)
    ]
    assert errors[0] < errors[1]
    write_statistics(tmp_path, {UP: values[UP]}, **rest)
    with pytest.raises(StageError, match=r"no entry for model\.layers\.0\.mlp\.down_proj"):
        run("quantize", tmp_path / "c", {"model": source, "statistics": statistics}, options)


def test_a_module_that_cannot_be_fitted_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "nan")
    model = load_model(folder)
    with torch.no_grad():
        model.get_submodule(UP).weight[3, 5] = torch.nan
    model.save_pretrained(folder)
    broken = Artifact("model", folder, "n" * 64)
    with pytest.raises(StageError, match=rf"{re.escape(UP)}: the weight holds values that are not finite"):
        run("quantize", tmp_path / "out", {"model": broken}, {"rules": {"mlp": MLP4}})


def test_memory_counts_the_states_between_layers_fitted_in_order(source: Artifact) -> None:
    def needed(**options: object) -> int:
        views = {"model": view_of(source), "statistics": {"tokens": tokens, "length": 16}}
        return plan("quantize", views, {"rules": {"mlp": MLP4}, **options})[0].memory_bytes

    hidden, found = view_of(source).config["hidden_size"], {}
    train = {"steps": 10, "trainable": ["scales"]}
    for tokens in (1600, 3200):
        found[tokens] = needed(sequential=False), needed(), needed(reconstruct=train)
        assert found[tokens][0] < found[tokens][1] < found[tokens][2]
    assert [more - less for less, more in zip(*found.values(), strict=True)] == [0, 6400 * hidden, 19200 * hidden]
