"""What adapters start from that is more than nothing: what quantizing lost.

With W [out, in] the weight before quantization, Ŵ what stands there now and M = E[x xᵀ] = R Rᵀ, the error (W - Ŵ) x
costs ‖(W - Ŵ) R‖² in what the linear answers. The matrix of rank r that takes most of it away is the truncated singular
value decomposition U_r S_r V_rᵀ of (W - Ŵ) R times R⁻¹; without statistics M is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.module import QuantModule
    from a1q.quant.statistics import Statistics

DAMPING = 1e-3
"""Added to the diagonal of M, as a share of its mean: inputs that never occurred would be free."""


def error_adapters(
    modules: Mapping[str, QuantModule],
    dense: Any,
    statistics: Statistics | None,
    rank: int,
    progress: Callable[[int, int], None],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> A [rank, in], B [out, rank] fp32 with B A near to W - Ŵ, W being the weight of that name in `dense`.

    A module that lost nothing is left out: zeros on both sides never train.

    Args:
        progress: called with modules done and modules in all.

    Raises:
        StageError: if the statistics are damaged.
    """
    found = {}
    for step, (name, module) in enumerate(modules.items(), 1):
        inputs = statistics.inputs(name) if statistics is not None else None
        lost = dense.get_submodule(name).weight.detach().to(module.indices.device) - module.weight.detach()
        if bool(lost.any()):
            found[name] = nearest_of_rank(lost, None if inputs is None else inputs.gram, rank)
        progress(step, len(modules))
    return found


def nearest_of_rank(error: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] fp32 that minimise tr (E - B A) M (E - B A)ᵀ; every row of A is as long as its
    column of B.

    Args:
        error: E [out, in].
        gram: M [in, in], which is damped; None for 1.
    """
    import torch

    wide = error.detach().to("cpu", torch.float64)  # Metal has no float64
    if gram is None:
        left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
        a = right[:rank]
    else:
        moment = gram.to("cpu", torch.float64)
        moment = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp_min(torch.finfo(torch.float64).tiny)
        root = vectors * values.sqrt()
        left, sizes, right = torch.linalg.svd(wide @ root, full_matrices=False)
        a = right[:rank] @ (vectors / values.sqrt()).T
    b = left[:, :rank] * sizes[:rank]
    lengths, others = a.norm(dim=1).clamp_min(1e-30), b.norm(dim=0).clamp_min(1e-30)
    balance = (others / lengths).sqrt()
    return (a * balance[:, None]).to(error.device, torch.float32), (b / balance).to(error.device, torch.float32)
