from __future__ import annotations

import json
import re

import pytest
import yaml

from a1q.coreml.anemll.meta import config_json, meta_yaml
from tests.tiny import FAMILIES


def meta_of(**changes):
    parts = [
        {"role": "embeddings", "file": "qwen_embeddings_lut4.mlpackage"},
        {"role": "ffn", "file": "qwen_FFN_PF_lut2_chunk_01of02.mlpackage"},
        {"role": "ffn", "file": "qwen_FFN_PF_lut2_chunk_02of02.mlpackage"},
        {"role": "lm_head", "file": "qwen_lm_head.mlpackage"},
    ]
    outputs = [f"logits{part + 1}" for part in range(16)]
    plain = {
        "name": "Qwen3-0.6B", "model_type": "qwen3", "context": 512, "prefill": 64, "eos_token_id": 151645,
        "parts": parts, "outputs": outputs,
    }  # fmt: skip
    return {**plain, **changes}


def lines_app(text: str, key: str) -> str:
    """What the app that reads line by line finds behind a key of `parameters`."""
    section = text[text.index("model_info:") :]
    section = section[section.index("  parameters:") :]
    line = next(line.strip() for line in section.splitlines() if line.strip().startswith(f"{key}:"))
    return line.split(":")[1].strip()


PARAMETERS = {
    "context_length": 512, "batch_size": 64, "lut_embeddings": 4, "lut_ffn": 2, "lut_lmhead": "none", "num_chunks": 2,
    "model_prefix": "qwen", "embeddings": "qwen_embeddings_lut4.mlmodelc", "lm_head": "qwen_lm_head.mlmodelc",
    "ffn": "qwen_FFN_PF_lut2.mlmodelc", "split_lm_head": 16,
}  # fmt: skip


def test_as_yaml():
    info = yaml.safe_load(meta_yaml(meta_of()))["model_info"]
    assert info["parameters"] == PARAMETERS
    assert info["version"] == "0.3.4" and info["architecture"] == "qwen3" and info["name"] == "a1q-Qwen3-0.6B-ctx512"


@pytest.mark.parametrize(("key", "value"), PARAMETERS.items())
def test_line_by_line(key, value):
    assert lines_app(meta_yaml(meta_of()), key) == str(value)


@pytest.mark.parametrize("name", ["qwen3", "0.5", "true", "a-very-long-name" * 3, "1e5"])
def test_the_first_line_with_version_is_the_version_and_nothing_is_quoted(name):
    text = meta_yaml(meta_of(name=name))
    assert next(line for line in text.splitlines() if "version:" in line) == "  version: 0.3.4"
    assert not re.search("['\"]", text)
    assert all(re.match(r" *[a-z_]+:", line) for line in text.splitlines())
    assert yaml.safe_load(text)["model_info"]["name"] == f"a1q-{name}-ctx512"


def test_config_names_the_type_the_end_tokens_and_the_tokenizer(tmp_path):
    assert json.loads(config_json(meta_of(), tmp_path)) == {"model_type": "qwen3", "eos_token_id": 151645}
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}', encoding="utf-8")
    found = json.loads(config_json(meta_of(eos_token_id=[1, 106]), tmp_path))
    assert found == {"model_type": "qwen3", "eos_token_id": [1, 106], "tokenizer_class": "Qwen2Tokenizer"}
    assert "eos_token_id" not in json.loads(config_json(meta_of(eos_token_id=None), tmp_path))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_name_that_an_app_forms_is_a_file_that_is_there(made, model_type):
    _, bundle = made(model_type)
    info = yaml.safe_load((bundle.folder / "meta.yaml").read_text(encoding="utf-8"))["model_info"]["parameters"]
    prefix = info["model_prefix"]
    luts = {
        key: "" if info[key] == "none" else f"_lut{info[key]}" for key in ("lut_embeddings", "lut_ffn", "lut_lmhead")
    }
    wanted = [f"{prefix}_embeddings{luts['lut_embeddings']}", f"{prefix}_lm_head{luts['lut_lmhead']}"]
    chunks = info["num_chunks"]
    wanted += [f"{prefix}_FFN_PF{luts['lut_ffn']}_chunk_{n:02d}of{chunks:02d}" for n in range(1, chunks + 1)]
    assert sorted(path.stem for path in bundle.folder.glob("*.mlpackage")) == sorted(wanted)
    named = [info["embeddings"], info["lm_head"], info["ffn"].replace(".", f"_chunk_01of{chunks:02d}.")]
    assert all((bundle.folder / name).with_suffix(".mlpackage").is_dir() for name in named)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # one of the apps asks for all of them
        assert (bundle.folder / name).is_file()
