"""`builtin:qa`: questions about the standard library, answered by its docstrings."""

from __future__ import annotations

from collections.abc import Mapping

from a1q.data.builtin import Document
from a1q.engine.artifact import sha256_bytes

VERSION = 1
"""Raise it whenever the same text gives other questions."""
QUESTION = {
    "module": "What is the module {name} for?",
    "class": "What is the class {name}?",
    "function": "What does {name} do?",
}
SHORTEST_ANSWER = 30


def digest_of(text_digest: str) -> str:
    """Digest of the questions made from the text of that digest."""
    return sha256_bytes(f"questions {VERSION} of {text_digest}".encode())


def conversation(document: Document) -> tuple[Mapping[str, str], ...]:
    """A question and its answer, the docstring's first paragraph; empty for what no one would ask."""
    private = any(part.startswith("_") for part in document.name.split("."))
    answer = " ".join(document.text.split("\n\n")[0].split())
    if document.kind not in QUESTION or private or len(answer) < SHORTEST_ANSWER:
        return ()
    question = QUESTION[document.kind].format(name=document.name)
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
