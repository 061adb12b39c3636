"""A conversation with a model: its messages, the prompt they make, and files of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.engine.files import write_atomic
from a1q.errors import UsageError
from a1q.generation.text import said

if TYPE_CHECKING:
    from a1q.data.chat import Chat
    from a1q.generation.loading import Voice

ROLES = ("system", "user", "assistant")


@dataclass
class Conversation:
    """Turns of user and assistant, behind what the system says."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it, for a chat template."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, text: str) -> None:
        """Add what the user says."""
        self.turns.append({"role": "user", "content": text})

    def answered(self, text: str, inside: bool = False) -> None:
        """Add what the assistant said, less its thought, which no later prompt repeats.

        Args:
            inside: the text begins within a thought.
        """
        self.turns.append({"role": "assistant", "content": said(text, inside)})

    def undo(self) -> str:
        """Take the last question and its answer back; the question, or nothing where there is none."""
        while self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        return self.turns.pop()["content"] if self.turns else ""

    def prompt(self, voice: Voice, chat: Chat, room: int) -> tuple[str, list[int], int]:
        """What asks for the next answer.

        The oldest turns are left out, and forgotten, while the prompt leaves fewer than `room` tokens for the answer.

        Returns:
            The prompt, its tokens, and how many messages were forgotten.

        Raises:
            UsageError: if the last question alone doesn't fit.
        """
        turns, forgotten = self.turns, 0
        while True:
            text = chat.prompt(Conversation(self.system, turns).messages)
            tokens = voice.chat_tokens(text)
            if len(tokens) + room <= voice.writer.context:
                self.turns = turns
                return text, tokens, forgotten
            later = next((n for n in range(1, len(turns)) if turns[n]["role"] == "user"), None)
            if later is None:
                message = f"the question has {len(tokens)} tokens with its template, and the context of"
                raise UsageError(f"{message} {voice.writer.context} must hold an answer of {room} too")
            turns = turns[later:]
            forgotten += later

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all, and over nothing but another conversation.

        Raises:
            UsageError: if something else is there.
            OSError: if it can't be written.
        """
        if path.is_file():
            try:
                load_conversation(path)
            except UsageError as error:
                raise UsageError(f"{error}; it stays as it is") from None
        write_atomic(path, json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False) + "\n")


def load_conversation(path: Path) -> Conversation:
    """What `Conversation.save` wrote; also one row of a chat set, `{"messages": [...]}`.

    Raises:
        UsageError: if it can't be read or is something else.
    """
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        found = [{"role": str(item["role"]), "content": _text(item["content"])} for item in messages]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is no conversation: {_reason(error)}") from None
    odd = next((item["role"] for item in found if item["role"] not in ROLES), None)
    if odd is not None:
        raise UsageError(f"{path} is no conversation: nobody is called {odd!r}; there are {', '.join(ROLES)}")
    system = found.pop(0)["content"] if found and found[0]["role"] == "system" else ""
    return Conversation(system, found)


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise ValueError(f"what is said must be text, not {json.dumps(content, ensure_ascii=False)[:40]}")
    content.encode()  # JSON can hold halves of characters, `\\ud800`
    return content


def _reason(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)
