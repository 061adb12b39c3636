"""`scale`: channels that carry more get larger weights, so that rounding them costs less; what feeds them shrinks.

    s_j = (rms_j / mean rms)^α, rms_j = √E[x_j²] of input channel j        W ← W diag(s), x ← x / s

Who gives x / s, so that nothing is computed at run time:

    norm → q, k, v and norm → gate, up     gains / s
    up → down                              rows and bias of up / s; exact, as down reads act(gate) ⊙ up
    v → o                                  rows and bias of v / s; attention mixes positions, not channels

With grouped queries one channel of v feeds the same channel of several query heads: E[x²] is averaged over them, and
all get its one s.

Source: AWQ (Lin et al., 2024), section 3.2, where a search finds one α per layer; the folds are those of SmoothQuant
(Xiao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from a1q.models.preparations.preparation import Decoder, Preparation

LEAST = 1e-2
"""Least rms relative to the mean: a channel that was silent in the sample is not shrunk to nothing."""


def measured(layers: int) -> list[str]:
    """The linears whose inputs the factors come from, of a decoder with so many layers."""
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    return [f"model.layers.{index}.{kind}" for index in range(layers) for kind in kinds]


class Scale(Preparation):
    """Scale by activation.

    Args:
        squares: E[x²] [in] of every linear in `measured`, by its name.
        alpha: 0 changes nothing, 1 makes all channels of x equally large.
    """

    def __init__(self, squares: Mapping[str, Tensor], alpha: float):
        self.squares = squares
        self.alpha = alpha

    def layer(self, decoder: Decoder, index: int) -> None:
        layer, prefix = decoder.layers[index], f"model.layers.{index}"
        attention, mlp = layer.self_attn, layer.mlp
        squares = [self.squares[f"{prefix}.{name}"] for name in ("self_attn.q_proj", "mlp.gate_proj")]
        for (norm, readers), square in zip(decoder.readers(layer), squares, strict=True):
            s = self._factors(square)
            decoder.set_gain(norm, decoder.gain(norm) / s)
            for linear in readers:
                linear.weight.mul_(s)
        s = self._factors(self.squares[f"{prefix}.mlp.down_proj"])
        _divide_rows(mlp.up_proj, s)
        mlp.down_proj.weight.mul_(s)
        shared = (decoder.kv_heads, decoder.heads // decoder.kv_heads, -1)
        s = self._factors(self.squares[f"{prefix}.self_attn.o_proj"].unflatten(0, shared).mean(1))
        _divide_rows(attention.v_proj, s.flatten())
        attention.o_proj.weight.mul_(s[:, None].expand(shared).flatten())

    def _factors(self, square: Tensor) -> Tensor:
        """s in the shape of E[x²], float64."""
        rms = square.double().sqrt()
        mean = rms.mean()
        return (rms / mean).clamp_min(LEAST) ** self.alpha if mean > 0 else rms.new_ones(rms.shape)


def _divide_rows(linear: nn.Linear, s: Tensor) -> None:
    linear.weight.div_(s[:, None])
    if linear.bias is not None:
        linear.bias.div_(s)
