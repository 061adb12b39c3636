"""Training layer by layer: one decoder layer's modules train at a time, in order, all others stand still.

Each turn is one run of the training loop, with a fresh optimizer and the next part of the data. A layer that starts
much worse than the one before it ended sends training back: the layer before has another turn.

Layers below the one that trains have nothing that requires a gradient, so autograd records nothing there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from a1q.engine.files import remove_tree
from a1q.engine.stage import StageContext
from a1q.training.checkpoint import load_checkpoint, save_checkpoint
from a1q.training.device import machine_identity
from a1q.training.distillation import Distillation
from a1q.training.layers import Turn
from a1q.training.loop import run_loop, step_seed
from a1q.training.parameters import parameter_groups, set_aside_latents
from a1q.training.spec import LoopResult, LoopSpec

if TYPE_CHECKING:
    from torch import Tensor

RETURNS = 2
"""How often one layer may send training back, at most."""


def train_layers(
    ctx: StageContext,
    turns: Sequence[Turn],
    objective: Distillation,
    aside: dict[str, Tensor],
    keep_step: Callable[[int], None],
    identity: Mapping[str, Any],
) -> LoopResult:
    """Train the layers of `turns` in place, or go on where a killed run stood; finished turns are not trained again.

    `ctx.metrics` gets `backtracks`, and for every layer what its last turn did.

    Several processes train each turn with DDP: what trains at a time is small, and nothing is split.

    Args:
        turns: at least one; the modules of all of them hold no latent, and nor does any other.
        aside: latents of quantized modules [out, in] by name. A module takes its own for its turn, and puts it back.
        keep_step: as `run_loop` takes it; its steps, as those of `keep_every`, are counted over all turns.
        identity: as `run_loop` takes it.

    Returns:
        The figures of all turns together; steps are counted over all of them, the held-out loss after all is the last
        turn's.

    Raises:
        PeerLost, StageError, MismatchError, Interrupted: as `run_loop`.
    """
    return _Layerwise(ctx, turns, objective, aside, keep_step, identity).run()


class _Layerwise:
    def __init__(
        self,
        ctx: StageContext,
        turns: Sequence[Turn],
        objective: Distillation,
        aside: dict[str, Tensor],
        keep_step: Callable[[int], None],
        identity: Mapping[str, Any],
    ):
        self.ctx, self.turns, self.objective, self.aside = ctx, turns, objective, aside
        aside.update({name: latent.cpu() for name, latent in aside.items()})  # a device's memory is for what trains
        self.keep_step, self.identity = keep_step, identity
        whole = {**machine_identity(ctx.runtime), **identity, "processes": ctx.world.size}
        self.record_identity = ctx.world.shared(whole)  # machines may differ: the leading one's name counts
        objective.share(ctx.world, ctx.smoke)
        self.results: list[LoopResult] = []
        """Of all turns so far, those of layers that had several included."""
        self.last: dict[int, LoopResult] = {}
        """Of the last turn of each place in `turns`."""
        self.returns: Counter[int] = Counter()
        """How often the layer at a place has sent training back."""
        self.restored = False
        self.resumed_from: int | None = None
        self.seconds_per_step: float | None = None

    def run(self) -> LoopResult:
        place = 0
        while place < len(self.turns):
            found = load_checkpoint(self._record(), self.record_identity, self.ctx.log)
            if found is not None:
                trained = found.values["place"]
                result = self._restore(self.turns[trained], found.tensors, found.values["result"])
            else:
                trained = place - 1 if self._goes_back(place) else place
                result = self._train(trained, len(self.turns) - trained)
            self.last[trained] = result
            self.results.append(result)
            if trained < place:
                self.returns[place] += 1
            else:
                place += 1
        self.ctx.metrics["backtracks"] = self.returns.total()
        self.ctx.metrics["layers"] = [
            {"layer": turn.index, **self._figures(self.last[place])} for place, turn in enumerate(self.turns)
        ]
        return self._together()

    # -- one turn ------------------------------------------------------------------------------------------
    def _train(self, place: int, turns_left: int) -> LoopResult:
        """Train one layer and write down what came of it.

        Args:
            turns_left: as far as one can tell, this one included.
        """
        ctx, config, turn = self.ctx, self.ctx.config, self.turns[place]
        number, before = len(self.results), self._steps
        groups, state = self._begin(turn)
        every = config.keep_every
        name = f"turn-{number:05d}"

        def keep_step(step: int) -> None:
            if (before + step) % every == 0:
                self.keep_step(before + step)

        result = run_loop(
            replace(ctx, emit=self._emit(turn, before, before + turns_left * config.steps)),
            parameter_groups=groups,
            loss_of=lambda step, micro: self._loss_of(number, step, micro),
            evaluate=self.objective.held_out(),
            # the loop counts from the turn's start: it asks whenever `every` may divide the whole count
            spec=LoopSpec.of(config, self._seed(number), name=name, keep_every=every and math.gcd(every, before)),
            state=state,
            identity=self.identity,
            together=self.objective.over(ctx.world, ctx.smoke),
            keep_step=keep_step,
        )
        if self.resumed_from is None and (self.restored or result.resumed_from is not None):
            self.resumed_from = before + (result.resumed_from or 0)
        tensors = {key: tensor.detach() for key, tensor in state.items()}
        if ctx.world.leads:
            values = {"place": place, "result": vars(result)}
            save_checkpoint(self._record(), result.steps, tensors, values, self.record_identity)
            remove_tree(ctx.scratch / name)
        self._end(turn)
        kept = self._kept(result)
        if result.start_tune is not None and kept is not None:
            ctx.log(f"{turn.name}: held-out loss {result.start_tune:.5g} -> {kept:.5g}")
        return result

    def _restore(self, turn: Turn, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> LoopResult:
        """Put the outcome of a finished turn in place."""
        import torch

        _, state = self._begin(turn)
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])
        self._end(turn)
        self.restored = True
        self.ctx.log(f"{turn.name} is there from the run before")
        return LoopResult(**figures)

    def _begin(self, turn: Turn) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Let this layer train and nothing else; returns as `parameter_groups`."""
        config = self.ctx.config
        self.objective.loss.local_layer = turn.index
        if "weights" in config.trainable:
            for name, module in turn.modules.items():
                module.start_latent(self.aside.pop(name, None))
        modules = turn.modules.values()
        return parameter_groups(
            self.objective.model, modules, config.trainable, vars(config.lr), f"{turn.name}.", config.freeze
        )

    def _end(self, turn: Turn) -> None:
        """Fix the layer's indices, which spares every later turn their derivation from latents."""
        self.aside |= {name: latent.cpu() for name, latent in set_aside_latents(turn.modules).items()}

    def _loss_of(self, number: int, step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        return self.objective.loss_of(number * self.ctx.config.steps + step, micro)

    def _seed(self, number: int) -> int:
        return step_seed(self.ctx.seed, number)

    # -- going back ----------------------------------------------------------------------------------------
    def _goes_back(self, place: int) -> bool:
        """Whether the layer at `place` starts so badly that the one before it has to train again."""
        factor = self.ctx.config.layerwise.backtrack
        if factor is None or place == 0 or self.returns[place] >= RETURNS:
            return False
        before = self.last[place - 1].last_loss
        if before is None:
            return False
        first = self._first_loss(place)
        if first <= factor * before:  # a loss that is no number is no good start
            return False
        turn, other = self.turns[place], self.turns[place - 1]
        self.ctx.log(
            f"{turn.name} starts with a loss of {first:.5g}, and {other.name} ended with {before:.5g}: "
            f"back to that one ({self.returns[place] + 1} of at most {RETURNS} times)"
        )
        return True

    def _first_loss(self, place: int) -> float:
        """The loss of the first step that the layer at `place` would take now."""
        import torch

        number = len(self.results)
        self.objective.loss.local_layer = self.turns[place].index
        torch.manual_seed(step_seed(self._seed(number), 0))
        total = tokens = 0.0
        with torch.no_grad():
            for micro in range(self.ctx.config.batch.accumulate):
                loss, figures = self._loss_of(number, 0, micro)
                total += float(loss) * figures["tokens"]
                tokens += figures["tokens"]
        total, tokens = self.ctx.world.sums([total, tokens])
        return total / tokens

    # -- figures -------------------------------------------------------------------------------------------
    @property
    def _steps(self) -> int:
        return sum(result.steps for result in self.results)

    def _record(self) -> Any:
        return self.ctx.scratch / f"finished-{len(self.results):05d}"

    def _kept(self, result: LoopResult) -> float | None:
        return result.last_tune if self.ctx.config.keep == "last" else result.best_tune

    def _figures(self, result: LoopResult) -> dict[str, float]:
        """What is told of one layer's last turn."""
        found = {"first_loss": result.first_loss, "last_loss": result.last_loss, "kl_after": self._kept(result)}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}

    def _emit(self, turn: Turn, before: int, total: int) -> Callable[[str, Mapping[str, Any]], None]:
        """What a turn tells, as part of all turns."""

        def emit(kind: str, values: Mapping[str, Any]) -> None:
            told = dict(values)
            if kind == "log":
                told["message"] = f"layer {turn.index}: {told['message']}"
            elif kind == "progress":
                left, own = told.pop("seconds_left", None), told["total"] - told["step"]
                told |= {"step": before + told["step"], "total": total, "layer": turn.index}
                if left is not None and own:
                    self.seconds_per_step = left / own
                if self.seconds_per_step is not None:
                    told["seconds_left"] = round(self.seconds_per_step * (total - told["step"]), 1)
            self.ctx.emit(kind, told)

        return emit

    def _together(self) -> LoopResult:
        """All turns as if they were one loop."""
        first, last, steps = self.results[0], self.results[-1], self._steps
        before = [sum(result.steps for result in self.results[:number]) for number in range(len(self.results))]
        best = max((number for number, result in enumerate(self.results) if result.best_step), default=0)
        timed = [result for result in self.results if result.tokens_per_second]  # not those resumed at their end
        busy = sum(result.steps / result.tokens_per_second for result in timed)
        return LoopResult(
            steps=steps,
            skipped=sum(result.skipped for result in self.results),
            first_loss=first.first_loss,
            last_loss=last.last_loss,
            start_tune=first.start_tune,
            last_tune=last.last_tune,
            best_tune=last.best_tune,
            best_step=before[best] + self.results[best].best_step,
            kept_step=before[-1] + last.kept_step,
            tokens_per_second=sum(result.steps for result in timed) / busy if busy else 0.0,
            seconds=sum(result.seconds for result in self.results),
            resumed_from=steps if self.restored and self.resumed_from is None else self.resumed_from,
        )
