"""Positions of packed text: documents that stand in one sequence without seeing each other.

Where positions begin anew, the models of `transformers` let a token look back as far as that and no further, so that a
document in a packed sequence is given just what it would be given alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def document_positions(borders: Tensor) -> Tensor:
    """Of every token its place in its document: int64 [B, L] from `borders`, bool [B, L], True where one begins.

    What a sequence begins with counts from 0, be it the start of a document or the rest of one.
    """
    import torch

    places = torch.arange(borders.shape[1], device=borders.device).expand(borders.shape)
    return places - torch.where(borders, places, 0).cummax(dim=1).values


def passed(tokens: Tensor, borders: Tensor | None = None) -> dict[str, Any]:
    """Arguments of a causal language model for whole sequences, with no cache of keys and values.

    Args:
        tokens: int64 [B, L].
        borders: bool [B, L], where documents begin that attention stays within; None: it sees all that came before.
    """
    found: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    if borders is not None:
        found["position_ids"] = document_positions(borders.to(tokens.device))
    return found
