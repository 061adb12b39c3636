"""Text: built-in, from files or from the Hub, split by content, as documents or as token sequences."""

from a1q.data.records import identify, prepare
from a1q.data.sequences import documents, token_sequences

__all__ = ["documents", "identify", "prepare", "token_sequences"]
