"""What is measured: linears and models of Qwen3-0.6B's shape, plain and quantized, with random numbers.

Quantized ones are Q2A4: 2 bits in MLPs and 4 in attention, `lut_lowrank`. Nothing is fitted: speed does
not hang on the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from a1q.quant.linear import QuantLinear
from a1q.quant.tied import swap_module

VOCABULARY, HIDDEN, LAYERS, SEQUENCES, LENGTH = 151936, 1024, 28, 4, 128
QWEN3 = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
LINEARS = {
    "self_attn.q_proj": (2048, 1024),
    "self_attn.k_proj": (1024, 1024),
    "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 2048),
    "mlp.gate_proj": (3072, 1024),
    "mlp.up_proj": (3072, 1024),
    "mlp.down_proj": (1024, 3072),
}
"""(out, in) of a layer's linears."""


def bits_of(name: str) -> int:
    """Of a linear by its name: Q2A4."""
    return 2 if ".mlp." in f".{name}" else 4


def dense_linear(rows: int, columns: int) -> nn.Linear:
    """A plain linear."""
    linear = nn.utils.skip_init(nn.Linear, columns, rows, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    return linear


def quantized_linear(rows: int, columns: int, bits: int, rank: int, sets: tuple[str, ...]) -> QuantLinear:
    """A quantized linear of which `sets` train."""
    parts = {
        "indices": torch.randint(2**bits, (rows, columns), dtype=torch.uint8),
        "lut": torch.linspace(-1.5, 1.5, 2**bits),
        "a": torch.rand(rows, rank).add_(0.5).mul_(0.02),
        "g": torch.ones(rank),
        "b": torch.rand(rank, columns).add_(0.5),
        "gain": torch.ones(rows),
    }
    module = QuantLinear({"scheme": "lut_lowrank", "bits": bits, "rank": rank}, parts)
    if "weights" in sets:
        module.start_latent()
    module.straight_through_fp16 = True
    module.requires_grad_(False)
    for name in sets:
        for part in module.trainable(name):
            part.requires_grad_(True)
    return module


def linears(
    sets: tuple[str, ...] | None, layers: int, ranks: tuple[int, int] = (1, 1), form: str = "dense"
) -> Iterator[nn.Linear]:
    """A model's linears; plain ones for None. `ranks` are of MLPs and of attention."""
    for _ in range(layers):
        for name, (rows, columns) in LINEARS.items():
            if sets is None:
                yield dense_linear(rows, columns)
            else:
                rank = ranks[0] if name.startswith("mlp") else ranks[1]
                module = quantized_linear(rows, columns, bits_of(name), rank, sets)
                module.form = form
                yield module


def model(sets: tuple[str, ...] | None, layers: int, everything: bool = False) -> Any:
    """A causal language model.

    The plain one (None) trains all linears of its layers, with `everything` embeddings, head and norms too. The
    quantized one trains `sets` of these linears; what is not quantized stands still.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        found = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, attn_implementation="sdpa", **QWEN3))
    for name in [name for name, _ in found.named_modules()]:
        kind = name.partition("layers.")[2].partition(".")[2]
        if kind in LINEARS:
            rows, columns = LINEARS[kind]
            new = (
                dense_linear(rows, columns) if sets is None else quantized_linear(rows, columns, bits_of(kind), 1, sets)
            )
            swap_module(found, name, new)
    table = nn.Embedding(VOCABULARY, HIDDEN)
    nn.init.normal_(table.weight, std=0.02)
    found.model.embed_tokens = table
    found.lm_head = nn.utils.skip_init(nn.Linear, HIDDEN, 1, bias=False)
    found.lm_head.weight, found.lm_head.out_features = table.weight, VOCABULARY
    for module in found.modules():
        if type(module).__name__ == "Qwen3RMSNorm":
            module.weight = nn.Parameter(torch.ones(module.weight.shape))
    found.model.rotary_emb = type(found.model.rotary_emb)(found.config)
    trained = {
        id(item)
        for module in found.modules()
        if isinstance(module, nn.Linear) and module is not found.lm_head
        for item in module.parameters()
        if item.requires_grad
    }
    for item in found.parameters():
        item.requires_grad_(id(item) in trained or (everything and sets is None))
    return found


def trained_parts(module: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [item for item in module.parameters() if item.requires_grad]
