"""Whether `a1q import` says what the other programs compute: their classes write checkpoints, logits are compared.

    git clone https://github.com/Anemll/qwen3_apple_style_2bit_qat_lora
    python -m benchmarks.importing qwen3_apple_style_2bit_qat_lora

Their code is executed from that clone, on a small random model: modules are made by their functions, moved away from
where they start (every scale by 30 %, say), saved by torch.save, and imported. Figures: the largest difference of a
logit over the standard deviation of all, of 40 tokens; and the entries that V1 floors.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, save

SCALES = ("scale_A", "scale_B", "rank_magnitude")
WITHIN = 2e-5
"""What float32 makes of equal weights."""


def main(clone: Path) -> None:
    """Print and save the table; exit code 1 if a checkpoint without floored entries computes something else."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    package = types.ModuleType("qat_lora")
    package.__path__ = [str(clone / "qat_lora")]  # their __init__ would import what training needs
    sys.modules["qat_lora"] = package
    rows = []
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        from tests.tiny import tiny_folder

        base = tiny_folder(Path(scratch) / "base")
        for number, (name, model, config, indices) in enumerate(cases()):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            torch.save(model.state_dict(), folder / "model_state_dict.pt")
            (folder / "config.json").write_text(json.dumps(config))
            if indices:
                torch.save(indices, folder / "indices.pt")
            difference, floored = compare(model.eval(), folder, base)
            rows.append({"checkpoint": name, "difference": difference, "floored": floored})
    table = [[row["checkpoint"], f"{row['difference']:.1e}", row["floored"]] for row in rows]
    print_table("Imported and original logits", ["checkpoint", "difference", "floored entries"], table)
    save("importing", rows)
    if any(row["difference"] > WITHIN and not row["floored"] for row in rows):
        sys.exit(1)


def compare(model: Any, folder: Path, base: Path) -> tuple[float, int]:
    """(largest difference of a logit in standard deviations, floored entries)."""
    import torch

    from a1q.importing.checkpoint import read_checkpoint
    from a1q.importing.model import import_model
    from a1q.importing.settings import read_settings

    tokens = torch.arange(40)[None] * 7 % 320
    expected = model(tokens).logits.float()
    checkpoint = read_checkpoint(folder)
    imported, report = import_model(checkpoint, read_settings(checkpoint), base)
    far = (imported(tokens).logits - expected).abs().max() / expected.std()
    return float(far), sum(report.floored.values())


def cases() -> Iterator[tuple[str, Any, dict[str, Any], Any]]:
    """(name, a model of theirs, its config, indices by module or None)."""
    one = importlib.import_module("qat_lora.ane_qat_linear")
    two = importlib.import_module("qat_lora.ane_qat_linear_v2")
    sizes = {"lut_size": 4, "group_size": 32, "scale_rank": 6}
    sizes |= {"attn_lut_size": 16, "attn_group_size": 32, "attn_scale_rank": 3, "quantize_attn": True}

    yield "V1 as it starts", v1(one), sizes, None
    yield "V1, trained", moved(v1(one), 0.05, "scale_A", "scale_B", ".weight"), sizes, None
    model = moved(v1(one), 0.05, "scale_A", "scale_B")
    yield "V1 with indices.pt", model, sizes, one.compute_all_indices(model)
    yield "V1, a table with a zero", v1(one, lut_include_zero=True), {}, None
    yield "V1, a trained table", moved(v1(one, learnable_lut=True), 0.05, ".lut"), {}, None
    for way in ("lut", "baked"):
        model = moved(v1(one), 0.05, "scale_A", "scale_B")
        one.snap_all_weights(model, store_lut_values=way == "lut")
        indices = one.compute_all_indices(model) if way == "lut" else None
        yield f"V1, snapped ({way})", model, {"snapped": True, "snapped_mode": way}, indices
    yield "V1 with scales below the floor", moved(v1(one), 0.6, "scale_A", "scale_B"), sizes, None

    yield "V2 as it starts", v2(two), {"version": "v2", "lut_bits": 2, "attn_lut_bits": 4}, None
    yield (
        "V2, scales trained",
        moved(v2(two), 0.3, *SCALES),
        {"version": "v2", "scale_rank": 6, "attn_scale_rank": 3},
        None,
    )
    yield "V2, nothing frozen", moved(v2(two, freeze=False), 0.1, *SCALES), {}, None
    for method, activation in (("abs", "softplus"), ("softplus", "abs")):
        said = {"force_positive_scales": True, "positive_scale_method": method, "magnitude_activation": activation}
        yield f"V2, positive by {method}", moved(v2(two, **said), 0.3, *SCALES), said, None
    for recompute in (False, True):
        model = moved(v2(two), 0.3, *SCALES)
        two.snap_model_for_ane_v2(model, recompute_indices=recompute, verbose=False)
        yield f"V2, snapped to fp16{', indices anew' * recompute}", model.float(), {}, None
    model = moved(v2(two), 0.3, *SCALES)
    two.enable_recovery_lora_all(model, r=4, verbose=False)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.normal_(0, 0.05)
    yield "V2 with adapters", model, {"lora_r": 4, "lora_alpha": 4}, None
    model = moved(v2(two, rank_lut_size=64), 0.3, *SCALES)
    two.init_rank_lut_all(model, verbose=False)
    yield "V2, factors as palettes", model, {}, None
    model = moved(v2(two, entries=16), 0.1, *SCALES)
    two.enable_lut_training_all(model, verbose=False)
    moved(model, 0.1, "_lut_raw_deltas")
    for module in model.modules():
        if isinstance(module, two.AnemllQATLinearV2):
            module.lut.copy_(two.repair_lut_duplicates_symmetric(module.get_lut(), module._lut_max_abs))
    yield "V2, a trained table", model, {}, None
    for bits in (2, 4):
        yield f"Apple-style, {bits} bits", moved(apple(bits), 0.05, "_f_param", ".weight"), {"quant_bits": bits}, None
    yield "Apple-style, head too", apple(4, None), {}, None


def v1(module: Any, **options: Any) -> Any:
    """The small model with their V1 modules: MLPs 2 bits and rank 6, attention 4 and 3."""
    from tests.tiny import tiny_model

    model = tiny_model()
    mlp, attention = (
        module.AnemllQuantConfig(lut_size=entries, group_size=32, scale_rank=rank, **options)
        for entries, rank in ((4, 6), (16, 3))
    )
    module.replace_linear_with_anemll(model, mlp, attention, verbose=False)
    return model


def v2(module: Any, entries: int = 4, freeze: bool = True, **options: Any) -> Any:
    """The same with V2 modules, as their scripts configure them."""
    from tests.tiny import tiny_model

    model = tiny_model()
    options = {"force_positive_scales": False, "magnitude_activation": "identity", **options}
    mlp, attention = (
        module.AnemllQuantConfigV2(lut_size=size, group_size=32, scale_rank=rank, **options)
        for size, rank in ((entries, 6), (16, 3))
    )
    module.replace_linear_with_anemll_v2(model, mlp, attention, quantize_attn=True, verbose=False)
    if freeze:
        module.freeze_Q_all(model)
    return model


def apple(bits: int, exclude: str | None = r"(^lm_head$)") -> Any:
    """The same in the form before both."""
    from tests.tiny import tiny_model

    utils = importlib.import_module("qat_lora.model_utils")
    config = importlib.import_module("qat_lora.quantizer").QATQuantConfig(n_bits=bits)
    model = tiny_model()
    utils.replace_linear_with_qat(model, config, exclude_regex=exclude, verbose=False)
    utils.init_all_f(model, config, verbose=False)
    return model


def moved(model: Any, amount: float, *endings: str) -> Any:
    """`model` with the parameters whose names end so multiplied by 1 + amount · noise."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(endings):
            parameter.mul_(1 + amount * torch.randn(parameter.shape, generator=generator))
    return model


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.importing CLONE")
    main(Path(sys.argv[1]))
