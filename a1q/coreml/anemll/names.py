"""What the apps call things: files, functions, inputs, outputs, the state. No torch, no coremltools.

An app builds the file names from three entries of meta.yaml, the prefix and the bits per part.
"""

from __future__ import annotations

from a1q.coreml.architecture import MAX_DIMENSION, MAX_PARTS

STATE = "model_model_kv_cache_0"
"""The state of every chunk: one object, made from the first chunk, goes through all of them."""
PREFIXES = {"gemma3_text": "gemma3", "llama": "llama", "mistral": "mistral", "qwen2": "qwen25", "qwen3": "qwen"}
"""Model type -> prefix of the files: letters, digits and underscores, or one of the apps cuts it short."""


def file_name(prefix: str, part: str, bits: int | None, chunk: tuple[int, int] | None = None) -> str:
    """Name of a package.

    Args:
        part: `embeddings`, `FFN_PF` or `lm_head`.
        bits: of its lookup tables; None where most weights have none.
        chunk: (number from 1, how many) of a chunk of layers; there even where it is the only one.
    """
    lut = "" if bits is None else f"_lut{bits}"
    place = "" if chunk is None else f"_chunk_{chunk[0]:02d}of{chunk[1]:02d}"
    return f"{prefix}_{part}{lut}{place}.mlpackage"


def logits_names(splits: int) -> list[str]:
    """Outputs of the head, in the order of the vocabulary."""
    return [f"logits{part + 1}" for part in range(splits)]


def usual_splits(model_type: str) -> int:
    """Parts of the head that ANEMLL itself makes, and that apps assume where meta.yaml does not say."""
    return 16 if model_type.startswith("qwen") else 8


def default_splits(model_type: str, vocabulary: int, step: int = 1) -> int:
    """Parts of the head: the usual number, or the next one that makes equal parts of at most 16384 rows; 0 if none.

    Args:
        step: rows that must stay together, because they share a table or an index.
    """
    usual = usual_splits(model_type)
    for splits in (*range(usual, MAX_PARTS + 1), *range(usual - 1, 0, -1)):
        if vocabulary % (splits * step) == 0 and vocabulary // splits <= MAX_DIMENSION:
            return splits
    return 0
