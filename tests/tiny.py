"""Tiny models built in code, for tests of everything that takes a model folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

TEXT = [
    "Return a list of the words in the string, using sep as the delimiter string.",
    "Raise ValueError if the value is not present. The first argument is the name of the file to open.",
    "If the optional argument is given, at most maxsplit splits are done, and the rest of the string is returned.",
] * 4
END = "<|endoftext|>"


@functools.cache
def _tokenizer_json(vocabulary: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def write_tokenizer(folder: Path, vocabulary: int = 320) -> None:
    """A byte-level BPE tokenizer as plain transformers loads it."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(vocabulary), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    """A randomly initialised Qwen3 of two layers, hidden 64, tied embeddings, weights large enough to matter."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes})).eval()


def tiny_folder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save `tiny_model` with a tokenizer as a Hugging Face folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(seed, **changes).save_pretrained(folder)
    write_tokenizer(folder, changes.get("vocab_size", 320))
    return folder
