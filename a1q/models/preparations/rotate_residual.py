"""`rotate_residual`: the residual stream in another orthonormal basis.

With Q orthogonal, RMSNorm without gains commutes with it: norm(x Q) = norm(x) Q, as the length of x stays. So gains
are folded into the linears behind the norms, what reads the stream turns back and what writes it turns:

    readers q, k, v, gate, up, head:  W ← W diag(g) Q, and the norm's gains become 1
    writers o, down:                  W ← Qᵀ W, b ← b Q
    embedding:                        E ← E Q

Source: SliceGPT (Ashkboos et al., 2024), theorem 1; with Hadamard matrices QuaRot (Ashkboos et al., 2024).

The head needs W diag(g) Q and the embedding E Q, of different values unless all gains of the final norm are equal: a
tied head has to be untied. Where norms with gains stand between a writer and the stream (Gemma 3), Q can't pass them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from a1q.models.preparations.orthogonal import random_orthogonal
from a1q.models.preparations.preparation import Decoder, Preparation

ROWS = 8192
"""Rows of the embedding and head that are in float64 at a time."""


class RotateResidual(Preparation):
    """Rotate by a random Hadamard matrix (by any random rotation where the size has none).

    Args:
        hidden: size of the residual stream.
        seed: of the rotation.
    """

    def __init__(self, hidden: int, seed: int):
        self.rotation = random_orthogonal(hidden, torch.Generator().manual_seed(seed))

    def ends(self, decoder: Decoder) -> None:
        decoder.untie()
        gain = decoder.gain(decoder.norm)
        for rows in decoder.embedding.weight.split(ROWS):
            rows.copy_(rows.double() @ self.rotation)
        for rows in decoder.head.weight.split(ROWS):
            rows.copy_((rows.double() * gain) @ self.rotation)
        decoder.set_gain(decoder.norm, torch.ones_like(gain))

    def layer(self, decoder: Decoder, index: int) -> None:
        layer = decoder.layers[index]
        for norm, readers in decoder.readers(layer):
            gain = decoder.gain(norm)
            for linear in readers:
                linear.weight.copy_((linear.weight * gain) @ self.rotation)
            decoder.set_gain(norm, torch.ones_like(gain))
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(self.rotation.T @ linear.weight)
            if linear.bias is not None:
                linear.bias.copy_(linear.bias @ self.rotation)

    def stream(self, hidden: Tensor) -> Tensor:
        return hidden @ self.rotation
