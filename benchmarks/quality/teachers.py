"""The teachers: `pico`, the same function with outliers folded in, and one that was trained around fixed outliers.

    pico         the built-in model
    pico-diag    the same function. Channels between adjacent layers are scaled apart (norm gain and the columns it
                 feeds, up_proj rows and down_proj columns, v_proj rows and o_proj columns), most of them a little, some
                 by 8 to 30. Its outliers are exactly diagonal, which a row and a column scale absorb: a test of
                 invariance.
    pico-heavy   single elements of every decoder linear, 0.5 % of them and 6 to 12 standard deviations large, stand at
                 random places that no row and no column scale describes; all other parameters were distilled from pico
                 around them.

The last two are made from the first by this file alone, and kept below `$A1Q_HOME/quality/teachers`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.protocol import BATCH, LENGTH, TEXT, held_out

if TYPE_CHECKING:
    from torch import Tensor, nn

BASE = "builtin:pico"
DIAG = {"seed": 20, "common": (0.5, 2.0), "outliers": 0.02, "large": (8.0, 30.0)}
"""Factors of most channels, the share of outliers, and theirs (or one over it); log-uniform both."""
HEAVY = {"seed": 21, "outliers": 0.005, "large": (6.0, 12.0), "steps": 150, "lr": 1e-3, "embedding_lr": 1e-3}
"""The share of fixed elements, their size in standard deviations of the weight (log-uniform), and the distillation."""
RECORD = "teacher.json"
THREADS = 2
"""The last bits of a trained teacher hang on it."""


def teacher_folder(name: str) -> Path:
    """The folder of a teacher in Hugging Face layout, made at first use; `teacher.json` says with what.

    Raises:
        ValueError: if there is no teacher of that name.
    """
    from a1q.engine.files import fsync_tree, home, remove_tree
    from a1q.models.checkpoint import load_model, save_model
    from a1q.models.source import resolve_source

    base = resolve_source(BASE)
    if name == "pico":
        return base.path
    if name not in MADE:
        raise ValueError(f"no teacher {name!r}; there are {', '.join(TEACHERS)}")
    change, settings = MADE[name]
    made_with = {"base": base.digest, **json.loads(json.dumps(settings))}
    folder = home() / "quality" / "teachers" / name
    if _record(folder).get("made_with") == made_with:
        return folder
    aside = folder.with_name(f".{name}.{os.getpid()}")
    remove_tree(aside)
    aside.mkdir(parents=True)
    model = load_model(base.path)
    figures = change(model, base.path)
    save_model(model, aside, tokenizer_from=base.path)
    record = json.dumps({"made_with": made_with, "figures": figures}, indent=2) + "\n"
    (aside / RECORD).write_text(record, encoding="utf-8")
    fsync_tree(aside)
    remove_tree(folder)
    os.replace(aside, folder)
    return folder


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of the linears of every decoder layer: what is quantized."""
    from torch.nn import Linear

    for name, module in model.named_modules():
        if isinstance(module, Linear) and ".layers." in name:
            yield name, module


def fold_outliers(
    model: Any, seed: int, common: tuple[float, float], outliers: float, large: tuple[float, float]
) -> None:
    """Scale channels of a Llama-like decoder apart in place, its function unchanged but for rounding.

    Query and key rows stay: the norms of Qwen3's heads would undo what is done to them.
    """
    import torch

    random = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        found = _log_uniform(count, *common, random)
        chosen = torch.randperm(count, generator=random)[: max(1, round(outliers * count))]
        far = _log_uniform(len(chosen), *large, random)
        upwards = torch.rand(len(chosen), generator=random, dtype=torch.float64) < 0.5
        found[chosen] = torch.where(upwards, far, 1 / far)
        return found

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                s = factors(len(norm.weight)).to(norm.weight)
                norm.weight /= s
                for reader in readers:
                    reader.weight *= s
            s = factors(mlp.up_proj.out_features).to(mlp.up_proj.weight)
            mlp.up_proj.weight *= s[:, None]
            mlp.down_proj.weight /= s
            s = factors(attention.v_proj.out_features).to(attention.v_proj.weight)
            attention.v_proj.weight *= s[:, None]
            # Every head of v serves several consecutive heads of queries, whose outputs are o's inputs in that order.
            heads = s.reshape(-1, 1, attention.head_dim).expand(-1, attention.num_key_value_groups, -1)
            attention.o_proj.weight /= heads.reshape(-1)


def plant_outliers(model: Any, seed: int, outliers: float, large: tuple[float, float]) -> dict[str, Tensor]:
    """Set single elements of the decoder's linears to large values in place; masks [out, in] of them by module name."""
    import torch

    random = torch.Generator().manual_seed(seed)
    masks = {}
    with torch.no_grad():
        for name, linear in linears(model):
            weight = linear.weight.data.view(-1)
            places = torch.randperm(len(weight), generator=random)[: round(outliers * len(weight))]
            signs = torch.randint(2, (len(places),), generator=random) * 2 - 1
            size = _log_uniform(len(places), *large, random) * signs * weight.std()
            weight[places] = size.to(weight)
            mask = torch.zeros(len(weight), dtype=torch.bool)
            mask[places] = True
            masks[name] = mask.view(linear.weight.shape)
    return masks


def kurtosis(model: Any) -> float:
    """Mean over the decoder's linears of E[(w - mean)^4] / variance^2; 3 for a normal distribution."""
    found = []
    for _, linear in linears(model):
        w = linear.weight.detach().double()
        w = w - w.mean()
        found.append(float(w.pow(4).mean() / w.square().mean() ** 2))
    return sum(found) / len(found)


def _make_diag(model: Any, folder: Path) -> dict[str, float]:
    before = kurtosis(model)
    fold_outliers(model.double(), **DIAG)  # type: ignore[arg-type]
    return {"kurtosis_before": before, "kurtosis": kurtosis(model.float())}


def _make_heavy(model: Any, folder: Path) -> dict[str, float]:
    """Plant, then distil on the train side; figures on the tune side say how near the result is to pico."""
    import copy

    import torch

    from a1q.data import token_sequences
    from a1q.distill.evaluate import evaluate_model
    from benchmarks.quality.loop import distill

    options: Any = dict(HEAVY)
    steps, rates = options.pop("steps"), (options.pop("lr"), options.pop("embedding_lr"))
    teacher = copy.deepcopy(model)
    masks = plant_outliers(model, **options)
    tune = held_out(folder, "tune")
    planted = evaluate_model(model, teacher, tune)
    for name, linear in linears(model):
        linear.weight.register_hook(lambda grad, mask=masks[name]: grad.masked_fill(mask, 0.0))
    inside = [item for name, item in model.named_parameters() if ".layers." in name]
    outside = [item for name, item in model.named_parameters() if ".layers." not in name]
    rows = token_sequences(TEXT, folder, "train", LENGTH, steps * BATCH, options["seed"]).astype("int64")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options["seed"]))
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    groups = [{"params": inside, "lr": rates[0]}, {"params": outside, "lr": rates[1]}]
    run = distill(model, teacher, torch.from_numpy(rows)[order], groups, steps, BATCH, seed=options["seed"])
    torch.set_num_threads(threads)
    found = evaluate_model(model, teacher, tune)
    return {
        "kurtosis_before": kurtosis(teacher),
        "kurtosis": kurtosis(model),
        "kl_planted": planted["kl"],
        "kl_to_pico": found["kl"],
        "ppl": found["ppl"],
        "ppl_of_pico": found["teacher_ppl"],
        "seconds": run["seconds"],
    }


MADE: dict[str, tuple[Callable[[Any, Path], dict[str, float]], dict[str, Any]]] = {
    "pico-diag": (_make_diag, DIAG),
    "pico-heavy": (_make_heavy, HEAVY),
}
TEACHERS = ("pico", *MADE)


def _log_uniform(count: int, low: float, high: float, random: Any) -> Tensor:
    """float64 [count]"""
    import torch

    place = torch.rand(count, generator=random, dtype=torch.float64)
    return torch.exp(math.log(low) + place * (math.log(high) - math.log(low)))


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
