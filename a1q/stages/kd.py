"""`kd`: ask a teacher about fixed sequences and keep its answers, the cache that later stages distil from."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.data import conversational
from a1q.distill.cache import DESCRIPTION, FORMAT, sequence_bytes, write_description
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from a1q.data import Sequences


@dataclass(frozen=True)
class CacheConfig:
    """What is kept of the teacher's answers."""

    top_k: int
    random_negatives: int
    sequences: int
    tune_sequences: int
    shard_sequences: int
    temperatures: tuple[float, ...]


@dataclass(frozen=True)
class KdConfig:
    """Options of `kd`."""

    data: str
    model: Any
    cache: CacheConfig
    batch: int


class KdStage(Stage):
    """Write a teacher cache; `a1q.distill.cache` says what is in it."""

    version = 4
    parallel = True
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
        entry = ctx.data[ctx.config.data].config
        length, chats = entry["seq_len"], conversational(entry)
        sequences = cache.sequences + cache.tune_sequences
        size = sequences * sequence_bytes(
            vocabulary, length, cache.top_k, cache.random_negatives, len(cache.temperatures), bool(chats)
        )
        return Outcome(
            view={
                "vocabulary": vocabulary,
                "seq_len": length,
                "top_k": cache.top_k,
                "random_negatives": cache.random_negatives,
                "sequences": cache.sequences,
                "tune_sequences": cache.tune_sequences,
                "temperatures": list(cache.temperatures),
                "chats": chats,
                "parameters": teacher.parameters,
                "config": teacher.config,
            },
            disk_bytes=size,
            memory_bytes=4 * teacher.parameters + 4 * ctx.config.batch * length * vocabulary,
            notes=(
                f"{cache.sequences} + {cache.tune_sequences} sequences of {length} tokens, "
                f"{size / (sequences * length):.0f} bytes per token, {size / 1e6:,.0f} MB",
            ),
        )

    def run(self, ctx: StageContext) -> None:
        """Ask, shard by shard; a killed run goes on at its first missing shard.

        The description stands in the scratch folder before the first shard does: `TeacherCache(..., partial=True)`.
        """
        import numpy as np

        from a1q.data import Sequences, read_sequences
        from a1q.distill.teacher import publish_shards, shard_names, write_shards
        from a1q.distill.teacher_model import note_teacher
        from a1q.distill.tokenizers import chat_template_digest, require_same_tokens, tokenizer_digest
        from a1q.models.checkpoint import load_model
        from a1q.training.device import autocast, prepare_torch

        world = ctx.world
        device = prepare_torch(ctx.runtime, ctx.seed, world)
        config, cache, entry = ctx.config, ctx.config.cache, ctx.data[ctx.config.data]
        student, larger = ctx.inputs["model"], ctx.inputs.get("teacher_model")
        assert student is not None
        teacher = larger or student
        if larger is not None:
            require_same_tokens(student.path, larger.path, f"stages.{ctx.id}.model")
        length = entry.config["seq_len"]

        def read(part: str, count: int) -> Sequences:
            return read_sequences(entry.config, student.path, part, length, count, ctx.seed, marks=True)

        found = {"train": shuffled(read("train", cache.sequences), ctx.seed)}
        if cache.tune_sequences:
            found["tune"] = read("tune", cache.tune_sequences)
        else:
            found["tune"] = Sequences(np.zeros((0, length), np.int32), np.zeros((0, length), bool), False)
        parts = {part: item.tokens for part, item in found.items()}
        templated = any(item.templated for item in found.values())
        separate = any(item.separate for item in found.values())
        said = known_said(found)
        _tell_unclear(ctx, found)
        model = load_model(teacher.path, device=device)
        if world.leads:
            ctx.meta.update(teacher=note_teacher(teacher, ctx.out))
        ctx.meta.update(
            format=FORMAT,
            vocabulary=model.config.vocab_size,
            seq_len=length,
            top_k=cache.top_k,
            random_negatives=cache.random_negatives,
            shard_sequences=cache.shard_sequences,
            temperatures=list(cache.temperatures),
            parts={
                part: {"sequences": len(tokens), "shards": shard_names(part, len(tokens), cache.shard_sequences)}
                for part, tokens in parts.items()
            },
            tokenizer=tokenizer_digest(teacher.path),
            chat_template=chat_template_digest(student.path) if templated else None,
            data={"name": entry.name, "digest": entry.digest},
            said=None if said is None else {part: int(bits.sum()) for part, bits in said.items()},
            separate=separate,
            prompts={name: digest for item in found.values() for name, digest in item.prompts.items()},
            said_problem="" if said is not None else found["train"].reason,
        )
        if world.leads:
            write_description(ctx.scratch, ctx.meta)
        names = write_shards(
            model,
            parts,
            starts={part: item.starts for part, item in found.items()},
            said=said,
            separate=separate,
            folder=ctx.scratch,
            top_k=cache.top_k,
            random_negatives=cache.random_negatives,
            shard_sequences=cache.shard_sequences,
            temperatures=cache.temperatures,
            batch=config.batch,
            seed=ctx.seed,
            device=device,
            autocast=functools.partial(autocast, ctx.runtime),
            progress=lambda done, total: ctx.progress(done, total, tokens=done * length),
            log=ctx.log,
            process=world.rank,
            processes=world.size,
        )
        world.wait()
        if not world.leads:
            return
        publish_shards(ctx.scratch, names, ctx.out)
        shutil.copyfile(ctx.scratch / DESCRIPTION, ctx.out / DESCRIPTION)
        size = sum(path.stat().st_size for path in ctx.out.glob("*.safetensors"))
        tokens = sum(part.size for part in parts.values())
        ctx.metrics.update(sequences=len(parts["train"]), tokens=tokens, bytes=size, bytes_per_token=size / tokens)


def shuffled(text: Sequences, seed: int) -> Sequences:
    """The sequences in an order drawn from the seed: who reads the first shards alone reads of the whole text.

    Without it, those of a long document would follow each other.
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(text.tokens))
    said = None if text.said is None else text.said[order]
    return dataclasses.replace(text, tokens=text.tokens[order], starts=text.starts[order], said=said)


def known_said(found: Mapping[str, Sequences]) -> dict[str, np.ndarray] | None:
    """Part -> bool [n, L], what an assistant said; None where the training part doesn't know."""
    import numpy as np

    if found["train"].said is None:
        return None
    return {part: np.zeros_like(item.starts) if item.said is None else item.said for part, item in found.items()}


def _tell_unclear(ctx: StageContext, found: Mapping[str, Sequences]) -> None:
    text = found["train"]
    if text.unclear and ctx.world.leads:
        which = f"{text.unclear} conversations" if text.said is not None else "any conversation"
        left_out = "can't be told, and `targets: assistant` leaves them out"
        ctx.log(f"WARNING: what an assistant said in {which} {left_out}: {text.reason}")
