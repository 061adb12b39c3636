"""How far hidden states are from what they should be, relative to their size: for layers by themselves and for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def relative_error(found: Tensor, wanted: Tensor, size: float | None = None, root: Tensor | None = None) -> Tensor:
    """Mean over positions of δᵀ M δ over `size`, δ = found - wanted; computed in float32, or float64 of such states.

    Relative to each position's own size it is a mean over positions: however many of them a batch or a process has.

    Args:
        found: [..., H]; gets the gradient.
        wanted: [..., H].
        size: what the error is relative to; None for each position's own wᵀ M w, w = `wanted`.
        root: R [H, H] with M = R Rᵀ; None for M = 1.
    """
    import torch

    kind = torch.float64 if found.dtype == torch.float64 else torch.float32
    wanted = wanted.to(found.device, kind)
    error = _squares(found.to(kind) - wanted, root)
    if size is not None:
        return error.mean() / size
    return (error / _squares(wanted, root).clamp_min(torch.finfo(kind).tiny)).mean()


def local_loss(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over layers of `relative_error` of the hidden states behind each, [B, L, H]."""
    errors = [relative_error(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)]
    return sum(errors[1:], errors[0]) / len(errors)


@contextmanager
def layer_outputs(model: Any, wanted: bool = True, only: int | None = None) -> Iterator[list[Tensor]]:
    """The hidden states behind every decoder layer, in order, or behind one, of the forward pass inside the block.

    They are what the layer gives, before the final norm, and carry its gradient. A layer computed again in the backward
    pass adds nothing. Where they are not wanted there are none.

    Args:
        only: the number of the one layer whose states are wanted.
    """
    from a1q.models.blocks import decoder_layers, states_of

    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, output: found.append(states_of(output)))
        for index, layer in enumerate(decoder_layers(model)[1] if wanted else ())
        if only in (None, index)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _squares(states: Tensor, root: Tensor | None) -> Tensor:
    return (states if root is None else states @ root).square().sum(-1)
