"""`prepare`: a dense model becomes another of the same function, with weights that quantize better."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.artifact import Artifact
from a1q.engine.matching import summarize
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.errors import StageError
from a1q.models.preparations.families import FAMILIES
from a1q.models.view import DENSE, PREPARED, ModelView, ModuleView
from a1q.quant.planning import check_statistics

if TYPE_CHECKING:
    from a1q.models.preparations.preparation import Preparation

SEQUENCES, LENGTH = 2, 128
"""What the proof reads."""
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class RotateResidualConfig:
    """Options of `rotate_residual`."""

    untie: bool


@dataclass(frozen=True)
class ScaleConfig:
    """Options of `scale`."""

    statistics: str
    alpha: float


@dataclass(frozen=True)
class PrepareConfig:
    """See schemas/stages/prepare.json."""

    data: str
    rotate_residual: RotateResidualConfig | None
    rotate_heads: bool
    scale: ScaleConfig | None


class PrepareStage(Stage):
    """Fold what cancels into the weights, and prove that it cancels."""

    Config = PrepareConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Refuse models whose function could not be kept; predict the untied head."""
        config, view = ctx.config, ctx.views["model"]
        if view is None:
            return Outcome()
        _check(ctx, config, view)
        if config.rotate_residual and config.rotate_residual.untie and view.tied:
            view = _untied(view)
        view = dataclasses.replace(
            view, config={**view.config, PREPARED: [*view.config.get(PREPARED, ()), *_techniques(config)]}
        )
        largest = max((module.shape[0] * module.shape[1] for module in view.modules.values()), default=0)
        logits = 8 * SEQUENCES * LENGTH * view.config.get("vocab_size", 0)
        return Outcome(
            view=view,
            disk_bytes=4 * view.parameters,
            memory_bytes=4 * view.parameters + 16 * largest + 4 * logits,
            notes=(", ".join(_techniques(config)),),
        )

    def run(self, ctx: StageContext) -> None:
        """Prepare in float64, compare with the model as it came, write it.

        Metrics: the largest relative difference of a position's logits, and of its vectors in the residual stream.

        Raises:
            StageError: if the prepared model computes something else, or the statistics are of another model.
        """
        import torch

        from a1q.data import token_sequences
        from a1q.models.checkpoint import load_model, save_model
        from a1q.models.preparations.equivalence import HEAD, compare, require_equal, trace
        from a1q.models.preparations.preparation import prepare_model
        from a1q.training.device import prepare_torch

        source = ctx.inputs["model"]
        assert source is not None
        prepare_torch(ctx.runtime, ctx.seed)
        entry: Any = ctx.data[ctx.config.data]
        length = entry.config["seq_len"]
        rows = token_sequences(entry.config, source.path, "train", length, SEQUENCES, ctx.seed)
        tokens = torch.from_numpy(rows[:, :LENGTH].astype("int64"))
        model = load_model(source.path)  # on the CPU: not every accelerator has float64
        preparations = _preparations(ctx, model, source)
        layers = model.config.num_hidden_layers
        done, total = iter(range(1, 1_000_000)), 2 * (layers + 2) + layers

        def tick() -> None:
            ctx.progress(next(done), total)

        before = trace(model, tokens, tick)
        prepare_model(model, preparations, tick)
        differences = compare(before, trace(model, tokens, tick), preparations)
        require_equal(differences)
        setattr(model.config, PREPARED, [*getattr(model.config, PREPARED, ()), *_techniques(ctx.config)])
        save_model(model, ctx.out, tokenizer_from=source.path)
        ctx.metrics["difference"] = differences.pop(HEAD)
        ctx.metrics["difference_stream"] = max(differences.values())


def _techniques(config: PrepareConfig) -> list[str]:
    """Names of the techniques asked for, in the order in which they are applied."""
    return [name for name in ("rotate_residual", "rotate_heads", "scale") if getattr(config, name)]


def _check(ctx: PlanContext, config: PrepareConfig, view: ModelView) -> None:
    """Record why these techniques can't keep the function of this model."""
    if not _techniques(config):
        ctx.recipe_problem("", "there is nothing to do", "choose `rotate_residual`, `rotate_heads` or `scale`")
    taken = [name for name, module in view.modules.items() if module.state != DENSE]
    if taken:
        ctx.recipe_problem(
            "",
            f"{len(taken)} modules are already {view.modules[taken[0]].state}: {', '.join(summarize(taken))}",
            "`prepare` takes a dense model: it comes before `quantize`",
        )
    if config.scale and (config.rotate_residual or config.rotate_heads):
        ctx.recipe_problem(
            "scale",
            "the statistics are those of the model before it is rotated",
            "`prepare` with the rotations first, then `calibrate`, then `prepare` with `scale`",
        )
    elif config.scale:
        check_statistics(ctx, "scale.statistics")
    model_type = view.config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        ctx.mismatch("", f"`prepare` knows no model type {model_type!r}", f"it knows {', '.join(sorted(FAMILIES))}")
    elif config.rotate_residual and family.post_norms:
        ctx.mismatch(
            "rotate_residual",
            f"{model_type} normalises what attention and MLP add to the residual stream, with gains per channel that "
            "no rotation passes",
            "`rotate_heads` and `scale` keep its function",
        )
    elif config.rotate_residual and view.tied and not config.rotate_residual.untie:
        ctx.mismatch(
            "rotate_residual",
            "the head is tied to the embedding, and the final norm's gains have to move into the head alone",
            f"`rotate_residual: {{untie: true}}` gives the head a weight of its own, {_size(view):,} more parameters",
        )


def _size(view: ModelView) -> int:
    rows, columns = view.modules[EMBEDDING].shape
    return rows * columns


def _untied(view: ModelView) -> ModelView:
    """The same model with a head of its own."""
    head = ModuleView(HEAD, view.modules[EMBEDDING].shape)
    return dataclasses.replace(
        view,
        modules={HEAD: head, **view.modules},
        parameters=view.parameters + _size(view),
        config={**view.config, "tie_word_embeddings": False},
    )


def _preparations(ctx: StageContext, model: Any, source: Artifact) -> list[Preparation]:
    """What `_techniques` names."""
    from a1q.models.preparations.rotate_heads import RotateHeads
    from a1q.models.preparations.rotate_residual import RotateResidual
    from a1q.models.preparations.scale import Scale, measured

    config: PrepareConfig = ctx.config
    found: list[Preparation] = []
    if config.rotate_residual:
        found.append(RotateResidual(model.config.hidden_size, ctx.seed))
    if config.rotate_heads:
        found.append(RotateHeads(ctx.seed))
    if config.scale:
        from a1q.quant.statistics import read_statistics

        statistics = ctx.inputs["statistics"]
        assert statistics is not None
        if statistics.meta.get("model") != source.digest:
            raise StageError(
                f"the statistics of {config.scale.statistics!r} were measured on another model than the one to scale: "
                "`calibrate` this one"
            )
        measurement = read_statistics(statistics, measured(model.config.num_hidden_layers))
        assert measurement is not None
        found.append(Scale(measurement.square, config.scale.alpha))
    return found
