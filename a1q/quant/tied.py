"""A head that computes with the weight of a quantized embedding, and putting quantized modules in place."""

from __future__ import annotations

from torch import Tensor, nn

from a1q.quant.module import QuantModule


class TiedHead(nn.Module):
    """y = x Ŵᵀ + bias, where Ŵ [vocabulary, hidden] is that of `source`.

    It holds no part of the weight, and `source` is no child of it: the one set of parameters is listed once, saved
    once and trained once, as the embedding's, and collects the gradients of both uses.
    """

    bias: nn.Parameter | None

    def __init__(self, source: QuantModule, bias: nn.Parameter | None = None):
        super().__init__()
        self._sources = (source,)  # a tuple, as a module would be registered as a child
        self.register_parameter("bias", bias)

    @property
    def source(self) -> QuantModule:
        """The quantized embedding."""
        return self._sources[0]

    @property
    def weight(self) -> Tensor:
        """Ŵ [vocabulary, hidden] fp32, made anew by every access."""
        return self.source.weight

    def forward(self, input: Tensor) -> Tensor:
        y = self.source.project(input)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def swap_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`.

    Heads that share the weight of an embedding compute with the quantized embedding that comes in its place;
    transformers' `tie_weights` then has nothing left to tie, as there is no dense weight.
    """
    old = model.get_submodule(name)
    heads = [(place, head) for place, head in model.named_modules() if _is_head_of(head, old)]
    _put(model, name, module)
    if heads:
        assert isinstance(module, QuantModule), "a tied embedding gives way to a quantized one only"
        for place, head in heads:
            _put(model, place, TiedHead(module, head.bias))
        source = f"{name}.weight"
        ties = {head: tied for head, tied in getattr(model, "all_tied_weights_keys", {}).items() if tied != source}
        model._tied_weights_keys = model.all_tied_weights_keys = ties  # type: ignore[assignment]


def _is_head_of(head: nn.Module, embedding: nn.Module) -> bool:
    if isinstance(head, TiedHead):
        return head.source is embedding
    weight = embedding._parameters.get("weight") if isinstance(embedding, nn.Embedding) else None
    return weight is not None and isinstance(head, nn.Linear) and head._parameters.get("weight") is weight


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
