"""Stages, schemes and a model for tests of the recipe language: no torch, no training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import save_file

from a1q.engine.registry import Registry
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext

HIDDEN, MLP, HEAD = 64, 96, 32


def header_model(folder: Path, layers: int = 2) -> Path:
    """A Hugging Face folder of a small Qwen3 with tied embeddings, all weights zero."""
    from tests.tiny import write_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 320,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    shapes = {"q": (2 * HEAD, HIDDEN), "k": (HEAD, HIDDEN), "v": (HEAD, HIDDEN), "o": (HIDDEN, 2 * HEAD)}
    tensors: dict[str, Any] = {"model.embed_tokens.weight": (320, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        base = f"model.layers.{layer}"
        tensors |= {f"{base}.self_attn.{name}_proj.weight": shape for name, shape in shapes.items()}
        tensors |= {f"{base}.self_attn.{name}_norm.weight": (HEAD,) for name in "qk"}
        tensors |= {f"{base}.mlp.{name}_proj.weight": (MLP, HIDDEN) for name in ("gate", "up")}
        tensors[f"{base}.mlp.down_proj.weight"] = (HIDDEN, MLP)
        tensors |= {f"{base}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder)
    return folder


@dataclass(frozen=True)
class GrowConfig:
    """Options of the stage `grow`."""

    steps: int
    rate: float
    teacher: str | None
    data: str | None
    verbose: bool
    mode: str
    inner: Any
    groups: tuple[str, ...]


class Grow(Stage):
    """Takes a model and perhaps a teacher; complains when `steps` is 13 (the recipe) or 14 (the machine)."""

    name = "grow"
    version = 3
    Config = GrowConfig
    schema: ClassVar = {
        "description": "Grow a model. It is a fake.",
        "type": "object",
        "additionalProperties": False,
        "required": ["steps"],
        "properties": {
            "steps": {"description": "Steps.", "type": "integer", "minimum": 1},
            "rate": {"description": "Rate.", "type": "number", "exclusiveMinimum": 0, "default": 1},
            "teacher": {"description": "A teach stage.", "type": ["string", "null"], "default": None},
            "data": {"description": "A data entry.", "type": ["string", "null"], "default": None},
            "verbose": {"description": "Talk.", "type": "boolean", "default": False},
            "mode": {"description": "How.", "enum": ["fast", "slow"], "default": "fast"},
            "groups": {"description": "Which.", "type": "array", "items": {"type": "string"}, "default": []},
            "inner": {
                "description": "Nested.",
                "type": "object",
                "additionalProperties": False,
                "default": {},
                "properties": {"depth": {"description": "Depth.", "type": "integer", "default": 2}},
            },
        },
        "x-a1q": {
            "inputs": {
                "model": {"kind": "model", "at": "from"},
                "teacher": {"kind": "teacher", "at": "teacher", "optional": True, "default": "nearest"},
            },
            "output": "model",
            "data": ["data"],
            "smoke": {"steps": 1, "inner.depth": 1},
        },
    }

    def plan(self, ctx: PlanContext) -> Outcome:
        from a1q.engine.matching import resolve_rules

        if ctx.config.steps == 13:
            ctx.recipe_problem("steps", "13 steps bring bad luck", "take 12")
        if ctx.config.steps == 14:
            ctx.mismatch("steps", "14 steps do not fit this machine")
        resolve_rules(ctx, ctx.config.groups, "groups", ctx.views["model"])
        return Outcome(view=ctx.views["model"], disk_bytes=100, memory_bytes=ctx.config.steps, notes=("a note",))

    def run(self, ctx: StageContext) -> None:
        raise AssertionError("never run here")


@dataclass(frozen=True)
class TeachConfig:
    """Options of the stage `teach`."""

    model: Any


class Teach(Stage):
    """Makes a teacher of the recipe's model, or of another one."""

    name = "teach"
    Config = TeachConfig
    schema: ClassVar = {
        "description": "Teach.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "model": {
                "description": "Another model.",
                "type": ["object", "null"],
                "additionalProperties": False,
                "required": ["source"],
                "properties": {"source": {"description": "Where.", "type": "string"}},
                "default": None,
            }
        },
        "x-a1q": {
            "inputs": {
                "model": {"kind": "model", "at": "from", "default": "source"},
                "larger": {"kind": "model", "at": "model", "optional": True},
            },
            "output": "teacher",
        },
    }

    def plan(self, ctx: PlanContext) -> Outcome:
        return Outcome(view={"larger": ctx.views["larger"] is not None})

    def run(self, ctx: StageContext) -> None:
        raise AssertionError("never run here")


def fake_registry() -> Registry:
    """The built-ins and the fakes above."""
    registry = Registry()
    registry.add("stages", "grow", Grow, "digest-of-grow")
    registry.add("stages", "teach", Teach, "digest-of-teach")
    return registry
