"""`packed`: the a1q model artifact itself, as a folder that further recipes start from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

from a1q.engine.artifact import BESIDE, Artifact
from a1q.engine.exporter import Exporter
from a1q.engine.stage import StageContext
from a1q.errors import StageError


@dataclass(frozen=True)
class PackedConfig:
    """See schemas/exporters/packed.json."""

    latent: str


class PackedExporter(Exporter):
    """Copy the artifact, with or without its latent weights."""

    Config = PackedConfig

    def refusals(self, view: Any, config: PackedConfig) -> list[str]:
        """Every state and scheme is welcome."""
        return []

    def estimate(self, view: Any, config: PackedConfig) -> int:
        """Quantized modules at their bits, the rest at the four bytes an unsnapped model may have."""
        from a1q.quant.bits import module_bits

        quantized = [module for module in view.modules.values() if module.scheme is not None]
        numbers = sum(module.shape[0] * module.shape[1] for module in quantized)
        latent = 4 * numbers if config.latent == "keep" else 0
        return sum(module_bits(module) for module in quantized) // 8 + 4 * (view.parameters - numbers) + latent

    def export(self, model: Artifact, config: PackedConfig, ctx: StageContext) -> None:
        """Write the folder."""
        if config.latent == "keep":
            for source in sorted(model.path.rglob("*")):
                if source.is_file() and source.relative_to(model.path).as_posix() not in BESIDE:
                    target = ctx.out / source.relative_to(model.path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
        else:
            from a1q.models.checkpoint import load_model, save_model
            from a1q.quant.linear import quantized_modules

            loaded = load_model(model.path)
            for _, module in quantized_modules(loaded):
                module.drop_latent()
            save_model(loaded, ctx.out, tokenizer_from=model.path)
        total = sum(path.stat().st_size for path in ctx.out.rglob("*") if path.is_file())
        if not total:
            raise StageError(f"nothing to export: {model.path} holds no files")
        ctx.metrics["bytes"] = total
