"""`rotate_heads`: the values of every attention head in another orthonormal basis.

A head's output is o = P V with the attention weights P [L, L], so V ← V Q gives o Q, and o_proj takes Q back:

    v_proj, rows of kv head h:                            W ← Qₕᵀ W, b ← b Qₕ
    o_proj, columns of every query head that reads h:     W ← W Qₕ

With grouped queries one kv head has several query heads, neighbours in o_proj's columns; all of them get its Qₕ.

Source: QuaRot (Ashkboos et al., 2024), section 4, stage 1c; SpinQuant's R2 (Liu et al., 2024).
"""

from __future__ import annotations

import torch

from a1q.models.preparations.orthogonal import random_orthogonal
from a1q.models.preparations.preparation import Decoder, Preparation


class RotateHeads(Preparation):
    """Rotate every kv head of every layer by a random matrix of its own, drawn from `seed`."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def layer(self, decoder: Decoder, index: int) -> None:
        attention = decoder.layers[index].self_attn
        v, o = attention.v_proj, attention.o_proj
        size = v.out_features // decoder.kv_heads
        rotations = torch.stack([random_orthogonal(size, self.generator) for _ in range(decoder.kv_heads)])
        # [kv, size, in] by [kv, size, size]
        values = v.weight.unflatten(0, (decoder.kv_heads, size))
        v.weight.copy_((rotations.mT @ values).flatten(0, 1))
        if v.bias is not None:
            biases = v.bias.unflatten(0, (decoder.kv_heads, 1, size))
            v.bias.copy_((biases @ rotations).flatten())
        # [out, kv, group, size] by [kv, size, size]
        outputs = o.weight.unflatten(1, (decoder.kv_heads, decoder.heads // decoder.kv_heads, size))
        o.weight.copy_((outputs @ rotations).flatten(1))
