"""`a1q generate`: the same text from the same seed, from whatever holds a model, and kind refusals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from a1q.models.checkpoint import load_model, save_model
from tests.cli.support import a1q
from tests.cli.test_validate import HEAVY, loaded_by
from tests.tiny import tiny_folder

RECIPE = """\
a1q: 1
name: small
runtime: {device: cpu, threads: 1}
model: {source: MODEL}
groups:
  mlp: {match: '.*mlp.*'}
stages:
  - id: fitted
    quantize: {rules: {mlp: {scheme: lut, bits: 2}}}
  - id: final
    snap: {}
  - id: hf
    export: {format: safetensors}
  - id: packed
    export: {format: packed}
"""
PROMPT = "Return a list of the words"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `tiny`, and a finished run of it, `runs/small`."""
    folder = tmp_path_factory.mktemp("generate")
    model = tiny_folder(folder / "tiny")
    (folder / "small.yaml").write_text(RECIPE.replace("MODEL", str(model)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A1Q_HOME", str(folder / "home"))
        result = a1q("run", folder / "small.yaml", "-o", folder / "runs" / "small")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def here(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setenv("A1Q_HOME", str(work / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def facts(model: object, *options: object, prompt: str = PROMPT, tokens: int = 12) -> dict:
    result = a1q("generate", model, "--prompt", prompt, "--max-tokens", tokens, "--device", "cpu", "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def greedy(folder: Path, prompt: str, count: int) -> str:
    """The likeliest continuation, one whole forward pass a token, without cache or `generate`."""
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(folder)
    tokens = tokenizer(prompt)["input_ids"]
    length = len(tokens)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokenizer.decode(tokens[length:], skip_special_tokens=True)


def test_same_seed_same_text_and_streaming_prints_it() -> None:
    sampled = ("--temperature", 1, "--seed")
    first = facts("tiny", *sampled, 4)
    assert facts("tiny", *sampled, 4)["text"] == first["text"]
    assert facts("tiny", *sampled, 5)["text"] != first["text"]
    assert facts("tiny", *sampled, 4, "--top-p", 0.1)["text"] != first["text"]
    assert (first["tokens"], first["stopped_at"]) == (12, "--max-tokens")
    options = ("--prompt", PROMPT, "--max-tokens", 12, "--device", "cpu")
    streamed = a1q("generate", "tiny", *options, *sampled, 4)
    assert streamed.stdout == first["text"] + "\n"
    assert "wrote 12 in" in streamed.stderr and "tokens/s, stopped at --max-tokens; on cpu" in streamed.stderr


@pytest.mark.parametrize("model", ["tiny", "runs/small", "runs/small:fitted", "runs/small/export/packed"])
def test_temperature_zero_is_the_likeliest_text(model: str) -> None:
    found = facts(model, "--temperature", 0)
    assert found["text"] == greedy(Path(found["folder"]), PROMPT, 12)


def test_weights_are_compact_unless_asked_for_dense() -> None:
    options = ("--prompt", PROMPT, "--max-tokens", 6, "--device", "cpu", "--temperature", 0)
    compact, dense = a1q("generate", "small", *options), a1q("generate", "small", *options, "--dense")
    assert compact.stdout == dense.stdout
    assert "on cpu, weights in 0.2 MB (" in compact.stderr and " at 2 bytes each)" in compact.stderr
    for other in (dense, a1q("generate", "tiny", *options)):  # in tiny nothing is quantized
        assert other.stderr.endswith("on cpu\n")


def test_a_run_means_its_last_model_and_stages_go_by_id(work: Path) -> None:
    stages = {item["id"]: item for item in json.loads((work / "runs/small/report.json").read_text())["stages"]}
    assert facts("runs/small")["folder"] == facts("small")["folder"] == stages["final"]["artifact"]
    assert facts("small:fitted")["folder"] == stages["fitted"]["artifact"]
    assert Path(facts(f"{work}/runs/small:hf")["folder"]) == work / "runs/small/export/hf"
    assert facts("runs/small:packed")["text"] == facts("runs/small")["text"]


def test_the_built_in_model_writes() -> None:
    assert facts("builtin:pico", "--temperature", 0, tokens=4)["tokens"] == 4


def test_writing_out_keeps_latents_fp16_and_adapters() -> None:
    import torch

    from a1q.models.dense import write_out
    from a1q.quant.linear import QuantLinear, quantized_modules, swap_module
    from tests.tiny import tiny_model

    model = tiny_model()
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        module = QuantLinear.quantize(model.get_submodule(name), {"scheme": "lut_lowrank", "bits": 2})
        module.straight_through_fp16 = True
        module.set_adapter(torch.randn(3, module.in_features), torch.randn(module.out_features, 3), 6.0)
        swap_module(model, name, module)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        write_out(model)
        after = model(tokens).logits
    assert not list(quantized_modules(model))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_writing_out_a_head_tied_to_a_quantized_embedding(model_type: str) -> None:
    import torch

    from a1q.models.dense import write_out
    from a1q.quant.embedding import QuantEmbedding
    from a1q.quant.tied import swap_module
    from tests.tiny import tiny_family

    model = tiny_family(model_type)
    table = QuantEmbedding.quantize(model.model.embed_tokens, {"scheme": "lut_lowrank", "bits": 4})
    swap_module(model, "model.embed_tokens", table)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        write_out(model)
        after = model(tokens).logits
    assert type(model.lm_head) is torch.nn.Linear
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_the_prompt_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    expected = facts("tiny", "--temperature", 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    from a1q.cli.generate import _read_prompt

    assert _read_prompt("-") == PROMPT == expected["prompt"]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(prompt: str) -> None:
    result = a1q("generate", "tiny", "--prompt", prompt)
    assert (result.exit_code, "the prompt is empty" in result.output) == (2, True)


def test_a_prompt_longer_than_the_context_and_one_that_nearly_is() -> None:
    result = a1q("generate", "tiny", "--prompt", "~" * 256, "--device", "cpu")
    assert result.exit_code == 2
    assert "256 tokens" in result.output and "context of 256" in result.output
    found = facts("tiny", prompt="~" * 250, tokens=100)
    assert found["prompt_tokens"] + found["tokens"] == 256
    assert found["stopped_at"] == "the end of the context"


def test_the_models_own_end_of_text_ends_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree("tiny", tmp_path / "tiny")
    model, tokenizer = load_model(tmp_path / "tiny"), AutoTokenizer.from_pretrained("tiny")
    first = int(model(tokenizer(PROMPT, return_tensors="pt")["input_ids"]).logits[0, -1].argmax())
    (tmp_path / "tiny" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, first], "top_k": 1}))
    found = facts(tmp_path / "tiny", "--temperature", 0)
    assert (found["tokens"], found["stopped_at"]) == (1, "the end of the text")


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("runs/smal:final", 2, ["no run 'runs/smal'", "runs/small"]),
        ("runs/small:finl", 2, ["'finl'", "did you mean runs/small:final?"]),
        ("builtin:pixo", 3, ["builtin:pico"]),
        ("./tyny", 3, ["no such folder", "tiny"]),
        ("smalll", 3, ["did you mean the run", "runs/small"]),
        ("somebody/something", 3, ["the Hub can't be reached"]),
        ("home", 3, ["config.json"]),
    ],
)
def test_what_is_not_there(model: str, code: int, words: list[str]) -> None:
    result = a1q("generate", model, "--prompt", "x")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert all(word in result.output for word in words), result.output


def test_a_stage_without_a_model(work: Path, tmp_path: Path) -> None:
    report = json.loads((work / "runs/small/report.json").read_text())
    report["stages"] = [{**report["stages"][0], "id": "check", "kind": "report"}]
    (tmp_path / "report.json").write_text(json.dumps(report))
    named, whole = (a1q("generate", name, "--prompt", "x") for name in (f"{tmp_path}:check", tmp_path))
    assert named.exit_code == whole.exit_code == 2
    assert "made a report, not a model" in named.output
    assert "has made no model yet; its stages: check" in whole.output


def test_an_artifact_that_is_gone(work: Path, tmp_path: Path) -> None:
    report = json.loads((work / "runs/small/report.json").read_text())
    report["stages"] = [{**report["stages"][0], "artifact": str(tmp_path / "gone")}]
    (tmp_path / "report.json").write_text(json.dumps(report))
    result = a1q("generate", tmp_path, "--prompt", "x")
    assert (result.exit_code, "is not there any more" in result.output) == (3, True)


def test_a_core_ml_package(tmp_path: Path) -> None:
    package = tmp_path / "model.mlpackage"
    package.mkdir()
    for name in (tmp_path, package):
        result = a1q("generate", name, "--prompt", "x")
        assert result.exit_code == 3 and "Core ML" in result.output


def test_a_model_without_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    save_model(load_model(Path("tiny")), tmp_path)
    bare = a1q("generate", tmp_path, "--prompt", "x", "--device", "cpu")
    assert bare.exit_code == 3 and "tokenizer" in bare.output and "Traceback" not in bare.output
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("tiny") / name, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    damaged = a1q("generate", tmp_path, "--prompt", "x", "--device", "cpu")
    assert damaged.exit_code == 3 and "truncated or damaged" in damaged.output


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer_config.json", "[]"), ("generation_config.json", "{")],
)
def test_damaged_settings(tmp_path: Path, name: str, text: str) -> None:
    tiny_folder(tmp_path / "tiny")
    (tmp_path / "tiny" / name).write_text(text)
    result = a1q("generate", tmp_path / "tiny", "--prompt", PROMPT)
    assert result.exit_code == 3 and "Traceback" not in result.output


def test_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a1q.training.device.available_devices", lambda: ["cpu"])
    result = a1q("generate", "tiny", "--prompt", "x", "--device", "mps")
    assert (result.exit_code, "this machine has cpu" in result.output) == (3, True)


def test_errors_as_json() -> None:
    result = a1q("generate", "builtin:pixo", "--prompt", "x", "--json")
    document = json.loads(result.stdout)
    assert (document["ok"], document["exit_code"]) == (False, 3)


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("generate", "--help", heavy=HEAVY) == [0, []]
