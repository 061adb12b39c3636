"""Checkpoints in the formats of ANEMLL-QUANT-1, and the weights they mean, computed here in numpy's float64.

Nothing here is taken from `a1q`: files are written tensor by tensor as those programs name them, and `weights` says
what each module computes with.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.tiny import tiny_model

Array = NDArray[np.float64]
MLP = re.compile(r".*\.mlp\.(gate|up|down)_proj")
ATTENTION = re.compile(r".*\.self_attn\.[qkvo]_proj")
FLOOR = 1e-8


@dataclass
class Written:
    """A state dict, and what it means."""

    state: dict[str, torch.Tensor]
    weights: dict[str, Array]
    """Module -> [out, in]."""
    indices: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, name: str = "model_state_dict.pt", **options: Any) -> Path:
        """Write the file, and a config beside it where there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state, folder / name, **options)
        if self.config:
            (folder / "config.json").write_text(json.dumps(self.config))
        return folder / name


def float64(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def table(entries: int) -> torch.Tensor:
    """Even from -1 to 1, in numbers that fp16 holds."""
    return torch.linspace(-1, 1, entries, dtype=torch.float16).float()


def low_rank(weight: Array, group: int, rank: int) -> tuple[Array, Array]:
    """(A, B): the truncated SVD of each group's largest magnitude, repeated over the group; B has whole groups."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % group)))
    largest = np.abs(padded.reshape(rows, -1, group)).max(2).clip(1e-8)
    u, s, vh = np.linalg.svd(np.repeat(largest, group, axis=1), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def tensor(array: Array, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def v1(
    mlp: tuple[int, int] = (4, 6),
    attention: tuple[int, int] | None = (16, 3),
    group: int = 32,
    snapped: str | None = None,
    negative: float = 0.0,
    seed: int = 0,
    **changes: Any,
) -> Written:
    """V1 of the tiny model: (entries, rank) of MLPs and of attention; with `negative` a share of rows has a scale that
    is partly below the floor."""
    model = tiny_model(seed, **changes)
    state = dict(model.state_dict())
    written = Written(state, {})
    random = np.random.default_rng(seed)
    for name in [key.removesuffix(".weight") for key in state]:
        choice = mlp if MLP.fullmatch(name) else attention if ATTENTION.fullmatch(name) else None
        if choice is None:
            continue
        entries, rank = choice
        weight = float64(state[f"{name}.weight"])
        a, b = low_rank(weight, group, rank)
        a *= random.uniform(0.8, 1.2, a.shape)  # scales have trained
        if negative:
            b[0, random.random(b.shape[1]) < negative] *= -1
        lut, a, b = float64(table(entries)), float64(tensor(a)), float64(tensor(b))
        scale = (a @ b)[:, : weight.shape[1]].clip(FLOOR)
        indices = np.rint((np.clip(weight / scale, -1, 1) + 1) * (entries - 1) / 2).astype(np.int64)
        written.weights[name], written.indices[name] = lut[indices] * scale, indices
        if snapped:
            state[f"{name}.weight"] = tensor(lut[indices] * (scale if snapped == "baked" else 1))
        state |= {f"{name}.scale_A": tensor(a), f"{name}.scale_B": tensor(b), f"{name}.lut": tensor(lut)}
    written.config = {"model_id": "tiny", "lut_size": mlp[0], "group_size": group, "scale_rank": mlp[1]}
    written.config |= {"quantize_attn": attention is not None, "snapped": bool(snapped)}
    if attention:
        written.config |= {"attn_lut_size": attention[0], "attn_group_size": group, "attn_scale_rank": attention[1]}
    if snapped:
        written.config["snapped_mode"] = snapped
    return written


def v2(
    mlp: tuple[int, int] = (4, 6),
    attention: tuple[int, int] | None = (16, 3),
    frozen: tuple[str, ...] = ("_Q", "_indices"),
    baked: bool | None = False,
    dtype: torch.dtype = torch.float32,
    adapter: int = 0,
    positive: str = "",
    seed: int = 0,
    **changes: Any,
) -> Written:
    """V2 of the tiny model, scales trained away from their indices; `frozen` names what is kept of the table's choice.

    Args:
        baked: whether magnitudes are in `scale_A`; None leaves the flag out.
        positive: `abs` or `softplus`: how factors and magnitudes are made positive.
    """
    model = tiny_model(seed, **changes)
    state = dict(model.state_dict())
    written = Written(state, {})
    random = np.random.default_rng(seed + 1)
    for name in [key.removesuffix(".weight") for key in state]:
        choice = mlp if MLP.fullmatch(name) else attention if ATTENTION.fullmatch(name) else None
        if choice is None:
            continue
        entries, rank = choice
        weight = float64(state[f"{name}.weight"])
        a, b = low_rank(weight, 1, rank)
        lut = float64(table(entries).to(dtype))
        start = np.where(np.abs(a @ b) < 1e-12, 1e-12, a @ b)
        indices = np.abs(np.clip(weight / start, -1, 1)[..., None] - lut).argmin(-1)
        g = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=1) * random.uniform(0.9, 1.1, rank)
        a = a * random.uniform(0.5, 1.5, a.shape) + random.normal(0, 0.01, a.shape)
        b = b * random.uniform(0.5, 1.5, b.shape)
        if baked or baked is None:
            a, g = a / np.linalg.norm(a, axis=0) * g, np.ones(rank)
        a, b, g = (float64(tensor(part, dtype)) for part in (a, b, g))
        if baked or baked is None:
            scale = a @ b
        else:
            left, right, size = a, b, g
            if positive:
                way = np.abs if positive == "abs" else lambda value: np.log1p(np.exp(value))
                left, right, size = way(a), way(b), way(g)
            left = left / np.linalg.norm(left, axis=0).clip(1e-6)
            right = right / np.linalg.norm(right, axis=1)[:, None].clip(1e-6)
            scale = (left * (size + 1e-6)) @ right
        if not frozen:
            indices = np.abs((weight / scale)[..., None].clip(lut.min(), lut.max()) - lut).argmin(-1)
        written.weights[name], written.indices[name] = lut[indices] * scale, indices
        parts = {"scale_A": a, "scale_B": b, "rank_magnitude": g, "lut": lut}
        state |= {f"{name}.{part}": tensor(value, dtype) for part, value in parts.items()}
        if baked is not None:
            state[f"{name}._scales_baked_flag"] = torch.tensor(int(baked), dtype=torch.int8)
        if "_Q" in frozen:
            state[f"{name}._Q"] = tensor(lut[indices], dtype)
        if "_indices" in frozen:
            state[f"{name}._indices"] = torch.from_numpy(indices)
        if adapter:
            state[f"{name}.lora_A"] = tensor(random.normal(0, 0.02, (adapter, weight.shape[1])))
            state[f"{name}.lora_B"] = tensor(random.normal(0, 0.02, (weight.shape[0], adapter)))
    bits = {entries: int(np.log2(entries)) for entries in (mlp[0], attention[0] if attention else 2)}
    written.config = {"version": "v2", "model_id": "tiny", "lut_bits": bits[mlp[0]], "scale_rank": mlp[1]}
    if attention:
        written.config |= {"attn_lut_bits": bits[attention[0]], "attn_scale_rank": attention[1]}
    if positive:
        written.config |= {"force_positive_scales": True, "positive_scale_method": positive}
        written.config |= {"magnitude_activation": positive}
    if adapter:
        written.config |= {"lora_r": adapter, "lora_alpha": 2 * adapter}
    return written


def apple(bits: int = 2, seed: int = 0, adapter: int = 0, **changes: Any) -> Written:
    """The Apple-style form of the tiny model's linears, the head left out."""
    model = tiny_model(seed, **changes)
    state = dict(model.state_dict())
    written = Written(state, {})
    random = np.random.default_rng(seed)
    for name in [key.removesuffix(".weight") for key in state]:
        if not (MLP.fullmatch(name) or ATTENTION.fullmatch(name)):
            continue
        weight = float64(state[f"{name}.weight"])
        parameter = float(np.float32(random.uniform(-2, 0.5)))
        top = 2 ** (bits - 1)
        scale = (np.log1p(np.exp(parameter)) + 1e-8) * np.abs(weight).max() / top
        codes = np.clip(np.rint(weight / scale + 0.5), 1 - top, top)
        written.weights[name] = (codes - 0.5) * scale
        written.indices[name] = (codes + top - 1).astype(np.int64)
        state[f"{name}._f_param"] = torch.tensor(parameter)
        state[f"{name}._qat_nbits"] = torch.tensor(bits, dtype=torch.int16)
        if adapter:
            state[f"{name}.lora_A"] = tensor(random.normal(0, 0.02, (adapter, weight.shape[1])))
            state[f"{name}.lora_B"] = tensor(random.normal(0, 0.02, (weight.shape[0], adapter)))
    return written
