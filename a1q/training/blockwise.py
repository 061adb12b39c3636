"""Fit quantized modules decoder layer by decoder layer, each with the inputs that the quantized layers before it give.

Calibration measured what the dense model's linears see. A quantized model's later layers see something else; fitted in
order, on the same text, they make up for part of the error before them (as GPTQ implementations do, Frantar et al.,
2022). Memory holds the states between two layers twice, of the model as it was and as it becomes, and what one layer
needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from a1q.engine.stage import StageContext
from a1q.quant.planning import BATCH

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.fitter import Fitter
    from a1q.quant.importance import Inputs
    from a1q.quant.statistics import Statistics
    from a1q.training.reconstruction import ReconstructConfig


class Options(Protocol):
    """What of a stage's config is read here."""

    @property
    def sequential(self) -> bool:
        """Whether layers are fitted in order."""

    @property
    def reconstruct(self) -> ReconstructConfig | None:
        """How every layer that holds fitted modules is trained afterwards, against its output before; or None."""


def fit_in_order(
    ctx: StageContext,
    model: Any,
    names: Sequence[str],
    fitter: Fitter,
    statistics: Statistics | None,
    config: Options,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Fit modules `names` of `model`, in model order; each by itself if not `sequential`, or without `statistics`.

    Embeddings come first and the head last, both with the statistics as they are. A layer that is done is written to
    `ctx.scratch`, and the same command goes on behind it.

    Args:
        identity: what must be equal for a killed run's layers to be taken.

    Returns:
        `reconstruction`: the mean relative loss of layers before and after training, where they trained.

    Raises:
        StageError: naming the module that can't be fitted.
        MismatchError: if a killed run's layers come from another machine.
    """
    if statistics is None or not config.sequential:
        for step, name in enumerate(names, 1):
            fitter.fit(name, statistics.inputs(name) if statistics else None)
            ctx.progress(step, len(names))
        return {}
    return _Blockwise(ctx, model, names, fitter, statistics, config.reconstruct, identity).run()


class _Blockwise:
    def __init__(
        self,
        ctx: StageContext,
        model: Any,
        names: Sequence[str],
        fitter: Fitter,
        statistics: Statistics,
        options: ReconstructConfig | None,
        identity: Mapping[str, Any],
    ):
        from a1q.models.blocks import BlockStream
        from a1q.training.device import machine_identity

        self.ctx, self.model, self.fitter, self.statistics, self.options = ctx, model, fitter, statistics, options
        self.identity = {**machine_identity(ctx.runtime), **identity}
        before = BlockStream(model, statistics.tokens, BATCH, statistics.borders)
        layers = [[name for name in names if name.startswith(f"{layer}.")] for layer in before.names]
        self.per_step = options.steps if options else 0
        self.total = len(names) + self.per_step * sum(bool(layer) for layer in layers)
        self.done = 0
        inside = {name for layer in layers for name in layer}
        first = [name for name in names if name not in inside and name != _head_of(model)]
        for name in first:
            self._fit(name, statistics.inputs(name))
        self.layers, self.last = layers, [name for name in names if name not in inside and name not in first]
        self.stream = BlockStream(model, statistics.tokens, BATCH, statistics.borders) if first else before
        self.reference = list(before.hidden) if options else []  # only training needs what the model gave before

    def run(self) -> dict[str, Any]:
        import torch

        losses = []
        pending = max((index for index, layer in enumerate(self.layers) if layer), default=-1)
        for index, names in enumerate(self.layers[: pending + 1]):
            with torch.no_grad():
                targets = [self.stream.run(index, hidden, number).cpu() for number, hidden in enumerate(self.reference)]
            if names:
                losses.append(self._layer(index, names, targets))
            if index < pending:
                self.stream.advance(index)
            self.reference = targets
        for name in self.last:
            self._fit(name, self.statistics.inputs(name))
        trained = [loss for loss in losses if loss]
        if not trained:
            return {}
        return {"reconstruction": {key: sum(loss[key] for loss in trained) / len(trained) for key in trained[0]}}

    def _layer(self, index: int, names: Sequence[str], targets: list[Tensor]) -> dict[str, float]:
        """Fit and train one layer, or take it from a run that was killed."""
        from a1q.quant.calibration import measure_layer
        from a1q.training.checkpoint import load_checkpoint, save_checkpoint

        folder = self.ctx.scratch / f"layer-{index:05d}"
        found = load_checkpoint(folder, self.identity, self.ctx.log)
        if found is not None:
            self._restore(index, names, found.tensors)
            self.done += len(names) + self.per_step
            self.ctx.log(f"{self.stream.names[index]} is there from the run before")
            return dict(found.values)
        inputs = measure_layer(self.model, self.stream, index)
        for name in names:
            self._fit(name, inputs.get(name))
        losses: dict[str, float] = {}
        if self.options is not None:
            losses = self._train(index, targets, self.options)
        save_checkpoint(folder, index, self._tensors(index), losses, self.identity)
        return losses

    def _fit(self, name: str, inputs: Inputs | None) -> None:
        self.fitter.fit(name, inputs)
        self.done += 1
        self.ctx.progress(self.done, self.total)

    def _train(self, index: int, targets: list[Tensor], options: ReconstructConfig) -> dict[str, float]:
        from a1q.training.reconstruction import reconstruct

        before = self.done

        def emit(kind: str, values: Mapping[str, Any]) -> None:
            if kind == "progress":
                values = {**values, "step": before + values["step"], "total": self.total}
            self.ctx.emit(kind, values)

        name = self.stream.names[index]
        inner = replace(self.ctx, emit=emit)
        metric = self.statistics.sensitivity(name)
        losses = reconstruct(inner, self.model, self.stream, index, targets, metric, options)
        self.ctx.log(f"{name}: relative error {losses['first']:.4f} -> {losses['last']:.4f}")
        self.done += options.steps
        return losses

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """All of a layer that fitting and training may change."""
        return {name: tensor.detach() for name, tensor in self._block(index).state_dict().items()}

    def _restore(self, index: int, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        from a1q.quant.module import quantized_modules

        prefix = f"{self.stream.names[index]}."
        for name in names:
            own = f"{name.removeprefix(prefix)}."
            parts = {key.removeprefix(own): tensor for key, tensor in tensors.items() if key.startswith(own)}
            parts.pop("bias", None)
            self.fitter.restore(name, parts, parts.pop("latent", None))
        self._block(index).load_state_dict(dict(tensors))
        if self.options is not None:
            for _, module in quantized_modules(self._block(index)):
                module.straight_through_fp16 = True  # as training left it

    def _block(self, index: int) -> Any:
        return self.model.get_submodule(self.stream.names[index])


def _head_of(model: Any) -> str | None:
    """The name of an untied head."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)
