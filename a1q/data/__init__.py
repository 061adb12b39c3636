"""Text: built-in, from files or from the Hub, split by content, as documents or as token sequences."""

from a1q.data.records import conversational, identify, prepare
from a1q.data.sequences import Sequences, documents, read_sequences, token_sequences

__all__ = ["Sequences", "conversational", "documents", "identify", "prepare", "read_sequences", "token_sequences"]
