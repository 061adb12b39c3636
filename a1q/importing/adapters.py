"""LoRA alone: the adapters of a checkpoint as the folder that `peft` and `lora_recover` read."""

from __future__ import annotations

from pathlib import Path

from a1q.importing.checkpoint import LORA, Checkpoint
from a1q.importing.model import require_alpha, require_fit
from a1q.importing.settings import Settings
from a1q.models.view import ModelView


def write_adapters(checkpoint: Checkpoint, settings: Settings, view: ModelView, folder: Path) -> dict[str, int]:
    """Write the adapters of `checkpoint` into an existing folder; returns module -> rank.

    Raises:
        MismatchError: if they are of another model than `view`, or nothing says their alpha.
    """
    from a1q.training.adapters import write_peft_folder

    require_fit(checkpoint, view)
    alpha = require_alpha(checkpoint, settings)
    found = {name: [module.parts[part].float() for part in LORA] for name, module in checkpoint.modules.items()}
    write_peft_folder({name: (a, b, alpha) for name, (a, b) in found.items()}, folder)
    return {name: len(a) for name, (a, _) in found.items()}
