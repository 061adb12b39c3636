"""meta.json by itself: no package is needed to see that it is damaged."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from a1q.coreml.metafile import read_meta
from a1q.errors import MismatchError

PARTS = {
    "single": [{"name": "model", "file": "model.mlpackage", "role": "model", "layers": [0, 2], "theory_bytes": 9}],
    "anemll": [
        {"name": "embeddings", "file": "e.mlpackage", "role": "embeddings", "layers": [0, 0]},
        {"name": "ffn_1", "file": "f.mlpackage", "role": "ffn", "layers": [0, 1]},
        {"name": "ffn_2", "file": "g.mlpackage", "role": "ffn", "layers": [1, 2]},
        {"name": "lm_head", "file": "h.mlpackage", "role": "lm_head", "layers": [2, 2]},
    ],
}


def meta_of(layout: str = "single") -> dict[str, Any]:
    meta = {
        "format": 2, "layout": layout, "model_type": "qwen3", "context": 128, "prefill": 32, "vocabulary": 320,
        "eos_token_id": 0, "state": "kv_cache", "outputs": ["logits"], "parts": copy.deepcopy(PARTS[layout]),
    }  # fmt: skip
    for part in meta["parts"]:
        part["functions"] = {"infer": 1, "prefill": 32} if part["role"] in ("model", "ffn") else {"main": 1}
    return meta


def message(folder: Path, meta: object) -> str:
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(MismatchError) as caught:
        read_meta(folder)
    return str(caught.value)


@pytest.mark.parametrize("layout", PARTS)
def test_a_whole_one(layout, tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(meta_of(layout)))
    assert read_meta(tmp_path) == meta_of(layout)


def test_it_is_read_without_heavy_imports(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(meta_of()))
    script = (
        "import sys; from pathlib import Path; from a1q.coreml.metafile import read_meta; read_meta(Path(sys.argv[1]));"
        "assert not {'torch', 'coremltools', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_there_is_none(tmp_path):
    with pytest.raises(MismatchError, match=r"has no meta\.json.*\n.*take the whole folder"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 1}, "format 1; this a1q reads format 2"),
        ({"format": "3"}, "format '3'"),
        ({"layout": "triple"}, "the layout 'triple'; this a1q knows single, anemll"),
        ({"layout": ["single"]}, "the layout ['single']"),
        ({"vocabulary": "many", "outputs": None}, "vocabulary, outputs is missing or of another type"),
        ({"context": True}, "context is missing or of another type"),
        ({"prefill": 0}, "prefill is missing or of another type"),
        ({"outputs": []}, "outputs is missing or of another type"),
        ({"outputs": ["logits", "logits"]}, "outputs is missing or of another type"),
        ({"repalettized": {"a": 1}}, "repalettized is missing or of another type"),
        ({"repalettized": {"a": {"match": "x"}}}, "repalettized is missing or of another type"),
        ({"parts": []}, "parts is missing"),
        ({"parts": [{"name": "model"}]}, "parts[0].file"),
        ({"parts": [3]}, "parts[0].name"),
        ({"prefill": 64}, "prefill is 64, but 32 in part model"),
        ({"layout": "anemll"}, "the parts of layout anemll are embeddings, ffn, lm_head, not model"),
        ({"parts": 2 * meta_of()["parts"]}, "the parts of layout single are model, not model, model"),
    ],
)
def test_one_that_is_not_understood(tmp_path, changes, words):
    assert words in message(tmp_path, meta_of() | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file": "../model.mlpackage"}, "parts[0].file"),
        ({"file": ".."}, "parts[0].file"),
        ({"layers": []}, "parts[0].layers"),
        ({"layers": ["a", "b"]}, "parts[0].layers"),
        ({"functions": {}}, "parts[0].functions"),
        ({"functions": {"infer": "1"}}, "parts[0].functions"),
        ({"functions": {"infer": 1}}, "part model lacks the functions infer and prefill"),
        ({"theory_bytes": "9"}, "parts[0].theory_bytes"),
        ({"role": "heart"}, "the parts of layout single are model, not heart"),
    ],
)
def test_a_part_that_is_not_understood(tmp_path, changes, words):
    meta = meta_of()
    meta["parts"][0] |= changes
    assert words in message(tmp_path, meta)


def test_two_parts_of_one_name(tmp_path):
    meta = meta_of("anemll")
    meta["parts"][2]["name"] = "ffn_1"
    assert "two parts have the same name" in message(tmp_path, meta)


@pytest.mark.parametrize("text", ["", "[]", '{"format":', "\x00"])
def test_a_damaged_one(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(MismatchError, match=r"meta\.json"):
        read_meta(tmp_path)
