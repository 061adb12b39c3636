"""The options of `fit: error_feedback`, the same in every scheme."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.adjustable import Target
    from a1q.quant.feedback import State
    from a1q.quant.importance import Inputs


@dataclass(frozen=True)
class FeedbackOptions:
    """Described in the schemas."""

    fit: str
    spread: float
    damping: float
    sweeps: int
    passes: int

    def feeds_back(self, inputs: Inputs | None) -> bool:
        """Whether errors are fed back: told so, and E[x xᵀ] known."""
        return self.fit == "error_feedback" and inputs is not None and inputs.gram is not None

    def feed_back(
        self,
        weight: Tensor,
        inputs: Inputs | None,
        codes: Tensor,
        state: Callable[[Target, float], State],
    ) -> tuple[State, Tensor] | None:
        """State and codes uint8 [out, in] found by error feedback, no worse than those of the start.

        None where errors are not fed back.

        Args:
            weight: [out, in].
            inputs: what is known of its inputs.
            codes: uint8 [out, in] of the start.
            state: makes the start's grid, its values as many times as wide as the number says.

        Raises:
            ValueError: if E[x xᵀ] has another shape or is not finite.
        """
        from a1q.quant.adjustable import Target
        from a1q.quant.feedback import alternate, damped
        from a1q.quant.importance import gram_of, row_importance_of

        gram = gram_of(weight, inputs) if self.feeds_back(inputs) else None
        if gram is None:
            return None
        h = damped(gram, self.damping)
        rows = row_importance_of(weight, inputs)
        target = Target(weight, h.to(weight.dtype), rows)
        start = state(target, 1.0)
        missed = _squares(weight - start.values(codes), h) / max(_squares(weight, h), 1e-30)
        wide = state(target, math.sqrt(1 + self.spread * missed))
        return alternate(weight, h, wide, self.sweeps, self.passes, rows, known=(start, codes))


def _squares(matrix: Tensor, h: Tensor) -> float:
    """Σ H_jj m_ij² of a matrix [out, in]."""
    return float((matrix.square().double() @ h.diagonal()).sum())
