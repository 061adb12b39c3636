"""Cached teacher answers of ANEMLL-QUANT-1: their text is taken over, their answers are not.

A cache is a folder of `shard_NNNNN.pt` and `meta.json`. A shard holds, for n sequences of L tokens, `input_ids` [n, L],
`topk_idx` and `topk_logits` [n, L - 1, K], and perhaps `rand_idx` and `rand_logits` [n, L - 1, R]: logits without the
logsumexp over the vocabulary. Without it they are no probabilities, and no loss over the whole vocabulary can be
computed; random tokens only estimate it. The teacher is asked again instead, about the same text.

The sequences were cut from one stream of documents, each followed by the end-of-text token. Where a chat template ends
turns with that very token, the end of a document is the one that follows on such an end and a newline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.errors import MismatchError, Problem
from a1q.importing.pickled import read_pickled

if TYPE_CHECKING:
    import numpy
    from tokenizers import Tokenizer

SHARDS, META = "shard_*.pt", "meta.json"
DIMENSIONS = {"input_ids": 2, "topk_idx": 3, "topk_logits": 3, "rand_idx": 3, "rand_logits": 3}
NEEDED = ("input_ids", "topk_idx", "topk_logits")
TEXT, RECIPE = "text.jsonl", "recipe.yaml"
OTHER_TOKENS = 0.5
"""Text of which less than this share becomes the same tokens again was written by another tokenizer."""
TUNE = 128
"""Held-out sequences that the recipe keeps, at most."""
FORMATS = {"alpaca": "alpaca", "dolly": "dolly", "sharegpt": "sharegpt", "openhermes": "openhermes"}
"""How their names of formats begin -> ours."""


@dataclass(frozen=True)
class Cache:
    """What a cache says, without its answers."""

    tokens: numpy.ndarray
    """int32 [n, L], in the order of the stream."""
    first: numpy.ndarray
    """int32 [n, L - 1], the teacher's most probable tokens."""
    top_k: int
    negatives: int
    meta: Mapping[str, Any]

    @property
    def teacher(self) -> str | None:
        """The model that was asked, where the cache says it."""
        name = self.meta.get("teacher_model")
        return name if isinstance(name, str) else None


def is_cache(path: Path) -> bool:
    """Whether this is a folder of such a cache."""
    return path.is_dir() and any(path.glob(SHARDS))


def read_cache(folder: Path) -> Cache:
    """Read all shards of a cache.

    Raises:
        MismatchError: if a shard is damaged, lacks tensors or is of another shape, or `meta.json` says otherwise.
    """
    import numpy

    meta = _read_meta(folder)
    shapes: dict[str, tuple[int, int, int]] = {}
    tokens, first = [], []
    for path in sorted(folder.glob(SHARDS)):
        shard = _read_shard(path)
        length, top_k = shard["input_ids"].shape[1], shard["topk_idx"].shape[2]
        shapes[path.name] = (length, top_k, shard["rand_idx"].shape[2] if "rand_idx" in shard else 0)
        tokens.append(shard["input_ids"].int().numpy())
        first.append(shard["topk_idx"][..., 0].int().numpy())
    length, top_k, negatives = next(iter(shapes.values()))
    if odd := [name for name, shape in shapes.items() if shape != (length, top_k, negatives)]:
        raise MismatchError(f"{folder}: {odd[0]} has other sizes than {next(iter(shapes))}; are they of one cache?")
    for key, found in (("max_length", length), ("topk", top_k), ("rand_neg", negatives)):
        if key in meta and meta[key] != found:
            raise MismatchError(f"{folder / META}: {key} is {meta[key]}, and the shards have {found}")
    return Cache(numpy.concatenate(tokens), numpy.concatenate(first), top_k, negatives, meta)


def _read_meta(folder: Path) -> Mapping[str, Any]:
    path = folder / META
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MismatchError(f"{path} can't be read: {error}") from None
    if not isinstance(meta, dict):
        raise MismatchError(f"{path} holds no JSON object")
    return meta


def _read_shard(path: Path) -> Mapping[str, Any]:
    import torch

    shard = read_pickled(path)
    if not isinstance(shard, Mapping):
        raise MismatchError(f"{path} holds a {type(shard).__name__}, expected tensors by name")
    if missing := [name for name in NEEDED if not isinstance(shard.get(name), torch.Tensor)]:
        raise MismatchError(f"{path} lacks {', '.join(missing)}; it has {', '.join(map(str, shard))}")
    for name, dimensions in DIMENSIONS.items():
        if name in shard and shard[name].dim() != dimensions:
            raise MismatchError(f"{path}: {name} is {list(shard[name].shape)}, expected {dimensions} dimensions")
    rows, length = shard["input_ids"].shape
    for name in DIMENSIONS:
        if name in shard and name != "input_ids" and shard[name].shape[:2] != (rows, length - 1):
            expected = f"[{rows}, {length - 1}, ...] for input_ids {[rows, length]}"
            raise MismatchError(f"{path}: {name} is {list(shard[name].shape)}, expected {expected}")
    if not rows * (length - 1):
        raise MismatchError(f"{path} holds no sequence")
    return shard


# -- text --------------------------------------------------------------------------------------------------------
def write_text(cache: Cache, base: Path, folder: Path) -> dict[str, float]:
    """Write the documents of a cache as `text.jsonl` into a folder.

    Returns:
        `documents`; `same`, the share of them that become the same tokens again.

    Raises:
        MismatchError: if the tokenizer of the base is not the one that the cache was written with.
    """
    from a1q.data.sequences import load_tokenizer

    tokenizer, end = load_tokenizer(base)
    largest = int(cache.tokens.max())
    hint = "name the model whose tokenizer it was: --base MODEL"
    if largest >= tokenizer.get_vocab_size() or int(cache.tokens.min()) < 0:
        message = f"the cache has tokens up to {largest}, the base's tokenizer {tokenizer.get_vocab_size()}"
        raise MismatchError([Problem(message, hint=hint)])
    count = same = 0
    with open(folder / TEXT, "w", encoding="utf-8") as file:
        for ids in documents_of(cache.tokens.reshape(-1).tolist(), end, _line_end(tokenizer)):
            text = tokenizer.decode(ids, skip_special_tokens=False)
            if not text.strip():
                continue
            count += 1
            same += tokenizer.encode(text, add_special_tokens=False).ids == ids
            file.write(json.dumps({"text": text}) + "\n")
    if not count or same < OTHER_TOKENS * count:
        message = f"of {count} documents {same} become the same tokens again; the cache is of another tokenizer"
        raise MismatchError([Problem(message, hint=hint)])
    return {"documents": count, "same": same / count}


def documents_of(stream: list[int], end: int, line_end: int | None) -> Iterator[list[int]]:
    """The documents of a stream of tokens, without the token `end` behind each.

    Args:
        line_end: the token of a newline. Where `end`, it and `end` again follow one another anywhere, only such a
            second `end` ends a document, as the others end turns of a conversation.
    """

    def closes(place: int) -> bool:
        return stream[place] == end and place > 1 and stream[place - 1] == line_end and stream[place - 2] == end

    turns = any(closes(place) for place in range(len(stream)))
    begin = 0
    for place, token in enumerate(stream):
        if token == end and (not turns or closes(place)):
            if place > begin:
                yield stream[begin:place]
            begin = place + 1
    if begin < len(stream):
        yield stream[begin:]


def _line_end(tokenizer: Tokenizer) -> int | None:
    ids = tokenizer.encode("\n", add_special_tokens=False).ids
    return ids[0] if len(ids) == 1 else None


# -- recipe ------------------------------------------------------------------------------------------------------
def write_recipe(cache: Cache, source: str, base: Path, folder: Path, text: Path) -> dict[str, int]:
    """Write `recipe.yaml` into a folder that has `text.jsonl`: a `kd` stage over as much text, of the cache's sizes.

    Args:
        source: how the recipe names the model that answers.
        base: its folder.
        text: where the text will be.

    Returns:
        `sequences` and `tune_sequences` of the stage.
    """
    from a1q.data import token_sequences
    from a1q.errors import StageError

    length = cache.tokens.shape[1]
    counts = {}
    for side in ("train", "tune"):
        try:
            found = token_sequences({"source": str(folder / TEXT), "format": "text"}, base, side, length, None, 0)
            counts[side] = len(found)
        except StageError:
            counts[side] = 0
    if not counts["train"]:
        raise MismatchError(f"the cache's text has not {length} tokens beside those held out")
    sizes = {"sequences": counts["train"], "tune_sequences": min(TUNE, counts["tune"])}
    options = {"top_k": cache.top_k, "random_negatives": cache.negatives, **sizes, "temperatures": [2]}
    quoted = json.dumps  # JSON is YAML
    origin = data_set(cache.meta)
    lines = [
        "# The teacher's answers anew, about the text of an imported cache.",
        *([f"# The data set itself: {quoted(origin)}"] if origin else []),
        "a1q: 1",
        "name: imported-cache",
        f"model: {{source: {quoted(source)}}}",
        "data:",
        f"  text: {{source: {quoted(str(text))}, format: text, seq_len: {length}}}",
        "stages:",
        "  - id: teacher",
        f"    kd: {{data: text, cache: {quoted(options)}}}",
    ]
    (folder / RECIPE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sizes


def data_set(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """The data entry that reads what the cache was made of, as far as it says so."""
    name, kind = meta.get("dataset_name"), meta.get("dataset_format")
    if not isinstance(name, str) or not isinstance(kind, str):
        return None
    ours = next((own for start, own in FORMATS.items() if kind.startswith(start)), "text")
    entry = {"source": name, "format": ours, "seq_len": meta.get("max_length", 128)}
    if ours == "text" and isinstance(meta.get("dataset_text_field"), str):
        entry["column"] = meta["dataset_text_field"]
    if meta.get("dataset_split") not in (None, "train"):
        entry["split"] = meta["dataset_split"]
    thinking = {"true": "on", "false": "off", "both": "both"}.get(str(meta.get("chat_thinking")).lower())
    return entry | ({"thinking": thinking} if thinking and ours != "text" else {})


# -- is it the teacher -------------------------------------------------------------------------------------------
def same_first(cache: Cache, base: Path, sequences: int, progress: Callable[[int, int], None]) -> float:
    """At how many of the positions of the first `sequences` the base ranks the token first that the cache does."""
    import torch

    from a1q.models.checkpoint import load_model

    model, agreed = load_model(base), 0
    count = min(sequences, len(cache.tokens))
    with torch.inference_mode():
        for row in range(count):
            logits = model(torch.from_numpy(cache.tokens[row : row + 1]).long()).logits[0, :-1]
            agreed += int((logits.argmax(-1).numpy() == cache.first[row]).sum())
            progress(row + 1, count)
    return agreed / (count * cache.first.shape[1])
