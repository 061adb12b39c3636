"""`packed`: the a1q model artifact itself, as a folder that further recipes start from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
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
        """The size of the weights on disk."""
        from a1q.quant.bits import disk_bytes

        if config.latent == "drop":
            view = view.replace({name: replace(module, latent=False) for name, module in view.modules.items()})
        return disk_bytes(view)

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
            from a1q.quant.module import quantized_modules

            loaded = load_model(model.path)
            modules = dict(quantized_modules(loaded))
            for step, module in enumerate(modules.values(), 1):
                module.drop_latent()
                ctx.progress(step, len(modules))
            save_model(loaded, ctx.out, tokenizer_from=model.path)
        total = sum(path.stat().st_size for path in ctx.out.rglob("*") if path.is_file())
        if not total:
            raise StageError(f"nothing to export: {model.path} holds no files")
        ctx.metrics["bytes"] = total
