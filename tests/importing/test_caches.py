"""Cached answers: their text comes back to the same tokens, and a recipe makes the answers anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a1q.data.sequences import load_tokenizer
from a1q.errors import MismatchError
from a1q.importing.caches import data_set, documents_of, is_cache, read_cache, same_first, write_recipe, write_text
from tests.importing.test_pickled import Touch
from tests.tiny import TEXT, tiny_folder, tiny_model

L, K, R = 16, 5, 3


def write_cache(
    folder: Path, base: Path, count: int = 24, shard: int = 10, meta: dict | None = None
) -> list[list[int]]:
    """A cache as `precompute_teacher_topk.py` writes it, of documents whose tokens are returned."""
    tokenizer, end = load_tokenizer(base)
    documents = [tokenizer.encode(f"{number}. {TEXT[number % 3]}").ids for number in range(200)]
    stream = [token for document in documents for token in (*document, end)]
    model = tiny_model()
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, count, shard)):
        rows = range(start, min(start + shard, count))
        ids = torch.tensor([stream[row * L : (row + 1) * L] for row in rows])
        with torch.inference_mode():
            logits = model(ids).logits[:, :-1]
        top = logits.topk(K)
        random = torch.randint(logits.shape[-1], (len(rows), L - 1, R))
        torch.save(
            {
                "input_ids": ids.int(),
                "attention_mask": torch.ones(ids.shape, dtype=torch.uint8),
                "topk_idx": top.indices.int(),
                "topk_logits": top.values.half(),
                "rand_idx": random.int(),
                "rand_logits": logits.gather(-1, random).half(),
            },
            folder / f"shard_{number:05d}.pt",
        )
    if meta is None:
        meta = {
            "format": "qwen_kd_topk_cache_v1",
            "teacher_model": str(base),
            "max_length": L,
            "topk": K,
            "rand_neg": R,
        }
    (folder / "meta.json").write_text(json.dumps(meta))
    return documents


def test_the_text_is_that_of_the_stream(tmp_path, base):
    documents = write_cache(tmp_path / "cache", base)
    assert is_cache(tmp_path / "cache") and not is_cache(tmp_path)
    cache = read_cache(tmp_path / "cache")
    assert cache.tokens.shape == (24, L) and (cache.top_k, cache.negatives) == (K, R) and cache.teacher == str(base)
    found = write_text(cache, base, tmp_path)
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    tokenizer, _ = load_tokenizer(base)
    assert len(texts) == found["documents"] > 5 and found["same"] == 1
    for text, document in zip(texts[:-1], documents, strict=False):
        assert tokenizer.encode(text).ids == document
    assert same_first(cache, base, 4, lambda done, total: None) == 1


def test_another_model_is_told_by_what_it_ranks_first(tmp_path, base):
    write_cache(tmp_path / "cache", base)
    other = tiny_folder(tmp_path / "other", seed=9)
    assert same_first(read_cache(tmp_path / "cache"), other, 4, lambda done, total: None) < 0.2


def test_the_recipe_makes_a_cache_of_the_same_sizes(tmp_path, base, monkeypatch):
    from a1q.distill.cache import TeacherCache
    from tests.cli.support import a1q, report

    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    write_cache(tmp_path / "cache", base, count=60)
    cache = read_cache(tmp_path / "cache")
    write_text(cache, base, tmp_path)
    sizes = write_recipe(cache, str(base), base, tmp_path, tmp_path / "text.jsonl")
    result = a1q("run", tmp_path / "recipe.yaml", "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    made = TeacherCache(Path(report(tmp_path / "run")["stages"][0]["artifact"]))
    assert made.seq_len == L and made.meta["top_k"] == K and made.meta["random_negatives"] == R
    assert made.size("train") == sizes["sequences"] > 40 and made.size("tune") == sizes["tune_sequences"]
    assert tuple(made.temperatures) == (2,)
    batch = made.batch([0])
    with torch.inference_mode():
        logits = tiny_model()(batch.tokens).logits
    assert torch.allclose(batch.lse, logits.logsumexp(-1), atol=1e-4)


def test_ends_of_turns_do_not_end_a_conversation():
    end, line = 0, 1
    talk = [[5, 6, end, line, 7, end, line], [8, end, line], [5, end, line, 9, end, line]]
    stream = [token for one in talk for token in (*one, end)]
    assert list(documents_of(stream, end, line)) == talk
    assert list(documents_of([5, 6, end, 7, end, end, 8], end, line)) == [[5, 6], [7], [8]]


@given(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(0, 5))
def test_every_document_comes_back(documents, cut):
    stream = [token for document in documents for token in (*document, 0)]
    assert list(documents_of(stream, 0, 1)) == documents
    cut = min(cut, len(documents[-1]))
    short = stream[: len(stream) - 1 - cut]
    assert [token for one in documents_of(short, 0, None) for token in one] == [token for token in short if token]


@pytest.mark.parametrize(
    "said, entry",
    [
        (
            {"dataset_name": "tatsu-lab/alpaca", "dataset_format": "alpaca_chat", "chat_thinking": "both"},
            {"source": "tatsu-lab/alpaca", "format": "alpaca", "seq_len": 128, "thinking": "both"},
        ),
        (
            {"dataset_name": "a/b", "dataset_format": "plain", "dataset_text_field": "body", "dataset_split": "test"},
            {"source": "a/b", "format": "text", "seq_len": 128, "column": "body", "split": "test"},
        ),
        ({"dataset_name": "a/b"}, None),
    ],
)
def test_the_data_set_behind_a_cache(said, entry, tmp_path):
    assert data_set(said) == entry
    if entry:
        from tests.cli.support import a1q

        stages = "model: {source: m}\nstages: [{kd: {data: text}}]"
        text = f"a1q: 1\nname: x\ndata: {{text: {json.dumps(entry)}}}\n{stages}"
        (tmp_path / "x.yaml").write_text(text)
        assert a1q("validate", tmp_path / "x.yaml").exit_code == 0


# -- refusals ----------------------------------------------------------------------------------------------------
def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Write the first shard again with other tensors, None for those that are to go."""
    path = folder / "shard_00000.pt"
    shard = torch.load(path, weights_only=True) | tensors
    torch.save({name: value for name, value in shard.items() if value is not None}, path)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"topk_logits": None}, "lacks topk_logits; it has input_ids"),
        ({"topk_idx": torch.ones(10, L, K)}, rf"topk_idx is \[10, {L}, {K}\], expected \[10, {L - 1}, ...\]"),
        ({"topk_idx": torch.ones(10, L)}, "expected 3 dimensions"),
        ({"rand_idx": None, "rand_logits": None}, "other sizes than shard_00000"),
        (
            {"input_ids": torch.ones(0, 4), "topk_idx": torch.ones(0, 3, K), "topk_logits": torch.ones(0, 3, K),
             "rand_idx": None, "rand_logits": None},
            "holds no sequence",
        ),
    ],
)  # fmt: skip
def test_shards_that_are_none(tmp_path, base, tensors, message):
    write_cache(tmp_path, base)
    changed(tmp_path, **tensors)
    with pytest.raises(MismatchError, match=message):
        read_cache(tmp_path)


def test_pickles_and_meta(tmp_path, base):
    write_cache(tmp_path, base, meta={"topk": 64})
    with pytest.raises(MismatchError, match=r"topk is 64, and the shards have 5"):
        read_cache(tmp_path)
    for text in ("[]", "{"):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(MismatchError, match=r"meta\.json"):
            read_cache(tmp_path)
    (tmp_path / "meta.json").unlink()
    assert read_cache(tmp_path).meta == {}
    torch.save([1], tmp_path / "shard_00001.pt")
    with pytest.raises(MismatchError, match="holds a list"):
        read_cache(tmp_path)
    torch.save({"a": Touch(tmp_path / "touched")}, tmp_path / "shard_00001.pt")
    with pytest.raises(MismatchError, match="would execute code"):
        read_cache(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_another_tokenizer_is_refused(tmp_path, base):
    write_cache(tmp_path, base)
    cache = read_cache(tmp_path)
    changed(tmp_path, input_ids=torch.full((10, L), 5000, dtype=torch.int32))
    with pytest.raises(MismatchError, match="the cache has tokens up to 5000, the base's tokenizer 320"):
        write_text(read_cache(tmp_path), base, tmp_path)
    mixed = np.random.default_rng(0).integers(1, 320, cache.tokens.shape).astype(np.int32)
    with pytest.raises(MismatchError, match="the cache is of another tokenizer"):
        write_text(type(cache)(mixed, cache.first, K, R, {}), base, tmp_path)
