"""`snap` that bakes, and `snap` that rounds magnitudes before training goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.engine.registry import Registry
from a1q.errors import MismatchError
from a1q.models.checkpoint import load_model, save_model
from a1q.quant.linear import quantized_modules
from tests.stages.quantizing import MLP4, plan, run, view_of
from tests.stages.test_snap import UP, changed
from tests.training.student import build, read_tensors

EMBEDDING = {"head": {"scheme": "lut", "bits": 4}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return build(tmp_path_factory.mktemp("modes"), spec={**MLP4, "rank": 2})


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Modules whose scheme has no magnitudes."""
    return build(tmp_path_factory.mktemp("flat"), spec={"scheme": "lut", "bits": 2})


def adapt(model: Any) -> None:
    torch.manual_seed(1)
    model.get_submodule(UP).set_adapter(0.1 * torch.randn(2, 64), 0.1 * torch.randn(96, 2), 2.0)


def test_rounding_is_a_line_of_the_report(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    _, ctx = run("snap", tmp_path, inputs, {})
    metrics = ctx.metrics
    assert metrics["kl_rounding"] == metrics["kl_after"] - metrics["kl_before"] != 0
    assert abs(metrics["kl_rounding"]) < 0.01 * metrics["kl_before"]
    gone = {**inputs, "teacher_model": None}
    for other, options in ((inputs, {"kl_sequences": 0}), (gone, {})):
        _, ctx = run("snap", tmp_path, other, options)
        assert "kl_before" not in ctx.metrics
    with pytest.raises(MismatchError, match="has changed since"):
        run("snap", tmp_path, gone, {"teacher": "teacher"})


def test_a_cache_without_a_held_out_part_measures_nothing(tmp_path: Path) -> None:
    bare = build(tmp_path / "bare", tune=0)
    for stage, options in (("snap", {}), ("convert", {"rules": {"mlp": {"bits": 1}}})):
        _, ctx = run(stage, tmp_path / stage, bare, options)
        assert not any(name.startswith("kl_") for name in ctx.metrics)


def test_kl_before_is_that_of_unrounded_parts(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    """Also where training saw rounded ones: same indices, same figure."""

    def see_fp16(model: Any) -> None:
        for _, module in quantized_modules(model):
            module.drop_latent()
            module.straight_through_fp16 = True

    source = changed(tmp_path / "seen", inputs["model"], see_fp16)
    _, plain = run("snap", tmp_path / "a", inputs, {})
    _, seen = run("snap", tmp_path / "b", {**inputs, "model": source}, {})
    assert seen.metrics["kl_before"] == pytest.approx(plain.metrics["kl_before"], rel=1e-5)
    assert seen.metrics["kl_after"] == plain.metrics["kl_after"]


def test_baked_weights_are_the_rounded_products_and_transformers_loads_them(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    from transformers import AutoModelForCausalLM

    source = changed(tmp_path / "adapted", inputs["model"], adapt)
    tied, _ = run("quantize", tmp_path, {"model": source}, {"rules": EMBEDDING})
    outcome, problems = plan("snap", {"model": view_of(tied)}, {"mode": "baked"})
    assert problems == [] and "1 unmerged adapters are merged into the weights" in outcome.notes
    made, ctx = run("snap", tmp_path, {**inputs, "model": tied}, {"mode": "baked"})
    assert (view_of(made).modules, view_of(made).parameters) == (outcome.view.modules, outcome.view.parameters)
    assert (ctx.metrics["bpw"], ctx.metrics["bpw_model"], ctx.metrics["merged_adapters"]) == (16, 16, 1)
    assert 0 < ctx.metrics["baked_difference"] <= 2**-11
    assert ctx.metrics["kl_after"] > 0
    baked = read_tensors(made.path)
    assert {tensor.dtype for tensor in baked.values()} == {torch.float16}
    assert outcome.disk_bytes == sum(2 * tensor.numel() for tensor in baked.values())
    snapped, _ = run("snap", tmp_path, {"model": tied}, {})
    parts = dict(quantized_modules(load_model(snapped.path)))
    assert len(parts) == 15
    for name, module in parts.items():
        product = module.dequantize()
        if module.lora_A is not None:
            product = product + module.lora_B.float() @ module.lora_A.float()  # alpha / rank is 1
        assert torch.equal(baked[f"{name}.weight"], product.half()), name
    plain = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32).eval()
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, load_model(made.path)(tokens).logits)
        drift = (plain(tokens).logits - load_model(snapped.path)(tokens).logits).abs().max()
    assert 0 < float(drift) < 0.01


def test_what_is_snapped_can_be_baked_and_is_a_dense_model_to_all_that_follows(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    snapped, _ = run("snap", tmp_path, {"model": inputs["model"]}, {})
    assert plan("snap", {"model": view_of(snapped)}, {"mode": "baked"})[1] == []
    later, _ = run("snap", tmp_path, {"model": snapped}, {"mode": "baked"})
    once, _ = run("snap", tmp_path, {"model": inputs["model"]}, {"mode": "baked"})
    assert (later.path / "model.safetensors").read_bytes() == (once.path / "model.safetensors").read_bytes()
    assert plan("quantize", {"model": view_of(later)}, {"rules": {"mlp": MLP4}})[1] == []
    assert "no module of the model here is quantized" in plan("snap", {"model": view_of(later)}, {})[1][0][1]
    for name in ("coreml", "safetensors"):
        exporter = Registry().get("exporters", name)
        options = {"format": name, **({"context": 128} if name == "coreml" else {})}
        config = _exporter_config(name, options)
        assert [text for text in exporter().refusals(view_of(later), config) if "module" in text] == []


def _exporter_config(name: str, options: dict[str, Any]) -> Any:
    from a1q.engine.config import build_config
    from a1q.recipe.schema import Checker

    registry = Registry()
    schema = registry.schema("exporters", name)
    options.pop("format")
    return build_config(registry.get("exporters", name).Config, Checker(registry).fill(schema, options, set()))


def test_magnitudes_snapped_before_stand_still_while_directions_train(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    outcome, problems = plan("snap", {"model": view_of(inputs["model"])}, {"only": ["magnitudes"]})
    assert problems == []
    made, ctx = run("snap", tmp_path, inputs, {"only": ["magnitudes"]})
    assert view_of(made) == outcome.view
    assert view_of(made).modules[UP].snapped_sets == ("magnitudes",)
    assert 0 < ctx.metrics["worst_change"] <= 2**-11
    start, old = read_tensors(made.path), read_tensors(inputs["model"].path)
    different = {name for name in old if not torch.equal(old[name], start[name])}
    assert different and {name.rpartition(".")[2] for name in different} <= {"g", "indices"}
    options = {"objective": {"kd": "t"}, "steps": 2, "batch": {"sequences": 4}, "keep": "last"}
    for freeze in (["magnitudes"], []):
        training = {**options, "trainable": ["scales", "lut"], "freeze": freeze}
        outcome, problems = plan("train", {"model": view_of(made), "teacher": None}, training)
        assert problems == []
        trained, _ = run("train", tmp_path, {**inputs, "model": made}, training)
        assert view_of(trained) == outcome.view
        assert view_of(trained).modules[UP].snapped_sets == tuple(freeze)
        after = read_tensors(trained.path)
        assert not torch.equal(after[f"{UP}.a"], start[f"{UP}.a"])
        assert torch.equal(after[f"{UP}.g"], start[f"{UP}.g"]) == bool(freeze)


def test_wrong_uses_are_problems_where_they_stand(
    tmp_path: Path, inputs: dict[str, Artifact], flat: dict[str, Artifact]
) -> None:
    def first(stage: str, model: Artifact, **options: Any) -> tuple[str, str, str, bool]:
        (problem,) = plan(stage, {"model": view_of(model), "teacher": None}, options)[1]
        return problem

    kd = {"objective": {"kd": "t"}}
    path, message, hint, mismatch = first("train", inputs["model"], **kd, trainable=["scales"], freeze=["magnitudes"])
    assert (path, mismatch) == ("freeze", False)
    assert message.startswith("magnitudes of 14 modules were never snapped: model.layers.{0..1}.")
    assert "snap: {only: [magnitudes]}" in hint
    both = first("train", inputs["model"], **kd, trainable=["magnitudes"], freeze=["magnitudes"])
    assert both[:2] == ("freeze", "magnitudes can't train and be frozen")
    assert "have no magnitudes" in first("train", flat["model"], **kd, trainable=["lut"], freeze=["magnitudes"])[1]
    assert first("snap", flat["model"], only=["magnitudes"])[0] == "only"
    assert first("snap", inputs["model"], only=["magnitudes"], mode="baked")[0] == "only"
    snapped, _ = run("snap", tmp_path, {"model": inputs["model"]}, {})
    assert "before the last `snap`" in first("snap", snapped, only=["magnitudes"])[2]


def test_a_conversion_forgets_that_magnitudes_were_snapped(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    made, _ = run("snap", tmp_path, {"model": inputs["model"]}, {"only": ["magnitudes"]})
    outcome, _ = plan("convert", {"model": view_of(made)}, {"rules": {"mlp": {"bits": 2}}})
    converted, _ = run("convert", tmp_path, {"model": made}, {"rules": {"mlp": {"bits": 2}}})
    assert view_of(converted) == outcome.view
    assert view_of(converted).modules[UP].snapped_sets == ()
    folder = tmp_path / "again"
    folder.mkdir()
    save_model(load_model(made.path), folder, tokenizer_from=made.path)
    assert (folder / "model.safetensors").read_bytes() == (made.path / "model.safetensors").read_bytes()
