from __future__ import annotations

import json
import subprocess
import sys

import pytest

from a1q.coreml.activations import STREAM
from a1q.engine.artifact import Artifact
from a1q.engine.config import build_config
from a1q.errors import Interrupted, StageError
from a1q.exporters.coreml import CoremlConfig, CoremlExporter
from a1q.models.view import ModelView, ModuleView
from tests.coreml.models import SCHEMES, decoder
from tests.exporters.conftest import context, save
from tests.tiny import write_tokenizer

PACKAGE = "model.mlpackage"
VERIFY = {
    "prompt": 40, "generate": 24, "random": 16, "min_cosine": 0.9999, "min_cosine_fp16": 0.999, "max_error": 0.01,
    "min_agreement": 1.0,
}  # fmt: skip
OPTIONS = {
    "layout": "single", "context": 128, "prefill": 32, "chunks": None, "head_parts": None, "name": None,
    "adapters": "inside", "repalettize": {}, "residual_scale": "auto", "verify": VERIFY,
}  # fmt: skip
CONFIG = {
    "model_type": "qwen3", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
RANK_1 = {"scheme": "lut_lowrank", "bits": 4, "rank": 1}


def config(**changes) -> CoremlConfig:
    return build_config(CoremlConfig, OPTIONS | changes)


def view(*modules: ModuleView, **changes) -> ModelView:
    embedding = ModuleView("model.embed_tokens", (2048, 256), "embedding")
    return ModelView({m.name: m for m in (embedding, *modules)}, 2048 * 256 + 65536, {**CONFIG, **changes})


def up_proj(**changes) -> ModuleView:
    return ModuleView(**{"name": "model.layers.0.mlp.up_proj", "shape": (256, 256), **changes})


def artifact(model, folder) -> Artifact:
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    write_tokenizer(tokenizer)
    return save(model, folder / "model", tokenizer)


# -- refusals ----------------------------------------------------------------------------------------------------
def test_dense_and_snapped_modules_are_welcome():
    snapped = up_proj(state="snapped", scheme=RANK_1, adapter=4)
    assert CoremlExporter().refusals(view(snapped), config()) == []
    assert CoremlExporter().refusals(view(up_proj()), config(verify=None)) == []


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (view(up_proj(state="quantized", scheme=RANK_1)), {}, "up_proj still train: put a `snap` stage before"),
        (
            view(up_proj(state="snapped", scheme={"scheme": "affine", "bits": 3, "symmetric": False})),
            {},
            "Core ML can't hold affine at 3 bits with these options: model.layers.0.mlp.up_proj; `lut`, `lut_lowrank`",
        ),
        (view(model_type="gpt2"), {}, "knows no model type 'gpt2'; it supports: gemma3_text"),
        (
            view(),
            {"head_parts": 7},
            "head_parts 7 does not divide a head of 2048 rows into equal parts; these do: 1, 2, 4, 8",
        ),
        (view(vocab_size=65536), {"head_parts": 2}, "gives 32768 rows each"),
        (view(), {"chunks": 2}, "`chunks` divides the layers of layout `anemll`"),
        (view(), {"layout": "anemll", "chunks": 5}, "chunks is 5, but there are 4 layers"),
        (view(), {"adapters": "functions"}, "adapters: functions needs unmerged adapters"),
        (
            view(),
            {"repalettize": {"table": {"match": "model.embed", "scheme": "lut", "bits": 4}}},
            "repalettize.table matches no module",
        ),
        (view(vocab_size=16411), {}, "a head of 16411 rows can't be cut into equal parts of at most 16384 rows"),
        (view(head_dim=72), {}, "head_dim 72 is not a multiple of 32"),
        (view(), {"context": 160, "prefill": 64}, "context 160 is not a multiple of prefill 64"),
        (view(), {"verify": {**VERIFY, "prompt": 120}}, "do not fit a context of 128"),
        (view(), {"verify": {**VERIFY, "random": 129}}, "129 random tokens do not fit a context of 128"),
    ],
)
def test_what_is_refused(model, options, message):
    refusals = CoremlExporter().refusals(model, config(**options))
    assert len(refusals) == 1
    assert message in refusals[0]


def test_a_head_whose_tables_can_not_be_divided():
    scheme = {"scheme": "lut", "bits": 4, "granularity": "group", "channels": 64}
    head = ModuleView("lm_head", (151936, 256), state="snapped", scheme=scheme)
    [refusal] = CoremlExporter().refusals(view(head, vocab_size=151936, tie_word_embeddings=False), config())
    assert "whole groups of 64 channels" in refusal


def test_planning_imports_neither_torch_nor_coremltools():
    script = "import sys, a1q.exporters.coreml; assert not {'torch', 'coremltools', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_quantized_embeddings_are_welcome():
    table = ModuleView("model.embed_tokens", (2048, 256), "embedding", "snapped", RANK_1)
    assert CoremlExporter().refusals(view(table), config()) == []


# -- export ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coreml")
    sizes = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 512}
    model = artifact(decoder(SCHEMES["rank-1"], adapter=2, **sizes), folder)
    ctx = context(folder / "out")
    steps = []
    ctx.emit = lambda kind, values: steps.append(values) if kind == "progress" else None
    CoremlExporter().export(model, config(), ctx)
    return model, ctx, steps


def test_files_beside_the_package(exported):
    _, ctx, _ = exported
    assert {path.name for path in ctx.out.iterdir()} == {
        PACKAGE, "tokenizer.json", "tokenizer_config.json", "meta.json",
    }  # fmt: skip
    meta = json.loads((ctx.out / "meta.json").read_text())
    assert [part["functions"] for part in meta["parts"]] == [{"infer": 1, "prefill": 32}]
    assert (meta["context"], meta["outputs"], meta["state"]) == (128, ["logits"], "kv_cache")
    assert meta["schemes"]["model.layers.0.mlp.up_proj"]["bits"] == 4


def test_figures(exported):
    _, ctx, steps = exported
    metrics = ctx.metrics
    assert metrics["positions_fp32"] == 64 + 25 + 1 + 16 + 7
    assert metrics["cosine_fp32"] > 0.999999
    assert metrics["cosine_fp16"] > 0.9999
    assert metrics["greedy_agreement_fp32"] == 1
    assert metrics["overflows_fp16"] == 0
    assert abs(metrics["size_ratio"] - 1) < 0.03
    assert metrics["bytes"] > metrics["weight_bytes"] > metrics["theory_bytes"]
    assert set(metrics["parts"]["model"]["ops"]) == {"infer", "prefill"}
    assert metrics["residual_scale"] == 1
    assert metrics["peak_activation"] == max(layer[name] for layer in metrics["peaks"] for name in STREAM)
    json.dumps(metrics, allow_nan=False)
    starts = [place for place, step in enumerate(steps) if step["step"] == 1]
    phases = [steps[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert len(phases) == 2  # building, then verifying
    for phase in phases:
        assert phase[-1]["step"] == phase[-1]["total"] == len(phase)


def test_estimate_is_near_the_truth(exported):
    from a1q.models.view import read_view

    model, ctx, _ = exported
    estimate = CoremlExporter().estimate(read_view(model.path), config())
    size = sum(path.stat().st_size for path in ctx.out.rglob("*") if path.is_file())
    assert 0.5 < estimate / size < 2


def test_a_large_vocabulary_is_divided(tmp_path):
    model = artifact(decoder(vocab_size=2 * 16416, hidden_size=32, num_hidden_layers=1), tmp_path)
    ctx = context(tmp_path / "out")
    CoremlExporter().export(model, config(verify={**VERIFY, "prompt": 33, "generate": 2}), ctx)
    assert json.loads((ctx.out / "meta.json").read_text())["outputs"] == ["logits1", "logits2", "logits3"]
    assert ctx.metrics["cosine_fp32"] > 0.999999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_cosine": 1.0}, "cosine in fp32 is 0.9999999"),
        ({"min_cosine_fp16": 1.0}, "cosine in fp16 is 0.99"),
    ],
)
def test_what_verify_asks_and_does_not_get(tmp_path, options, message):
    model = artifact(decoder(), tmp_path)
    ctx = context(tmp_path / "out")
    with pytest.raises(StageError, match=message):
        CoremlExporter().export(model, config(verify={**VERIFY, **options}), ctx)


def test_a_weight_that_was_written_dense_is_too_large(tmp_path, monkeypatch):
    from a1q.coreml import linear
    from a1q.coreml.weights import Linear

    def dense(weight, name):
        return honest(Linear(dense=weight.dequantize().astype("float16")), name)

    honest = linear._stored
    monkeypatch.setattr(linear, "_stored", dense)
    model = artifact(decoder(SCHEMES["tensor-2"], intermediate_size=256), tmp_path)
    with pytest.raises(StageError, match=r"the weight file of model has [\d,]+ bytes, its bits say"):
        CoremlExporter().export(model, config(), context(tmp_path / "out"))


@pytest.mark.parametrize("layout", ["single", "anemll"])
def test_functions_without_the_adapters(tmp_path, layout):
    model = artifact(decoder(SCHEMES["rank-1"], adapter=2), tmp_path)
    ctx = context(tmp_path / "out")
    CoremlExporter().export(model, config(layout=layout, adapters="functions"), ctx)
    assert json.loads((ctx.out / "meta.json").read_text())["adapters"] == ["base"]
    assert ctx.metrics["cosine_fp32"] > 0.9999
    assert ctx.metrics["cosine_fp32_base"] > 0.9999
    once = context(tmp_path / "once")
    CoremlExporter().export(model, config(layout=layout), once)
    assert ctx.metrics["weight_bytes"] < once.metrics["weight_bytes"] + 4096


@pytest.mark.parametrize("layout", ["single", "anemll"])
def test_modules_fitted_anew_on_request(tmp_path, layout):
    model = artifact(decoder(), tmp_path)
    ctx = context(tmp_path / "out")
    rules = {
        "table": {"match": r"model\.embed_tokens", "scheme": "lut", "bits": 4},
        "mlp": {"match": r".*_proj", "scheme": "affine", "bits": 8, "symmetric": False},
    }
    CoremlExporter().export(model, config(layout=layout, repalettize=rules), ctx)
    found = ctx.metrics["repalettized"]
    assert found["kl"] > 0
    assert found["bytes_after"] < 0.6 * found["bytes_before"]
    assert len(found["modules"]) == 15
    assert ctx.metrics["cosine_fp32"] > 0.9999


def test_a_residual_stream_beyond_fp16_is_scaled(tmp_path):
    import torch

    model = decoder()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(2.0**15)
    source = artifact(model, tmp_path)
    ctx = context(tmp_path / "out")
    CoremlExporter().export(source, config(), ctx)
    assert ctx.metrics["residual_scale"] < 1
    assert ctx.metrics["overflows_fp16"] == 0
    unscaled = context(tmp_path / "unscaled")
    with pytest.raises(StageError, match="not finite in fp16"):
        CoremlExporter().export(source, config(residual_scale=1.0), unscaled)


def test_activations_are_measured_from_the_token_that_begins_text(tmp_path):
    import torch

    from a1q.coreml.reference import random_tokens

    start = next(token for token in range(320) if token not in random_tokens(320, 128))
    model = decoder(bos_token_id=start)
    with torch.no_grad():
        model.model.embed_tokens.weight[start] *= 1000
    ctx = context(tmp_path / "out")
    CoremlExporter().export(artifact(model, tmp_path), config(verify=None), ctx)
    assert ctx.metrics["peak_activation"] >= model.model.embed_tokens.weight[start].half().abs().max() > 100


def test_a_weight_beyond_fp16(tmp_path):
    import torch

    model = decoder()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = 70000
    with pytest.raises(StageError, match=r"layers\.0\.mlp\.up_proj does not fit fp16: its largest value is 70000"):
        CoremlExporter().export(artifact(model, tmp_path), config(), context(tmp_path / "out"))


@pytest.mark.parametrize("steps", [1, 5], ids=["building", "verification"])
def test_it_can_be_interrupted(tmp_path, steps):
    ctx = context(tmp_path / "out")
    asked = iter([0] * steps + [15] * 2)
    ctx.should_stop = lambda: next(asked)
    with pytest.raises(Interrupted):
        CoremlExporter().export(artifact(decoder(), tmp_path), config(), ctx)


def test_nothing_is_interpreted_without_verify(tmp_path):
    ctx = context(tmp_path / "out")
    CoremlExporter().export(artifact(decoder(), tmp_path), config(verify=None), ctx)
    assert "cosine_fp32" not in ctx.metrics
    assert ctx.metrics["weight_bytes"] > 0
