"""What `a1q chat` does with a line: a question to the model, or a command."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from a1q.errors import A1QError, UsageError
from a1q.generation.answer import CTRL_C, Answer, answer
from a1q.generation.conversation import Conversation, load_conversation
from a1q.generation.loading import Voice
from a1q.generation.ranges import RANGES, shown
from a1q.generation.sampling import Sampler, Sampling
from a1q.generation.text import Thoughts, begins_inside, said

ROOM = 64
"""Tokens that a prompt leaves for an answer, or as many as an answer may have."""


@dataclass(frozen=True)
class Screen:
    """Where a session writes to."""

    show: Callable[[str, bool], None]
    """Receives text of an answer and whether it is thought."""
    tell: Callable[[str], None]
    """Receives a line about the session."""


class Session:
    """One chat.

    Args:
        thinking: what the chat template is told about thinking.
        seed: of the first answer; every answer draws from one of its own.
        interruptible: Ctrl-C ends an answer instead of the program.
    """

    def __init__(
        self,
        voice: Voice,
        screen: Screen,
        conversation: Conversation,
        sampling: Sampling,
        thinking: bool | None = None,
        most: int = 512,
        seed: int = 0,
        interruptible: bool = True,
    ):
        self.voice, self.screen, self.conversation = voice, screen, conversation
        self.sampling, self.thinking, self.most, self.seed = sampling, thinking, most, seed
        self.chat = voice.chat(thinking)
        self.interruptible = interruptible
        self.last: Answer | None = None
        self.count = 0

    def take(self, line: str, quoted: bool = False) -> bool:
        """Answer a line or do as it says; False for `/quit`.

        A command that can't be done, and a question that can't be answered, are told and change nothing.

        Args:
            quoted: it is a question also where it begins as a command does.
        """
        talk, before = self.conversation, list(self.conversation.turns)
        try:
            if line.startswith("/") and not quoted:
                name, _, rest = line[1:].strip().partition(" ")
                if name in LEAVING:
                    return False
                self._command(name, rest.strip())
            elif line.strip():
                self.conversation.ask(line)
                self._answer()
        except A1QError as error:
            talk.turns = before
            self.screen.tell(str(error))
        except KeyboardInterrupt:  # before an answer began, or behind it
            if talk.turns and talk.turns[-1]["role"] == "user":
                talk.turns = before
            if not self.interruptible:
                raise
            self.screen.tell(f"stopped at {CTRL_C}")
        return True

    def _answer(self) -> None:
        room = min(ROOM, self.most)
        text, prompt, forgotten = self.conversation.prompt(self.voice, self.chat, room)
        if forgotten:
            self.screen.tell(f"the context is full: the first {forgotten} messages are forgotten")
        inside = begins_inside(text)
        thoughts = Thoughts(inside)

        def show(piece: str) -> None:
            for thought, part in thoughts(piece):
                self.screen.show(part, thought)

        sampler = Sampler(self.sampling, self.seed + self.count)
        self.count += 1
        ends = self.voice.ends_of(self.chat)
        found = answer(self.voice, prompt, self.most, sampler, ends, show, self.interruptible)
        for thought, part in thoughts.end():
            self.screen.show(part, thought)
        if found.text:
            self.screen.show("\n", False)
        if found.stopped_at == CTRL_C and not said(found.text, inside).strip():
            raise UsageError(f"stopped at {CTRL_C} before there was an answer; the question is taken back")
        self.conversation.answered(found.text, inside)
        self.last = found
        self.screen.tell(found.figures)

    def _command(self, name: str, rest: str) -> None:
        commands = {item: getattr(self, f"_do_{item}") for item in HELP if item != "quit"}
        if name not in commands:
            near = difflib.get_close_matches(name, HELP, 1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise UsageError(f"there is no command /{name}; {hint}")
        commands[name](rest)

    def _do_help(self, rest: str) -> None:
        width = max(len(usage) for usage, _ in HELP.values())
        for usage, text in HELP.values():
            self.screen.tell(f"{usage:{width}}  {text}")
        self.screen.tell('A line that ends in \\ goes on in the next; """ opens and closes several. Ctrl-C stops.')

    def _do_reset(self, rest: str) -> None:
        self.conversation.turns.clear()
        self.screen.tell("a new conversation")

    def _do_system(self, rest: str) -> None:
        self.conversation.system = rest
        self.screen.tell("the system says that from now on" if rest else "the system says nothing")

    def _do_thinking(self, rest: str) -> None:
        modes = {"on": True, "off": False, "default": None}
        if rest not in modes:
            raise UsageError("/thinking on, off or default")
        self.chat, self.thinking = self.voice.chat(modes[rest]), modes[rest]
        self.screen.tell(f"thinking {rest}")

    def _do_set(self, rest: str) -> None:
        if not rest:
            values = {**vars(self.sampling), "max_tokens": self.most, "seed": self.seed}
            self.screen.tell("  ".join(f"{name} {shown(value)}" for name, value in values.items()))
            return
        name, _, text = rest.replace("=", " ").partition(" ")
        name = name.replace("-", "_")
        if name not in RANGES:
            near = difflib.get_close_matches(name, RANGES, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RANGES)}"
            raise UsageError(f"there is no setting {name!r}; {hint}")
        kind, low, high = RANGES[name]
        try:
            value = kind(text)
        except ValueError:
            raise UsageError(f"{name} takes a number, not {text!r}") from None
        if not low <= value <= high:
            raise UsageError(f"{name} is between {shown(low)} and {shown(high)}, not {shown(value)}")
        if name == "max_tokens":
            self.most = int(value)
        elif name == "seed":
            self.seed, self.count = int(value), 0
        else:
            changed: dict[str, Any] = {name: value}
            self.sampling = replace(self.sampling, **changed)
        self.screen.tell(f"{name} {shown(value)}")

    def _do_retry(self, rest: str) -> None:
        question = self.conversation.undo()
        if not question:
            raise UsageError("there is no question to answer again")
        self.conversation.ask(question)
        self._answer()

    def _do_undo(self, rest: str) -> None:
        question = self.conversation.undo()
        self.screen.tell(f"taken back: {question}" if question else "there is nothing to take back")

    def _do_save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save FILE.json")
        try:
            self.conversation.save(Path(rest).expanduser())
        except OSError as error:
            raise UsageError(f"{rest} can't be written: {error.strerror}") from None
        self.screen.tell(f"{len(self.conversation.messages)} messages in {rest}")

    def _do_load(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load FILE.json")
        self.conversation = load_conversation(Path(rest).expanduser())
        self.screen.tell(f"{len(self.conversation.messages)} messages from {rest}")

    def _do_stats(self, rest: str) -> None:
        writer = self.voice.writer
        self.screen.tell(f"{len(writer.tokens)} of {writer.context} tokens of context, on {writer.device}")
        if self.last is not None:
            self.screen.tell(self.last.figures)


HELP = {
    "help": ("/help", "this"),
    "reset": ("/reset", "forget the conversation"),
    "system": ("/system TEXT", "what the system says; nothing without TEXT"),
    "thinking": ("/thinking on|off|default", "what the chat template is told about thinking"),
    "set": ("/set NAME VALUE", "temperature, top_p, top_k, repetition_penalty, max_tokens or seed"),
    "retry": ("/retry", "another answer to the last question"),
    "undo": ("/undo", "take the last question and its answer back"),
    "save": ("/save FILE.json", "keep the conversation"),
    "load": ("/load FILE.json", "go on with one"),
    "stats": ("/stats", "speed, and how full the context is"),
    "quit": ("/quit", "leave; so does Ctrl-D"),
}
"""Command -> how it is written, what it does."""
LEAVING = ("quit", "exit")
