"""The chat template in a model's folder, read as text without transformers, and what a data entry asks of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from a1q.errors import Problem

SWITCH = "enable_thinking"
"""The variable by which templates of Qwen 3 and its kin are told whether to think."""
TEMPLATE_FILE = "chat_template.jinja"


def template_of(folder: Path) -> str | None:
    """The template that transformers takes from a folder for conversations without tools, None if there is none."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    try:
        settings: Any = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # who reads the tokenizer says so
    return default_of(settings.get("chat_template") if isinstance(settings, dict) else None)


def default_of(found: Any) -> str | None:
    """Of a tokenizer's template, one text or several by name, the one for conversations without tools."""
    if isinstance(found, list):
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def refusal(template: str | None, thinking: bool, where: str) -> Problem | None:
    """Why conversations can't be written with a template, or None.

    Args:
        thinking: whether it has to be able to think.
        where: whose it is, for the message.
    """
    if template is None:
        hint = "use `format: text`, or a model that was trained to chat"
        return Problem(f"the tokenizer in {where} has no chat template", hint=hint)
    if thinking and SWITCH not in template:
        message = f"the chat template in {where} knows no thinking: `{SWITCH}` doesn't occur in it"
        return Problem(message, hint="leave `thinking` out")
    return None
