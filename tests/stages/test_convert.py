import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from a1q.distill.teacher_model import FOLDER
from a1q.engine.artifact import Artifact
from a1q.models.checkpoint import load_model, save_model
from a1q.quant.linear import QuantLinear, quantized_modules
from tests.stages.quantizing import MLP4, plan, run, view_of
from tests.training.student import build

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The dense model, its 4-bit version with latents, and a teacher cache that holds the dense model."""
    folder = tmp_path_factory.mktemp("convert")
    inputs = build(folder, spec=MLP4)
    shutil.copytree(folder / "dense", folder / "teacher" / FOLDER)
    meta = {"teacher": {"source": None, "revision": None, "digest": "d" * 64}}
    teacher = dataclasses.replace(inputs["teacher"], meta=meta)
    return {"dense": Artifact("model", folder / "dense", "d" * 64), "model": inputs["model"], "teacher": teacher}


def test_four_to_two_bits_is_the_two_bit_fit_of_the_latent(tmp_path: Path, built: dict[str, Artifact]) -> None:
    options = {"rules": {"mlp": {"bits": 2}}}
    outcome, problems = plan("convert", {"model": view_of(built["model"])}, options)
    assert problems == []
    made, ctx = run("convert", tmp_path, {"model": built["model"], "teacher": built["teacher"]}, options)
    assert view_of(made).modules == outcome.view.modules
    direct = QuantLinear.quantize(load_model(built["dense"].path).get_submodule(UP), {**MLP4, "bits": 2}, seed=7)
    found = load_model(made.path).get_submodule(UP)
    assert torch.equal(found.dequantize(), direct.dequantize())
    assert torch.equal(found.latent, direct.latent)
    assert found.spec["bits"] == 2
    assert ctx.metrics["error_before"]["mlp"] < ctx.metrics["error_after"]["mlp"]
    assert 0 < ctx.metrics["kl_before"] < ctx.metrics["kl_after"]
    attention = "model.layers.0.self_attn.q_proj"
    before = load_model(built["model"].path).get_submodule(attention).dequantize()
    assert torch.equal(load_model(made.path).get_submodule(attention).dequantize(), before)


def test_refit_beats_the_published_conversion(tmp_path: Path, built: dict[str, Artifact]) -> None:
    inputs = {"model": built["model"], "teacher": built["teacher"]}
    figures = {}
    for method in ("refit", "published"):
        options = {"rules": {"mlp": {"bits": 2, "rank": 2}}, "method": method}
        assert plan("convert", {"model": view_of(built["model"])}, options)[1] == []
        made, ctx = run("convert", tmp_path, inputs, options)
        figures[method] = ctx.metrics
        module = load_model(made.path).get_submodule(UP)
        assert module.lut.shape == (4,)
        assert module.a.shape[1] == 2
    assert figures["refit"]["error_after"]["mlp"] < figures["published"]["error_after"]["mlp"]
    assert figures["refit"]["kl_after"] < figures["published"]["kl_after"]


def test_the_published_conversion_stands_beside_ours(tmp_path: Path, built: dict[str, Artifact]) -> None:
    inputs = {"model": built["model"], "teacher": built["teacher"]}
    options = {"rules": {"mlp": {"bits": 2, "rank": 2}}}
    _, theirs = run("convert", tmp_path / "theirs", inputs, {**options, "method": "published"})
    made, alone = run("convert", tmp_path / "alone", inputs, options)
    other, ctx = run("convert", tmp_path / "both", inputs, {**options, "compare": "published"})
    assert ctx.metrics["kl_published"] == theirs.metrics["kl_after"]
    assert ctx.metrics["kl_after"] == alone.metrics["kl_after"]
    assert ctx.metrics["kl_saved"] == ctx.metrics["kl_published"] - ctx.metrics["kl_after"] > 0
    ours, same = (load_model(artifact.path).state_dict() for artifact in (made, other))
    assert all(torch.equal(tensor, same[name]) for name, tensor in ours.items())


def test_what_has_no_published_conversion_is_not_compared(built: dict[str, Artifact]) -> None:
    def problems(held_out: int = 4, **options: object) -> list[str]:
        views = {"model": view_of(built["model"]), "teacher": {"vocabulary": 320, "tune_sequences": held_out}}
        found = plan("convert", views, {"rules": {"mlp": {"bits": 2}}, "compare": "published", **options})[1]
        assert {path for path, *_ in found} <= {"compare"}
        return [message for _, message, *_ in found]

    assert problems() == []
    assert "unlike model.layers.{0..1}.mlp.down_proj" in problems(rules={"mlp": {"scheme": "lut"}})[0]
    assert "is what would be compared with" in problems(method="published")[0]
    assert "no KL to compare" in problems(kl_sequences=0)[0]
    assert "no KL to compare" in problems(held_out=0)[0]


@pytest.mark.parametrize("method", ["exact", "published"])
def test_from_v1_to_v2(tmp_path: Path, built: dict[str, Artifact], method: str) -> None:
    """Exact keeps every bit of every weight and so the KL; as published, indices are derived anew."""
    options = {"rules": {"mlp": {}, "attn": {}}, "method": method, "kl_sequences": 12}
    outcome, problems = plan("convert", {"model": view_of(built["model"])}, options)
    assert problems == []
    made, ctx = run("convert", tmp_path, {"model": built["model"], "teacher": built["teacher"]}, options)
    assert view_of(made).modules == outcome.view.modules
    before, after = (dict(quantized_modules(load_model(item.path))) for item in (built["model"], made))
    same = [torch.equal(before[name].dequantize(), after[name].dequantize()) for name in before]
    assert all(torch.equal(before[name].lut, after[name].lut) for name in before)
    metrics = ctx.metrics
    if method == "exact":
        assert all(same) and metrics["kl_after"] == metrics["kl_before"]
        assert metrics["error_after"] == metrics["error_before"]
        assert all(torch.equal(before[name].latent, after[name].latent) for name in before)
        assert all(0.5 <= float(module.a.detach().norm()) <= 2 for module in after.values())  # rank 1
    else:
        assert not any(same) and abs(metrics["kl_after"] / metrics["kl_before"] - 1) > 1e-3
        module = after[UP]
        ratio = before[UP].latent / (before[UP].a * before[UP].g @ before[UP].b)
        assert torch.equal(module.indices.long(), (ratio[..., None] - module.lut).abs().argmin(-1))


def test_what_an_exact_conversion_cannot_do_is_said(tmp_path: Path, built: dict[str, Artifact]) -> None:
    def first(model: Artifact, **options: object) -> tuple[str, str, str, bool]:
        _, problems = plan("convert", {"model": view_of(model)}, {"method": "exact", **options})
        assert len(problems) == 1
        return problems[0]

    path, message, hint, _ = first(built["model"], rules={"mlp": {"bits": 2}})
    assert (path, hint) == ("rules.mlp", "leave the rule empty: `{}`")
    assert "changes neither bits nor rank" in message
    flat = build(tmp_path / "flat", spec={"scheme": "lut", "bits": 2})["model"]
    assert "schemes have none" in first(flat, rules={"mlp": {}})[1]
    model = load_model(built["model"].path)
    model.get_submodule(UP).set_adapter(torch.ones(1, 64), torch.ones(96, 1), 1.0)
    (tmp_path / "adapted").mkdir()
    save_model(model, tmp_path / "adapted")
    assert "unmerged adapter" in first(Artifact("model", tmp_path / "adapted", ""), rules={"mlp": {}})[1]


def test_target_quantized_fits_the_grid_values(tmp_path: Path, built: dict[str, Artifact]) -> None:
    options = {"rules": {"mlp": {"bits": 2}}, "target": "quantized"}
    made, ctx = run("convert", tmp_path, {"model": built["model"]}, options)
    assert ctx.metrics["error_before"]["mlp"] == 0
    assert "kl_before" not in ctx.metrics
    before = load_model(built["model"].path).get_submodule(UP).dequantize()
    assert torch.equal(load_model(made.path).get_submodule(UP).latent, before)


def test_an_adapter_is_merged_into_what_is_fitted(tmp_path: Path, built: dict[str, Artifact]) -> None:
    model = load_model(built["model"].path)
    module = model.get_submodule(UP)
    module.set_adapter(torch.randn(2, 64) * 0.1, torch.randn(96, 2) * 0.1, 2.0)
    target = (module.latent + module.adapter_delta()).detach()
    (tmp_path / "adapted").mkdir()
    save_model(model, tmp_path / "adapted", tokenizer_from=built["dense"].path)
    adapted = Artifact("model", tmp_path / "adapted", "a" * 64)
    outcome, _ = plan("convert", {"model": view_of(adapted)}, {"rules": {"mlp": {}}})
    made, _ = run("convert", tmp_path, {"model": adapted}, {"rules": {"mlp": {}}})
    found = load_model(made.path).get_submodule(UP)
    assert found.adapter is None
    assert outcome.view.modules[UP].adapter == 0
    assert torch.equal(found.latent, target)


def test_to_another_scheme_keeps_the_bits(tmp_path: Path, built: dict[str, Artifact]) -> None:
    made, _ = run("convert", tmp_path, {"model": built["model"]}, {"rules": {"mlp": {"scheme": "lut"}}})
    module = load_model(made.path).get_submodule(UP)
    assert (module.spec["scheme"], module.spec["bits"], module.spec["granularity"]) == ("lut", 4, "tensor")


def test_wrong_orders_and_options_are_problems_at_the_rule(tmp_path: Path, built: dict[str, Artifact]) -> None:
    def first(artifact: Artifact, **options: object) -> tuple[str, str, str, bool]:
        _, problems = plan("convert", {"model": view_of(artifact)}, options)
        assert len(problems) == 1
        return problems[0]

    path, message, hint, _ = first(built["dense"], rules={"mlp": {"bits": 2}})
    assert (path, hint) == ("rules.mlp", "`quantize` them first")
    assert message.startswith("6 modules are dense, not quantized")
    snapped, _ = run("snap", tmp_path, {"model": built["model"]}, {})
    assert "before `snap`" in first(snapped, rules={"mlp": {"bits": 2}})[2]
    assert "unknown option granularity" in first(built["model"], rules={"mlp": {"granularity": "tensor"}})[1]
    assert "published" in first(built["model"], rules={"mlp": {"bits": 6}}, method="published")[1]


def test_the_recipes_own_model_serves_as_teacher_wherever_it_is_now(tmp_path: Path, built: dict[str, Artifact]) -> None:
    shutil.copytree(built["teacher"].path, tmp_path / "cache", ignore=shutil.ignore_patterns(FOLDER))
    noted = {"source": str(tmp_path / "gone"), "revision": None, "digest": built["dense"].digest}
    moved = dataclasses.replace(built["teacher"], path=tmp_path / "cache", meta={"teacher": noted})
    inputs = {"model": built["model"], "teacher": moved, "teacher_model": built["dense"]}
    _, ctx = run("convert", tmp_path, inputs, {"rules": {"mlp": {"bits": 2}}, "kl_sequences": 2})
    assert ctx.metrics["kl_after"] > 0


def test_without_latents_the_plan_says_what_is_fitted(tmp_path: Path, built: dict[str, Artifact]) -> None:
    model = load_model(built["model"].path)
    for _, module in quantized_modules(model):
        module.drop_latent()
    save_model(model, tmp_path)
    outcome, _ = plan("convert", {"model": view_of(Artifact("model", tmp_path, ""))}, {"rules": {"mlp": {"bits": 2}}})
    assert "6 modules have no latent: their quantized weights are fitted" in outcome.notes
