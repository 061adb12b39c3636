"""The one training loop: AdamW, schedule, accumulation, held-out best, checkpoints.

Data order and randomness are functions of (seed, step) alone, so a checkpoint needs no generator state: parameters,
Adam's moments, the best parameters so far and the counters are enough to go on bit for bit as if never stopped.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from a1q.engine.stage import StageContext
from a1q.engine.world import peers
from a1q.errors import Interrupted, StageError
from a1q.training.average import Average
from a1q.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from a1q.training.device import grad_scaler, machine_identity
from a1q.training.memory import peak_memory
from a1q.training.schedule import learning_rate_factor
from a1q.training.spec import LoopResult, LoopSpec, Progress
from a1q.training.together import Together

if TYPE_CHECKING:
    from torch import Tensor

LossOf = Callable[[int, int], "tuple[Tensor, dict[str, float]]"]
"""(step, micro-batch) -> (mean loss, figures). The figure `tokens`, where given, is what the mean was taken over."""

SAVE_SHARE = 20
"""Training goes on for at least so many times as long as the last checkpoint took to write."""


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in one step: data order, dropout.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def run_loop(
    ctx: StageContext,
    *,
    parameter_groups: Sequence[Mapping[str, Any]],
    loss_of: LossOf,
    evaluate: Callable[[], float] | None,
    spec: LoopSpec,
    state: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    together: Together | None = None,
    keep_step: Callable[[int], None] = lambda step: None,
) -> LoopResult:
    """Train the tensors of `state` in place, or go on from the checkpoint that a killed run left in `ctx.scratch`.

    Args:
        parameter_groups: each `{"name", "params", "lr", "weight_decay" (optional)}`; lr is the peak.
        loss_of: called under autograd for every micro-batch, after `torch.manual_seed(step_seed(seed, step))`.
        evaluate: the held-out loss; called without gradients before the first step, every `evaluate_every` steps and
            at the end.
        state: every trained parameter by name; all that a checkpoint must hold.
        identity: JSON values that must be equal for a resume, besides machine, threads, processes and shapes.
        keep_step: called in the leading process after every `keep_every` steps, with the parameters in place that
            would be kept; a resumed run repeats the steps behind its checkpoint.
        together: how several processes train; each of them calls this, and `loss_of` and `evaluate` with it.

    Raises:
        PeerLost: if another of these processes has ended.
        StageError: if too many steps in a row have no finite loss or gradient, or the disk is full.
        MismatchError: if a checkpoint exists that was written under another identity.
        Interrupted: at SIGINT or SIGTERM, after a checkpoint.
    """
    loop = _Loop(ctx, parameter_groups, loss_of, evaluate, spec, state, identity, together or Together())
    loop.keep_step = keep_step
    return loop.run()


class _Loop:
    def __init__(
        self,
        ctx: StageContext,
        parameter_groups: Sequence[Mapping[str, Any]],
        loss_of: LossOf,
        evaluate: Callable[[], float] | None,
        spec: LoopSpec,
        state: Mapping[str, Tensor],
        identity: Mapping[str, Any],
        together: Together,
    ):
        import torch

        groups = [dict(group, params=list(group["params"])) for group in parameter_groups if group["params"]]
        self.ctx, self.loss_of, self.evaluate, self.spec, self.state = ctx, loss_of, evaluate, spec, state
        self.parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        names = {id(tensor): name for name, tensor in state.items()}
        if not self.parameters or {id(parameter) for parameter in self.parameters} != set(names):
            raise ValueError("`state` must name exactly the parameters of `parameter_groups`, at least one")
        self.names = [names[id(parameter)] for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            [dict(group, peak=group["lr"]) for group in groups],
            betas=spec.betas,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        self.scaler = grad_scaler(ctx.runtime)
        self.together, self.world = together, together.world
        identity = {
            **machine_identity(ctx.runtime),
            **{name: value for name, value in vars(spec).items() if not name.startswith("checkpoint_")},
            **identity,
            "processes": self.world.size,
            "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        }
        self.identity = self.world.shared(identity)  # machines may differ: the leading one's name counts
        self.folder = ctx.scratch / spec.name
        self.at = Progress()
        self.best: dict[str, Tensor] = {}
        self.average = None if spec.ema is None else Average(state, spec.ema)
        self.train_seconds = self.tokens = self.save_seconds = 0.0
        self.saved_at = time.monotonic()
        self.saved_step: int | None = None
        self.due, self.stop = False, 0
        self.figures: dict[str, float] = {}
        """Of the last step."""
        self.keep_step: Callable[[int], None] = lambda step: None

    def run(self) -> LoopResult:
        began = time.monotonic()
        resumed = self._resume()
        if resumed is None:
            self._evaluate()
            self._require_a_finite_start()
        self.began, self.first_step = time.monotonic(), self.at.step
        while not self._done():
            self._step()
            if self.at.step % self.spec.evaluate_every == 0 or self.at.step == self.spec.steps:
                self._evaluate()
            if self.spec.keep_every is not None and self.at.step % self.spec.keep_every == 0 and self.world.leads:
                with self._averaged():
                    self.keep_step(self.at.step)
            self._report()
            # What several processes do together they decide together, in `_step`.
            ends = bool(self.stop) or (self._done() and self.saved_step is not None)
            if self.due or (ends and self.saved_step != self.at.step):
                self._checkpoint()
            if self.stop:
                raise Interrupted(self.stop)
        at = self.at
        if at.step < self.spec.steps:
            self.ctx.log(f"ended after step {at.step}: {at.stale} evaluations in a row without a lower held-out loss")
        kept = self._keep()
        return LoopResult(
            steps=at.step,
            skipped=at.skipped,
            first_loss=at.first_loss,
            last_loss=at.last_loss,
            start_tune=at.start_tune,
            last_tune=at.last_tune,
            best_tune=at.best_tune,
            best_step=at.best_step,
            kept_step=kept,
            tokens_per_second=self.tokens / self.train_seconds if self.train_seconds else 0.0,
            seconds=time.monotonic() - began,
            resumed_from=resumed,
        )

    def _step(self) -> None:
        import torch

        began = time.monotonic()
        step, spec = self.at.step, self.spec
        factor = learning_rate_factor(step, spec.steps, spec.warmup, spec.schedule, spec.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        torch.manual_seed(step_seed(spec.seed, step))
        weights: list[float] = []
        losses: list[Tensor] = []
        terms: dict[str, float] = {}
        first = 1.0
        with peers():
            for micro in range(spec.accumulate):
                with self.together.micro_batch(last=micro == spec.accumulate - 1):
                    loss, figures = self.loss_of(step, micro)
                    weights.append(float(figures.get("tokens", 1.0)))
                    if micro == 0:
                        first = self.world.shared(weights[0])
                    # Micro-batches may hold different numbers of tokens: weigh each relative to the first, which
                    # keeps magnitudes as they are, and divide by the sum below.
                    self.scaler.scale(loss * (weights[-1] / first)).backward()
                losses.append(loss.detach())
                for name, term in figures.items():
                    terms[name] = terms.get(name, 0.0) + term * weights[-1]
        terms.pop("tokens", None)
        losses_sum = sum(float(loss) * weight for loss, weight in zip(losses, weights, strict=True))
        losses_sum, total, due, stop, *sums = self.world.sums(
            [losses_sum, sum(weights), self._due(), self._asked_to_stop(), *terms.values()]
        )
        self.due, self.stop = bool(due), int(stop)
        loss_value = losses_sum / total
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.together.gather(gradients)
        share = first * self.world.size / total  # processes give the mean of theirs
        local = [self.together.local(gradient) for gradient in gradients]
        if share != 1.0:
            torch._foreach_mul_(local, share)
        norm = self.together.norm(gradients)
        finite = math.isfinite(loss_value) and bool(torch.isfinite(norm))
        if finite:
            if spec.clip is not None:
                torch._foreach_mul_(local, (spec.clip / (norm + 1e-6)).clamp(max=1.0))
            self.scaler.step(self.optimizer)
            if self.average is not None:
                self.average.add(step - self.at.skipped)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.figures = {"lr": factor, "norm": float(norm)}
        self.figures |= {name: value / total for name, value in zip(terms, sums, strict=True)}
        self._count(loss_value, finite)
        self.tokens += total
        self.train_seconds += time.monotonic() - began

    def _done(self) -> bool:
        spec = self.spec
        return self.at.step >= spec.steps or (spec.patience is not None and self.at.stale >= spec.patience)

    def _count(self, loss: float, finite: bool) -> None:
        at = self.at
        at.step += 1
        if finite:
            at.skipped_in_row = 0
            at.last_loss = loss
            at.first_loss = loss if at.first_loss is None else at.first_loss
            return
        at.skipped += 1
        at.skipped_in_row += 1
        self.ctx.log(f"step {at.step} skipped: its loss or gradient is not finite (loss {loss})")
        if at.skipped_in_row >= self.spec.skip_limit:
            raise StageError(
                f"{at.skipped_in_row} steps in a row, up to step {at.step}, had a loss or gradient that is not finite; "
                "lower the learning rates, or train with `amp: no`"
            )

    def _averaged(self) -> AbstractContextManager[None]:
        """Where there is an average, its parameters are in place inside."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _require_a_finite_start(self) -> None:
        """Say at once, and not after many skipped steps, that there is nothing to train.

        Raises:
            StageError: naming the first parameters that are no numbers.
        """
        import torch

        start = self.at.start_tune
        if start is None or math.isfinite(start):
            return
        odd = [
            name for name, tensor in self.state.items() if not bool(torch.isfinite(self.together.local(tensor)).all())
        ]
        where = f"; not finite are {', '.join(odd[:3])}" if odd else "; all that trains is finite: look at what doesn't"
        raise StageError(f"the held-out loss is {start} before the first step{where}")

    def _evaluate(self) -> None:
        import torch

        if self.evaluate is None:
            return
        at = self.at
        with torch.no_grad(), self._averaged():
            loss = float(self.evaluate())
            better = math.isfinite(loss) and (at.best_tune is None or loss < at.best_tune)
            if better and self.spec.keep == "best":
                self.best = {name: tensor.detach().clone() for name, tensor in self.state.items()}
        at.last_tune = loss
        if at.step == 0:
            at.start_tune = loss
        at.stale = 0 if better else at.stale + 1
        if better:
            at.best_tune, at.best_step = loss, at.step

    def _keep(self) -> int:
        """Put the parameters to keep in place, warn where training did harm, and return their step."""
        import torch

        at = self.at
        if at.start_tune is not None and at.last_tune is not None and not at.last_tune <= at.start_tune:
            kept = f"step {at.best_step}, {at.best_tune:.5g}" if self.best else "the last step"
            self.ctx.log(
                f"WARNING: training made the held-out loss worse: {at.start_tune:.5g} at the start, "
                f"{at.last_tune:.5g} at the end; kept: {kept}"
            )
        wanted = self.best or (self.average.tensors if self.average is not None else {})
        with torch.no_grad():
            for name, tensor in wanted.items():
                self.state[name].copy_(tensor)
        return at.best_step if self.best else at.step

    def _report(self) -> None:
        at = self.at
        values = {"loss": at.last_loss, "tune": at.last_tune}
        if self.train_seconds:
            values["tokens_per_second"] = self.tokens / self.train_seconds
        figures = {name: value for name, value in values.items() if value is not None} | self.figures
        per_step = (time.monotonic() - self.began) / (at.step - self.first_step)  # with evaluations and checkpoints
        figures["seconds_left"] = round(per_step * (self.spec.steps - at.step), 1)
        figures["memory_bytes"] = peak_memory(self.ctx.runtime.device)
        self.ctx.emit("progress", {"step": at.step, "total": self.spec.steps, **figures})

    # -- checkpoints ---------------------------------------------------------------------------------------
    def _due(self) -> bool:
        """Whether this process, which leads, wants a checkpoint after this step."""
        spec, step = self.spec, self.at.step + 1
        return self.world.leads and (
            time.monotonic() - self.saved_at >= max(spec.checkpoint_seconds, SAVE_SHARE * self.save_seconds)
            or (spec.checkpoint_steps is not None and step % spec.checkpoint_steps == 0)
        )

    def _asked_to_stop(self) -> int:
        return self.ctx.should_stop() if self.world.leads else 0

    def _checkpoint(self) -> None:
        began = time.monotonic()
        self.at.scaler = self.scaler.state_dict()
        tensors = {f"parameter.{name}": tensor for name, tensor in self.state.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        tensors = {name: self.together.whole(tensor) for name, tensor in tensors.items()}
        if self.world.leads:
            save_checkpoint(self.folder, self.at.step, tensors, vars(self.at), self.identity)
        self.saved_at, self.saved_step = time.monotonic(), self.at.step
        self.save_seconds = self.saved_at - began

    def _resume(self) -> int | None:
        found = load_checkpoint(self.folder, self.identity, self.ctx.log)
        if found is None:
            return None
        self._restore(found)
        self.ctx.log(f"resumed at step {found.step} of {self.spec.steps}")
        self.saved_step = found.step
        return found.step

    def _restore(self, found: Checkpoint) -> None:
        import torch

        self.at = Progress(**found.values)
        self.scaler.load_state_dict(self.at.scaler)

        def shared(key: str, name: str) -> Tensor:
            tensor, like = found.tensors[f"{key}.{name}"], self.state[name]
            return self.together.share(tensor, like) if tensor.shape == like.shape else tensor.to(like.device)

        with torch.no_grad():
            for name, tensor in self.state.items():
                tensor.copy_(shared("parameter", name))
        if self.average is not None:
            self.average.restore({name: shared("average", name) for name in self.state})
        self.best = {name: shared("best", name) for name in self.state if f"best.{name}" in found.tensors}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in found.tensors]
            if keys:  # a parameter that has had no gradient yet has no moments
                self.optimizer.state[parameter] = {key: shared(key, name) for key in keys}
