"""Whether two models speak about the same tokens: the identity of their tokenizers."""

from __future__ import annotations

from pathlib import Path

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
