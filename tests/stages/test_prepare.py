from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from a1q.coreml.verify import verify_bundle
from a1q.engine.artifact import Artifact
from a1q.engine.stage import DataEntry
from a1q.errors import StageError
from a1q.exporters.coreml import CoremlConfig, CoremlExporter
from a1q.models.checkpoint import load_model
from a1q.models.preparations.rotate_heads import RotateHeads
from a1q.models.view import ModelView, read_view
from tests.coreml.bundles import bundle_of
from tests.exporters.test_coreml import OPTIONS as COREML
from tests.stages.quantizing import MLP4, plan, run, view_of
from tests.tiny import TEXT, tiny_family, tiny_family_folder

RESIDUAL: dict[str, Any] = {"data": "text", "rotate_residual": {"untie": True}}
HEADS: dict[str, Any] = {"data": "text", "rotate_heads": True}
SCALE: dict[str, Any] = {"data": "text", "scale": {"statistics": "cal"}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("sources")
    families = ("qwen3", "qwen2", "llama", "mistral", "gemma3_text")
    return {name: Artifact("model", tiny_family_folder(folder / name, name), name) for name in families}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataEntry]:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"{number}: {line} {number * 37}"}) for number in range(40) for line in TEXT]
    file.write_text("\n".join(lines), encoding="utf-8")
    config = {"source": str(file), "seq_len": 24, "holdout": 0.05, "format": "auto", "column": None, "revision": None}
    return {"text": DataEntry("text", config, "t" * 64)}


def logits(folder: Path) -> torch.Tensor:
    """What plain transformers computes with a model folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(5, 69)[None]).logits


# -- planning ----------------------------------------------------------------------------------------------------
def problems(view: ModelView, options: dict[str, Any], statistics: Any = None) -> list[tuple[str, str, str, bool]]:
    return plan("prepare", {"model": view, "statistics": statistics}, options)[1]


def test_nothing_asked_for_is_a_mistake(sources: dict[str, Artifact]) -> None:
    [(_, message, hint, mismatch)] = problems(view_of(sources["llama"]), {"data": "text"})
    assert message == "there is nothing to do" and "`rotate_heads`" in hint and not mismatch


def test_a_quantized_model_is_refused(sources: dict[str, Artifact]) -> None:
    view = view_of(sources["llama"])
    name = "model.layers.1.mlp.up_proj"
    view = view.replace({name: dataclasses.replace(view.modules[name], state="quantized", scheme=MLP4)})
    [(_, message, hint, mismatch)] = problems(view, HEADS)
    assert message == f"1 modules are already quantized: {name}"
    assert "comes before `quantize`" in hint and not mismatch


def test_another_family_is_refused_by_name(sources: dict[str, Artifact]) -> None:
    view = view_of(sources["llama"])
    view = dataclasses.replace(view, config={**view.config, "model_type": "gpt2"})
    [(_, message, hint, mismatch)] = problems(view, HEADS)
    assert message == "`prepare` knows no model type 'gpt2'" and "gemma3_text, llama" in hint and mismatch


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_a_tied_head_has_to_be_untied_for_the_stream_to_turn(sources: dict[str, Artifact], name: str) -> None:
    [(path, message, hint, mismatch)] = problems(view_of(sources[name]), {"data": "text", "rotate_residual": {}})
    assert path == "rotate_residual" and message.startswith("the head is tied to the embedding")
    assert "untie: true" in hint and "20,480 more parameters" in hint and mismatch


def test_the_stream_of_gemma_cant_turn(sources: dict[str, Artifact]) -> None:
    [(path, message, _, mismatch)] = problems(view_of(sources["gemma3_text"]), RESIDUAL)
    assert path == "rotate_residual" and "gemma3_text normalises what attention and MLP add" in message and mismatch


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_what_fits_has_no_problems(sources: dict[str, Artifact], name: str) -> None:
    view = view_of(sources[name])
    assert problems(view, HEADS) == problems(view, SCALE, {"modules": []}) == []
    assert name != "mistral" or problems(view, {**HEADS, "rotate_residual": {}}) == []


@pytest.mark.parametrize("rotation", [{"rotate_heads": True}, {"rotate_residual": {"untie": True}}])
def test_statistics_are_those_of_the_model_before_it_turns(
    sources: dict[str, Artifact], rotation: dict[str, Any]
) -> None:
    [(path, _, hint, mismatch)] = problems(view_of(sources["llama"]), {**SCALE, **rotation}, {"modules": []})
    assert path == "scale" and "then `calibrate`" in hint and not mismatch


# -- running -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "mistral", "gemma3_text"])
def test_plain_transformers_computes_the_same(
    tmp_path: Path, sources: dict[str, Artifact], text: dict[str, DataEntry], name: str
) -> None:
    source = sources[name]
    rotations = HEADS if name == "gemma3_text" else {**RESIDUAL, **HEADS}
    outcome, found = plan("prepare", {"model": view_of(source), "statistics": None}, rotations)
    assert found == []
    turned, ctx = run("prepare", tmp_path, {"model": source}, rotations, text)
    assert read_view(turned.path).modules == outcome.view.modules
    assert read_view(turned.path).parameters == outcome.view.parameters
    assert (turned.path / "model.safetensors").stat().st_size < 1.2 * outcome.disk_bytes
    assert 0 < ctx.metrics["difference"] < 1e-5 and ctx.metrics["difference_stream"] < 1e-5
    statistics, _ = run("calibrate", tmp_path, {"model": turned}, {"data": "text", "sequences": 4}, text)
    scaled, _ = run("prepare", tmp_path, {"model": turned, "statistics": statistics}, SCALE, text)
    expected = logits(source.path)
    for made in (turned, scaled):
        torch.testing.assert_close(logits(made.path), expected, rtol=1e-3, atol=1e-3)
    old, new = load_model(source.path), load_model(scaled.path)
    changed = [key for key, tensor in new.state_dict().items() if not torch.equal(tensor, old.state_dict()[key])]
    assert sum("proj.weight" in key for key in changed) >= 7 * new.config.num_hidden_layers - 2


def test_the_same_seed_makes_the_same_bytes(
    tmp_path: Path, sources: dict[str, Artifact], text: dict[str, DataEntry]
) -> None:
    made = [run("prepare", tmp_path, {"model": sources["llama"]}, RESIDUAL, text)[0] for _ in range(2)]
    first, second = ((item.path / "model.safetensors").read_bytes() for item in made)
    assert first == second


@pytest.mark.parametrize("stage", ["quantize", "prepare"])
def test_statistics_from_before_are_refused_while_planning(
    tmp_path: Path, sources: dict[str, Artifact], text: dict[str, DataEntry], stage: str
) -> None:
    options = {"quantize": {"rules": {"mlp": MLP4}}, "prepare": SCALE}[stage]
    view = view_of(sources["llama"])
    turned, _ = run("prepare", tmp_path, {"model": sources["llama"]}, HEADS, text)
    planned = plan("prepare", {"model": view, "statistics": None}, HEADS)[0].view
    before, after = (plan("calibrate", {"model": item}, {"data": "text"}, text)[0].view for item in (view, planned))
    for model in (planned, view_of(turned)):
        assert plan(stage, {"model": model, "statistics": after}, options)[1] == []
        [(path, message, hint, mismatch)] = plan(stage, {"model": model, "statistics": before}, options)[1]
        assert path.endswith("statistics") and "`prepare` changed what its linears see" in message and not mismatch
        assert hint == "put a `calibrate` after the last `prepare`"
    assert plan(stage, {"model": view, "statistics": before}, options)[1] == []


def test_statistics_of_another_model_are_refused(
    tmp_path: Path, sources: dict[str, Artifact], text: dict[str, DataEntry]
) -> None:
    statistics, _ = run("calibrate", tmp_path, {"model": sources["llama"]}, {"data": "text", "sequences": 2}, text)
    turned, _ = run("prepare", tmp_path, {"model": sources["llama"]}, HEADS, text)
    with pytest.raises(StageError, match="'cal' were measured on another model"):
        run("prepare", tmp_path, {"model": turned, "statistics": statistics}, SCALE, text)


def test_a_wrong_fold_publishes_nothing(
    tmp_path: Path, sources: dict[str, Artifact], text: dict[str, DataEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def per_query_head_in_turn(self: RotateHeads, decoder: Any, index: int) -> None:
        right(self, decoder, index)
        o = decoder.layers[index].self_attn.o_proj.weight
        o.copy_(o.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1))

    right = RotateHeads.layer
    monkeypatch.setattr(RotateHeads, "layer", per_query_head_in_turn)
    with pytest.raises(StageError, match=r"model\.layers\.0 is the first part whose output differs"):
        run("prepare", tmp_path, {"model": sources["llama"]}, HEADS, text)
    assert list((tmp_path / "prepare0").iterdir()) == []


def test_a_prepared_model_quantizes(tmp_path: Path, sources: dict[str, Artifact], text: dict[str, DataEntry]) -> None:
    turned, _ = run("prepare", tmp_path, {"model": sources["qwen3"]}, RESIDUAL, text)
    quantized, _ = run("quantize", tmp_path, {"model": turned}, {"rules": {"mlp": MLP4}})
    assert sum(module.state == "quantized" for module in view_of(quantized).modules.values()) == 6


# -- Core ML -----------------------------------------------------------------------------------------------------
def test_core_ml_takes_an_untied_head_and_gains_of_one(tmp_path: Path, text: dict[str, DataEntry]) -> None:
    from a1q.coreml.reference import references, sequences
    from a1q.coreml.thresholds import default_verify
    from a1q.engine.config import build_config

    source = Artifact("model", tiny_family_folder(tmp_path / "source", "llama", max_position_embeddings=128), "s")
    turned, _ = run("prepare", tmp_path / "out", {"model": source}, {**RESIDUAL, **HEADS}, text)
    view = view_of(turned)
    assert "lm_head" in view.modules and not view.tied
    assert CoremlExporter().refusals(view, build_config(CoremlConfig, COREML)) == []
    model = load_model(turned.path)
    bundle, wanted = bundle_of(model, tmp_path / "package"), sequences(turned.path, 320, 36, 4, 8)
    assert verify_bundle(bundle, references(model, wanted), default_verify()).failures == []
    original = references(tiny_family("llama", max_position_embeddings=128), wanted)
    assert verify_bundle(bundle, original, default_verify()).figures["fp32"].cosine > 0.9999
