"""Every shipped recipe from end to end, shortened; `q4_to_q2` has tests of its own in test_demo.py."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import demo
from tests.cli.support import a1q
from tests.data.text import sentence
from tests.tiny import tiny_family_folder, write_tokenizer

TEXT = "data.text={source: {text}, seq_len: 32, holdout: 0.2}"
VERIFY = "{prompt: 40, generate: 4, random: 16}"
SHORT = [f"stages.{export}.{option}" for export in ("ane", "app") for option in ("context=128", f"verify={VERIFY}")]
FAMILY = [
    "model.source={model}",
    TEXT,
    "groups.mlp.expect={mlp}",
    "groups.attn.expect={attn}",
    "stages.teacher.cache.top_k=32",
    "stages.check.gate={}",
    *SHORT,
]
STAGED = ["model.source={model}", TEXT, "stages.check.gate={}", *(item for item in SHORT if ".ane." in item)]
STAGED_QWEN3 = [*STAGED, "groups.linears.expect={linears}", "stages.teacher.cache.top_k=32"]
TWO_GROUPS_QWEN3 = [
    "model.source={model}",
    TEXT,
    "groups.mlp.expect={mlp}",
    "groups.attn.expect={attn}",
    "stages.teacher.cache.top_k=32",
    "stages.check.gate={}",
]
RANKED_QWEN3 = [
    *TWO_GROUPS_QWEN3,
    *SHORT,
    "stages.start.rules.mlp.rank=3",
    "stages.teacher.cache.random_negatives=128",
]
MODEL_TYPES = {
    "qwen2.5-0.5b/q2a4": "qwen2",
    "llama-3.2-1b/q2a4": "llama",
    "mistral-7b/q2a4": "mistral",
    "gemma-3-270m/q2a4": "gemma3_text",
}
"""The family of the tiny model that a recipe runs on; Qwen3 where nothing is said."""
SETTINGS = {
    **dict.fromkeys(MODEL_TYPES, FAMILY),
    "q2a4": ["model.source={model}", TEXT, *SHORT],
    "v1_to_v2": ["model.source={model}", TEXT, "stages.check.gate={}", *SHORT],
    "v2_scratch": ["model.source={model}", TEXT, "stages.check.gate={}", *SHORT],
    "layerwise": ["model.source={model}", TEXT, "stages.check.gate={}", *SHORT],
    "progressive": ["model.source={model}", TEXT, "stages.check.gate={}", *SHORT],
    "budget": [
        "model.source={model}",
        TEXT,
        "stages.rules.budget.bits_per_param=6",
        "stages.check.gate={}",
        *(item for item in SHORT if ".ane." in item),
    ],
    "apple_2bit": ["model.source={model}", TEXT, "stages.check.gate={}", *SHORT],
    **dict.fromkeys(("q4", "q2"), STAGED),
    **dict.fromkeys(("qwen3-0.6b/q4", "qwen3-0.6b/q2"), STAGED_QWEN3),
    "pico": [
        "data.prose={source: builtin:prose, seq_len: 32}",
        "stages.pico.architecture={hidden_size: 64, intermediate_size: 96, num_hidden_layers: 1}",
        "stages.pico.tokenizer.vocab=300",
        "stages.pico.batch.sequences=2",
    ],
    "qwen3-0.6b/q4_to_q2": [*TWO_GROUPS_QWEN3, *(item.replace(".app.", ".anemll.") for item in SHORT)],
    **dict.fromkeys(("qwen3-0.6b/v1_to_v2", "qwen3-0.6b/v2_scratch"), RANKED_QWEN3),
    "qwen3-0.6b/layerwise": [*TWO_GROUPS_QWEN3, *SHORT],
    "qwen3-0.6b/progressive": [*TWO_GROUPS_QWEN3, *SHORT, "stages.q2a4.rules.mlp.rank=3"],
    "qwen3-0.6b/apple_2bit": [
        "model.source={model}",
        TEXT,
        "groups.linears.expect={linears}",
        "stages.teacher.cache.top_k=32",
        "stages.check.gate={}",
        *SHORT,
    ],
}
"""`--set`s that make a recipe fit a tiny model and the built-in text; `--smoke` does the rest."""


def test_every_shipped_recipe_is_run_somewhere():
    folder = demo.RECIPE.parent
    shipped = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    assert shipped == {*SETTINGS, "q4_to_q2"}


def test_every_recipe_of_a_model_on_the_hub_is_planned_for_its_shapes():
    assert set(REAL) == {name for name in SETTINGS if "/" in name}


def _filled(text: str, facts: Mapping[str, str]) -> str:
    for name, value in facts.items():
        text = text.replace(name, value)
    return text


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all runs."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("name", SETTINGS)
def test_it_runs_to_its_exports(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A1Q_HOME", str(home))
    model_type = MODEL_TYPES.get(name, "qwen3")
    one_layer = {} if model_type == "gemma3_text" else {"num_hidden_layers": 1}  # Gemma has two kinds of layers
    model = tiny_family_folder(tmp_path / "model", model_type, **one_layer)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(400)), encoding="utf-8")
    facts = {"{model}": str(model), "{text}": str(text), "{mlp}": str(3 * layers), "{attn}": str(4 * layers)}
    facts["{linears}"] = str(7 * layers)
    sets = [word for item in SETTINGS[name] for word in ("--set", _filled(item, facts))]
    done = a1q("run", name, "-o", tmp_path / "run", "--smoke", *sets)
    assert done.exit_code == 0, done.output
    report = demo.report(tmp_path / "run")
    assert report["status"] == "done"
    exports = [stage["id"] for stage in report["stages"] if stage["stage"] == "export"]
    assert exports and all(any((tmp_path / "run" / "export" / export).iterdir()) for export in exports)


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
REAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys((name for name in SETTINGS if name.startswith("qwen3-0.6b/")), QWEN3),
    "qwen2.5-0.5b/q2a4": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21,
    },
    "llama-3.2-1b/q2a4": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral-7b/q2a4": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False, "sliding_window": None,
    },
    "gemma-3-270m/q2a4": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "sliding_window": 512, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    },
}  # fmt: skip
"""The models on the Hub that the recipes name, as their config.json says them."""


@pytest.mark.parametrize("name", REAL)
def test_it_can_be_planned_for_the_real_shapes(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tables that don't divide a vocabulary, and widths beyond a limit, show at real sizes only."""
    monkeypatch.setenv("A1Q_HOME", str(home))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(400)), encoding="utf-8")
    monkeypatch.setattr("a1q.models.source.content_digest", lambda folder, names: "not read")
    model = hollow_model(tmp_path / "model", REAL[name])
    done = a1q("plan", name, "--set", f"model.source={model}", "--set", _filled(TEXT, {"{text}": str(text)}))
    assert done.exit_code == 0, done.output


def hollow_model(folder: Path, config: Mapping[str, Any]) -> Path:
    """A model folder of real names and shapes, a tokenizer beside it, whose weights are a hole in a file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder
