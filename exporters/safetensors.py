"""`safetensors`: a Hugging Face folder in FP16 that plain `transformers` loads without a1q."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.artifact import Artifact
from a1q.engine.exporter import Exporter
from a1q.engine.stage import StageContext
from a1q.errors import StageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SafetensorsConfig:
    """See schemas/exporters/safetensors.json."""

    shard_size: str
    verify_tokens: int
    min_cosine: float


class SafetensorsExporter(Exporter):
    """Write every weight dense in FP16, load the folder back and compare."""

    Config = SafetensorsConfig

    def refusals(self, view: Any, config: SafetensorsConfig) -> list[str]:
        """Snapped and dense modules only: weights that still train have no final value."""
        unsnapped = [name for name, module in view.modules.items() if module.state == "quantized"]
        if not unsnapped:
            return []
        return [
            f"the safetensors exporter takes snapped or dense modules; {len(unsnapped)} are quantized but not "
            f"snapped ({', '.join(unsnapped[:3])}{', ...' if len(unsnapped) > 3 else ''}): "
            "put a `snap` stage before the export"
        ]

    def estimate(self, view: Any, config: SafetensorsConfig) -> int:
        """Two bytes a parameter."""
        return 2 * int(view.parameters)

    def export(self, model: Artifact, config: SafetensorsConfig, ctx: StageContext) -> None:
        """Write the folder; metrics: bytes, and the comparison after loading it back.

        Raises:
            StageError: if a weight does not fit FP16, or the folder loaded back computes something else.
        """
        import torch
        from huggingface_hub import save_torch_state_dict

        from a1q.models.baked import fp16_state
        from a1q.models.checkpoint import copy_companions, load_model
        from a1q.quant.module import quantized_modules

        torch.manual_seed(ctx.seed)
        loaded = load_model(model.path)
        state = fp16_state(loaded, ctx.progress)
        save_torch_state_dict(state, ctx.out, max_shard_size=config.shard_size, metadata={"format": "pt"})
        del state  # the comparison holds the model a second time
        loaded.config.dtype = torch.float16
        loaded.config.save_pretrained(ctx.out)
        copy_companions(model.path, ctx.out)
        if any(module.adapter is not None for _, module in quantized_modules(loaded)):
            from a1q.training.adapters import save_peft_adapter

            save_peft_adapter(loaded, ctx.out / "adapter")
        ctx.metrics["bytes"] = sum(path.stat().st_size for path in ctx.out.rglob("*") if path.is_file())
        if config.verify_tokens:
            self._verify(loaded, config, ctx)

    def _verify(self, loaded: nn.Module, config: SafetensorsConfig, ctx: StageContext) -> None:
        """Compare the folder, loaded by plain transformers, with the model it came from."""
        import torch
        from transformers import AutoModelForCausalLM

        from a1q.quant.module import quantized_modules

        written: Any = AutoModelForCausalLM.from_pretrained(ctx.out, dtype=torch.float32, use_safetensors=True)
        generator = torch.Generator().manual_seed(ctx.seed)
        tokens = torch.randint(written.config.vocab_size, (1, config.verify_tokens), generator=generator)
        for _, module in quantized_modules(loaded):
            module.drop_adapter()  # the folder's weights are without it; it stands beside them in adapter/
        with torch.inference_mode():
            expected = loaded.eval()(tokens).logits[0].double()
            found = written.eval()(tokens).logits[0].double()
        cosine = torch.nn.functional.cosine_similarity(expected, found, dim=-1).min().item()
        ctx.metrics["cosine"] = cosine
        ctx.metrics["top1"] = (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
        if not cosine >= config.min_cosine:
            raise StageError(
                f"the exported folder, loaded back by transformers, computes other logits: "
                f"cosine {cosine:.6f}, wanted at least {config.min_cosine}"
            )
