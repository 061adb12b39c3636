"""Whether two models speak about the same tokens: the identity of their tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from a1q.data.sequences import load_tokenizer
from a1q.engine.artifact import canonical_json, sha256_bytes
from a1q.errors import MismatchError, Problem


def vocabulary_of(folder: Path) -> dict[str, int]:
    """Token -> id of the tokenizer in a model folder, added tokens included."""
    return load_tokenizer(folder)[0].get_vocab(with_added_tokens=True)


def tokenizer_digest(folder: Path) -> str:
    """sha256 of the vocabulary: equal for tokenizers that give every token the same id."""
    return sha256_bytes(canonical_json(vocabulary_of(folder)))


def chat_template_digest(folder: Path) -> str | None:
    """sha256 of the chat template in a model folder, None if there is none."""
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(folder).chat_template
    return None if template is None else sha256_bytes(canonical_json(template))


def prompts_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """What `a1q.data.chat.Chat.prompts_digest` gives for the model in a folder, by thinking: `on`, `off`, `default`."""
    from a1q.data.chat import Chat

    modes = {"on": True, "off": False, "default": None}
    tokenizer = load_tokenizer(folder)[0]
    return {name: Chat(folder, tokenizer, modes[name]).prompts_digest() for name in names}


def require_same_tokens(folder: Path, other: Path, path: str) -> None:
    """Refuse two models whose tokenizers disagree.

    Raises:
        MismatchError: at recipe path `path`; it names the tokens that differ.
    """
    mine, theirs = vocabulary_of(folder), vocabulary_of(other)
    odd = sorted(token for token in {*mine, *theirs} if mine.get(token) != theirs.get(token))
    if odd:
        named = ", ".join(f"{token!r} ({mine.get(token)} and {theirs.get(token)})" for token in odd[:3])
        message = f"the two models' tokenizers differ in {len(odd)} tokens: {named}"
        raise MismatchError([Problem(message, path=path, hint="a teacher needs the student's own tokenizer")])


def require_cache_of(folder: Path, meta: Mapping[str, Any], path: str) -> None:
    """Refuse a teacher cache made with another tokenizer than a student's, or with another chat template or other
    prompts where its text went through one.

    Args:
        folder: the student's.
        meta: of the cache.
        path: of the option that names the cache.

    Raises:
        MismatchError: it names the field, `tokenizer`, `chat_template` or `prompts`, and both digests' beginnings.
    """
    fields = {"tokenizer": tokenizer_digest(folder)}
    if meta["chat_template"] is not None:
        fields["chat_template"] = chat_template_digest(folder) or "none"
    known = dict(meta)
    if all(meta[name] == own for name, own in fields.items()):  # else the prompts differ for that reason
        for name, own in prompts_of(folder, meta.get("prompts", {})).items():
            fields[f"prompts.{name}"], known[f"prompts.{name}"] = own, meta["prompts"][name]
    hint = "make the cache with this model's own (`from` of the `kd` stage), or train the model that it was made with"
    problems = [
        Problem(f"`{name}` of the cache is {known[name][:12]}, the model's is {own[:12]}", path=path, hint=hint)
        for name, own in fields.items()
        if own != known[name]
    ]
    if problems:
        raise MismatchError(problems)
