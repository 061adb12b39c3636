import itertools
import json
from pathlib import Path

import numpy
import pytest

from a1q.data import read_sequences, token_sequences
from a1q.data.bpe import END, END_TURN, token_bytes, train_tokenizer
from a1q.data.sequences import load_tokenizer
from a1q.errors import MismatchError, StageError
from tests.data.text import sentence


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    train_tokenizer((sentence(number) for number in range(300)), 400, 512, folder)
    return folder


@pytest.fixture
def entry(tmp_path: Path) -> dict:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(200)))
    return {"source": str(path), "holdout": 0.2}


def test_blocks_are_the_documents_joined_by_the_end_token(tokenizer: Path, entry: dict):
    rows = token_sequences(entry, tokenizer, "train", 16, None, 7)
    assert rows.dtype == numpy.int32 and rows.shape[1] == 16
    encoder, end = load_tokenizer(tokenizer)
    pieces = encoder.decode(rows.reshape(-1).tolist(), skip_special_tokens=False).split(END)
    assert end == 0
    assert len(pieces) > 100
    known = {sentence(number) for number in range(200)}
    assert set(pieces[:-1]) <= known


def test_starts_are_where_documents_begin(tokenizer: Path, tmp_path: Path):
    """Also where a document holds the end-of-text token itself, or is longer than sequences are."""
    texts = [sentence(number) + END + sentence(number + 1) for number in range(30)]
    texts += [" ".join(sentence(part) for part in range(20)) + f" {number}" for number in range(30)]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = read_sequences({"source": str(path), "holdout": 1e-9}, tokenizer, "train", 16, None, 7)
    assert found.starts.dtype == bool and found.starts.shape == found.tokens.shape and not found.templated
    flat, begins = found.tokens.reshape(-1), numpy.flatnonzero(found.starts)
    encoder, end = load_tokenizer(tokenizer)
    assert begins[0] == 0 and len(begins) > 50
    for first, last in itertools.pairwise(begins):
        assert flat[last - 1] == end
        assert encoder.decode(flat[first : last - 1].tolist(), skip_special_tokens=False) in texts


def test_the_order_is_the_seeds_and_prefixes_agree(tokenizer: Path, entry: dict):
    rows = token_sequences(entry, tokenizer, "train", 16, 20, 7)
    assert rows.shape == (20, 16)
    assert (rows == token_sequences(entry, tokenizer, "train", 16, 20, 7)).all()
    assert (rows[:5] == token_sequences(entry, tokenizer, "train", 16, 5, 7)).all()
    assert (rows != token_sequences(entry, tokenizer, "train", 16, 20, 8)).any()


def test_too_little_text_says_how_much_there_is(tokenizer: Path, entry: dict):
    there = len(token_sequences(entry, tokenizer, "test", 16, None, 0))
    with pytest.raises(StageError, match=rf"text for {there} sequences of 16 tokens, and 100000 were asked for"):
        token_sequences(entry, tokenizer, "test", 16, 100_000, 0)
    with pytest.raises(StageError, match="text for 0 sequences of 1000000 tokens, and at least 1"):
        token_sequences(entry, tokenizer, "test", 1_000_000, None, 0)


def test_conversations_go_through_the_chat_template(tokenizer: Path, tmp_path: Path):
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps({"question": f"Why {n}?", "answer": "So."}) + "\n" for n in range(40)))
    rows = token_sequences({"source": str(path), "holdout": 0.1}, tokenizer, "train", 8, None, 0)
    text = load_tokenizer(tokenizer)[0].decode(rows.reshape(-1).tolist(), skip_special_tokens=False)
    assert "<|im_start|>user\nWhy 1?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n<|endoftext|>" in text


def test_no_chat_template_is_said(tokenizer: Path, tmp_path: Path):
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"question": "Why?", "answer": "So."}) + "\n")
    with pytest.raises(MismatchError, match="no chat template"):
        token_sequences({"source": str(path), "holdout": 1e-9}, tokenizer, "train", 8, None, 0)


def test_a_folder_without_tokenizer_or_end_token_is_named(tokenizer: Path, tmp_path: Path):
    with pytest.raises(MismatchError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tokenizer / "tokenizer_config.json").write_text("{}")
    with pytest.raises(MismatchError, match="end-of-text"):
        load_tokenizer(tokenizer)
    (tokenizer / "config.json").write_text('{"eos_token_id": [2, 0]}')
    assert load_tokenizer(tokenizer)[1] == 2


def test_an_unknown_split_is_a_defect(entry: dict, tokenizer: Path):
    with pytest.raises(ValueError, match="no split 'valid'"):
        token_sequences(entry, tokenizer, "valid", 16, None, 0)


def test_training_a_tokenizer_is_deterministic_and_loads_in_transformers(tokenizer: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    again = tmp_path / "again"
    again.mkdir()
    train_tokenizer((sentence(number) for number in range(300)), 400, 512, again)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (tokenizer / name).read_bytes()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    text = "Ünïcode, \N{SNOWMAN} and\n\ttabs stay."
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.convert_tokens_to_ids(END_TURN)) == (0, 2)
    chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_token_bytes_count_the_bytes_of_the_text(tokenizer: Path):
    encoder, _ = load_tokenizer(tokenizer)
    sizes = token_bytes(tokenizer)
    text = "Ünïcode \N{SNOWMAN}, the queue of number 7."
    assert sum(sizes[number] for number in encoder.encode(text).ids) == len(text.encode())
    assert sizes[0] == sizes[1] == sizes[2] == 0 and len(sizes) == 400


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "", "is no tokenizer"),
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "is no JSON object"),
    ],
)
def test_a_damaged_tokenizer_is_named(tokenizer: Path, name: str, content: str, message: str):
    (tokenizer / name).write_text(content)
    with pytest.raises(MismatchError, match=f"{name} {message}"):
        load_tokenizer(tokenizer)
