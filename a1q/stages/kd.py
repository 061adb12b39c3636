"""`kd`: ask a teacher about fixed sequences and keep its answers, the cache that later stages distil from."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from a1q.distill.cache import DESCRIPTION, FORMAT, position_bytes
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext


@dataclass(frozen=True)
class CacheConfig:
    """What is kept of the teacher's answers."""

    top_k: int
    random_negatives: int
    sequences: int
    tune_sequences: int
    shard_sequences: int


@dataclass(frozen=True)
class KdConfig:
    """Options of `kd`."""

    data: str
    model: Any
    cache: CacheConfig
    batch: int


class KdStage(Stage):
    """Write a teacher cache; `a1q.distill.cache` says what is in it."""

    Config = KdConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Check the vocabularies and tell the cache's size, which is exact."""
        cache = ctx.config.cache
        student, larger = ctx.views["model"], ctx.views.get("teacher_model")
        if student is None:
            return Outcome()
        teacher = larger or student
        vocabulary, own = teacher.config.get("vocab_size"), student.config.get("vocab_size")
        if vocabulary != own:
            message = f"the teacher's vocabulary has {vocabulary} tokens, the model's {own}"
            ctx.mismatch("model", message, "a teacher needs the student's own tokenizer")
            return Outcome()
        if cache.top_k > vocabulary:
            message = f"top_k is {cache.top_k}, and the vocabulary has {vocabulary} tokens"
            ctx.mismatch("cache.top_k", message, f"at most {vocabulary}, which keeps all")
            return Outcome()
        left = vocabulary - cache.top_k
        if cache.random_negatives > left:
            message = f"random_negatives is {cache.random_negatives}, and {left} tokens are left beside the top_k"
            ctx.mismatch("cache.random_negatives", message, f"at most {left}")
            return Outcome()
        length = ctx.data[ctx.config.data].config["seq_len"]
        sequences = cache.sequences + cache.tune_sequences
        size = sequences * length * position_bytes(vocabulary, cache.top_k, cache.random_negatives)
        return Outcome(
            view={
                "vocabulary": vocabulary,
                "seq_len": length,
                "top_k": cache.top_k,
                "random_negatives": cache.random_negatives,
                "sequences": cache.sequences,
                "tune_sequences": cache.tune_sequences,
                "parameters": teacher.parameters,
                "config": teacher.config,
            },
            disk_bytes=size,
            memory_bytes=4 * teacher.parameters + 3 * 4 * ctx.config.batch * length * vocabulary,
            notes=(
                f"{cache.sequences} + {cache.tune_sequences} sequences of {length} tokens, "
                f"{size / (sequences * length):.0f} bytes per token, {size / 1e6:,.0f} MB",
            ),
        )

    def run(self, ctx: StageContext) -> None:
        """Ask, shard by shard; a killed run goes on at its first missing shard."""
        import numpy as np

        from a1q.data import token_sequences
        from a1q.distill.teacher import publish_shards, write_shards
        from a1q.distill.teacher_model import note_teacher
        from a1q.distill.tokenizers import chat_template_digest, require_same_tokens, tokenizer_digest
        from a1q.models.checkpoint import load_model
        from a1q.training.device import autocast, prepare_torch

        device = prepare_torch(ctx.runtime, ctx.seed)
        config, cache, entry = ctx.config, ctx.config.cache, ctx.data[ctx.config.data]
        student, larger = ctx.inputs["model"], ctx.inputs.get("teacher_model")
        assert student is not None
        teacher = larger or student
        if larger is not None:
            require_same_tokens(student.path, larger.path, f"stages.{ctx.id}.model")
        length = entry.config["seq_len"]
        parts = {"tune": np.zeros((0, length), np.int32)}
        for part, count in (("train", cache.sequences), ("tune", cache.tune_sequences)):
            if count:
                parts[part] = token_sequences(entry.config, student.path, part, length, count, ctx.seed)
        model = load_model(teacher.path, device=device)
        names = write_shards(
            model,
            parts,
            folder=ctx.scratch,
            top_k=cache.top_k,
            random_negatives=cache.random_negatives,
            shard_sequences=cache.shard_sequences,
            batch=config.batch,
            seed=ctx.seed,
            device=device,
            autocast=functools.partial(autocast, ctx.runtime),
            progress=lambda done, total: ctx.progress(done, total, tokens=done * length),
            log=ctx.log,
        )
        publish_shards(ctx.scratch, names, ctx.out)
        ctx.meta.update(
            format=FORMAT,
            vocabulary=model.config.vocab_size,
            seq_len=length,
            top_k=cache.top_k,
            random_negatives=cache.random_negatives,
            shard_sequences=cache.shard_sequences,
            parts={part: {"sequences": len(parts[part]), "shards": names[part]} for part in names},
            teacher=note_teacher(teacher, ctx.out),
            tokenizer=tokenizer_digest(teacher.path),
            chat_template=chat_template_digest(teacher.path),
            data={"name": entry.name, "digest": entry.digest},
        )
        (ctx.out / DESCRIPTION).write_text(json.dumps(ctx.meta, indent=2, sort_keys=True), encoding="utf-8")
        size = sum(path.stat().st_size for path in ctx.out.glob("*.safetensors"))
        tokens = sum(part.size for part in parts.values())
        ctx.metrics.update(sequences=len(parts["train"]), tokens=tokens, bytes=size, bytes_per_token=size / tokens)
