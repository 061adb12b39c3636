"""The proof that a prepared model computes what it computed before, in float64.

Weights are rounded to float32 once, so a difference remains: about 2⁻²⁴ of every weight. Computing in float64 keeps the
rounding of activations out of the comparison, which would be larger and differ between machines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from a1q.errors import StageError
from a1q.models.preparations.preparation import Decoder, Preparation

HEAD = "lm_head"
BOUND = 1e-4


def trace(model: Any, tokens: Tensor, tick: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """What embedding, decoder layers and head put out, by their names: [n, L, hidden], the head [n, L, vocabulary].

    Everything is computed in float64. Weights are widened one layer at a time and come back as they were.

    Args:
        model: a dense decoder of one of the supported families.
        tokens: int64 [n, L].
        tick: called after every part.
    """
    decoder, dtype = Decoder(model), model.dtype
    layers = {f"model.layers.{index}": layer for index, layer in enumerate(decoder.layers)}
    named = {"model.embed_tokens": decoder.embedding, **layers, HEAD: decoder.head}
    names = {part: name for name, part in named.items()}
    found: dict[str, Tensor] = {}

    def widen(part: nn.Module, inputs: Any) -> None:
        part.to(torch.float64)

    def narrow(part: nn.Module, inputs: Any, output: Any) -> None:
        part.to(dtype)

    def keep(part: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        found[names[part]] = output.double()  # a look-up is exact, so the embedding needs no widening
        tick()
        return found[names[part]]

    hooks = [part.register_forward_hook(keep) for part in names]
    for part in (*decoder.layers, decoder.norm, decoder.head):
        hooks += [part.register_forward_pre_hook(widen), part.register_forward_hook(narrow)]
    try:
        with torch.no_grad(), _exact_norms(decoder):
            model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def compare(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], preparations: Sequence[Preparation]
) -> dict[str, float]:
    """Largest relative difference of any position, |after - before| / |before|, by the name of the part.

    Vectors of the residual stream are compared where the preparations took them; logits without their mean, which no
    softmax sees. A difference that isn't finite is infinite.
    """
    found = {}
    for name, expected in before.items():
        if name == HEAD:
            expected = expected - expected.mean(-1, keepdim=True)
            change = after[name] - after[name].mean(-1, keepdim=True) - expected
        else:
            for preparation in preparations:
                expected = preparation.stream(expected)
            change = after[name] - expected
        relative = (change.norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)).max()
        found[name] = relative.nan_to_num(torch.inf).item()
    return found


def require_equal(differences: Mapping[str, float]) -> None:
    """Refuse a prepared model that computes something else.

    Raises:
        StageError: if a part differs by more than `BOUND`; it names the first.
    """
    wrong = next((name for name, difference in differences.items() if not difference <= BOUND), None)
    if wrong is not None:
        raise StageError(
            f"the prepared model does not compute what it did before: {wrong} is the first part whose output differs, "
            f"by {differences[wrong]:.1e} of its length (allowed: {BOUND:.0e}); the logits differ by "
            f"{differences[HEAD]:.1e}"
        )


@contextlib.contextmanager
def _exact_norms(decoder: Decoder) -> Iterator[None]:
    """Norms in the type of their input; those of transformers compute in float32 whatever comes."""
    norms = [module for module in decoder.model.modules() if type(module).__name__.endswith("RMSNorm")]

    def forward_of(norm: Any) -> Callable[[Tensor], Tensor]:
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        return lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * decoder.gain(norm)

    for norm in norms:
        norm.forward = forward_of(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
