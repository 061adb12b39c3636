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


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    },
}
"""What makes each decoder family itself, small enough to show within 64 positions."""


def tiny_family(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A randomly initialised decoder of a family, hidden 64, head_dim 32, on which mistakes show.

    Norm gains and biases are random, and the layers weigh enough for predictions to be no copies of the input: at least
    16 distinct tokens are predicted over 64 random ones (tests/test_tiny.py).

    Args:
        model_type: a key of `FAMILIES`.
        changes: entries of the Hugging Face config, over the family's own.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if model_type == "qwen2":  # this family has no head_dim of its own
        settings |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        del settings["head_dim"]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**settings, **FAMILIES[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if "Norm" in type(module).__name__:
                module.weight += torch.empty_like(module.weight).uniform_(-0.5, 0.5)
                if model_type == "gemma3_text" and ".post_" in name:  # what a branch adds weighs more than the input
                    module.weight += 1.5
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(0, 0.3)
    return model


def tiny_family_folder(folder: Path, model_type: str, seed: int = 0, **changes: Any) -> Path:
    """Save `tiny_family` with a tokenizer as a Hugging Face folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_family(model_type, seed, **changes).save_pretrained(folder)
    write_tokenizer(folder, changes.get("vocab_size", 320))
    return folder
