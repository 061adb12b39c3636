"""The techniques on tiny models, and what they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from a1q.models.preparations.families import FAMILIES
from a1q.models.preparations.preparation import Preparation
from a1q.models.preparations.rotate_heads import RotateHeads
from a1q.models.preparations.rotate_residual import RotateResidual
from a1q.models.preparations.scale import Scale, measured

TOKENS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(5))


def squares_of(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """E[x²] over four orders of magnitude, a silent channel among them, for every linear that `Scale` asks for."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name in measured(model.config.num_hidden_layers):
        size = model.get_submodule(name).in_features
        found[name] = 10 ** torch.empty(size).uniform_(-4, 4, generator=random)
        found[name][0] = 0.0
    return found


TECHNIQUES: dict[str, Callable[[Any], Preparation]] = {
    "rotate_residual": lambda model: RotateResidual(model.config.hidden_size, seed=3),
    "rotate_heads": lambda model: RotateHeads(seed=3),
    "scale": lambda model: Scale(squares_of(model), alpha=0.5),
}


def fitting(model_type: str) -> list[str]:
    """The techniques that keep this family's function."""
    return [name for name in TECHNIQUES if name != "rotate_residual" or not FAMILIES[model_type].post_norms]


def made(model: Any, names: Sequence[str]) -> list[Preparation]:
    """Techniques by their names, for this model."""
    return [TECHNIQUES[name](model) for name in names]
