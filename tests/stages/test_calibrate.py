import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from a1q.engine.artifact import Artifact
from a1q.engine.stage import DataEntry
from a1q.errors import StageError
from a1q.models.checkpoint import load_model
from a1q.quant.statistics import collect_statistics, read_statistics
from tests.stages.quantizing import MLP4, plan, run, view_of
from tests.tiny import TEXT, tiny_folder, tiny_model

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
TOKENS = np.random.default_rng(0).integers(320, size=(5, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact("model", tiny_folder(tmp_path_factory.mktemp("source") / "model"), "s" * 64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataEntry]:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"{number}: {line} {number * 37}"}) for number in range(80) for line in TEXT]
    file.write_text("\n".join(lines), encoding="utf-8")
    config = {"source": str(file), "seq_len": 16, "holdout": 0.05, "format": "auto", "column": None, "revision": None}
    return {"text": DataEntry("text", config, "t" * 64)}


def test_against_the_mean_square_in_float64() -> None:
    model = tiny_model().double()
    seen: dict[str, list[torch.Tensor]] = {Q: [], DOWN: []}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name in seen
    ]
    with torch.no_grad():
        model(torch.from_numpy(TOKENS).long())
    for hook in hooks:
        hook.remove()
    found = collect_statistics(model, TOKENS, batch_size=2, progress=lambda done, total: None)
    for name, (inputs,) in seen.items():
        expected = inputs.reshape(-1, inputs.shape[-1]).square().mean(0)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-15)
    assert len(found) == 15  # the tied head stands under the embedding's name


def test_hooks_are_gone_and_bad_activations_are_named() -> None:
    model = tiny_model()
    collect_statistics(model, TOKENS, batch_size=5, progress=lambda done, total: None)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.inf
    with pytest.raises(StageError, match=r"layers\.1\.self_attn\.q_proj are not finite"):
        collect_statistics(model, TOKENS, batch_size=5, progress=lambda done, total: None)


def test_stage_writes_every_linear_of_the_view(tmp_path: Path, source: Artifact, text: dict[str, DataEntry]) -> None:
    options = {"data": "text", "sequences": 6, "batch": 4}
    outcome, problems = plan("calibrate", {"model": view_of(source)}, options, text)
    assert problems == []
    made, ctx = run("calibrate", tmp_path, {"model": source}, options, text)
    values = load_file(made.path / "statistics.safetensors")
    assert sorted(values) == sorted(outcome.view["modules"])
    assert all(value.dtype == torch.float32 and bool((value > 0).all()) for value in values.values())
    assert outcome.disk_bytes == sum(4 * value.numel() for value in values.values())
    assert ctx.meta["tokens"] == 96
    again, _ = run("calibrate", tmp_path, {"model": source}, options, text)
    assert (again.path / "statistics.safetensors").read_bytes() == (made.path / "statistics.safetensors").read_bytes()


def test_a_quantized_model_calibrates_too(tmp_path: Path, source: Artifact, text: dict[str, DataEntry]) -> None:
    quantized, _ = run("quantize", tmp_path, {"model": source}, {"rules": {"mlp": MLP4}})
    made, _ = run("calibrate", tmp_path, {"model": quantized}, {"data": "text", "sequences": 2}, text)
    names = [name for name, module in load_model(source.path).named_modules() if "proj" in name]
    assert set(read_statistics(made, names)) == {*names, "model.embed_tokens"}


@pytest.mark.parametrize("quantized", [False, True])
def test_the_inputs_of_a_head_stand_under_the_weight_that_they_meet(quantized: bool) -> None:
    from a1q.quant.embedding import QuantEmbedding
    from a1q.quant.tied import swap_module

    for tied, name in ((True, "model.embed_tokens"), (False, "lm_head")):
        model = tiny_model(tie_word_embeddings=tied).double()
        if quantized:
            module = QuantEmbedding.quantize(model.model.embed_tokens, {"scheme": "lut", "bits": 8})
            swap_module(model, "model.embed_tokens", module)
        seen: list[torch.Tensor] = []
        hook = model.lm_head.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        found = collect_statistics(model, TOKENS, batch_size=5, progress=lambda done, total: None)
        hook.remove()
        assert len(found) == 15
        torch.testing.assert_close(found[name], seen[0].reshape(-1, 64).square().mean(0), rtol=1e-9, atol=0)


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    (tmp_path / "statistics.safetensors").write_bytes(b"nonsense")
    with pytest.raises(StageError, match="can't be read"):
        read_statistics(Artifact("statistics", tmp_path, ""), [])
