"""Train the quantized modules of one decoder layer until its output is what the layer's was before.

The loss is  Σ δᵀ M δ / Σ cᵀ M c  (`a1q.distill.local.relative_error`), with δ the difference of the layer's outputs,
c what the layer adds to its input, and M = E[g gᵀ] where calibration measured gradients: to second order δᵀ M δ / 2 is
the KL that δ costs (as in BRECQ, Li et al., 2021, arXiv:2102.05426, with the whole matrix in place of its diagonal).
Without gradients M is the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.stage import PlanContext, StageContext

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.models.blocks import BlockStream

ISOTROPIC = 0.1
"""Share of the identity in M, relative to its mean diagonal: directions without gradients in the sample count too."""


@dataclass(frozen=True)
class ReconstructConfig:
    """Options of `reconstruct` in the stages that fit; see their schemas."""

    steps: int
    trainable: tuple[str, ...]
    lr: ReconstructRates


@dataclass(frozen=True)
class ReconstructRates:
    """Peak learning rate of every parameter set, as in `train`."""

    weights: float
    scales: float
    lut: float
    norms: float


def check_reconstruction(ctx: PlanContext) -> None:
    """Record a `reconstruct` that has no text to work on."""
    if ctx.config.reconstruct is None:
        return
    if ctx.views.get("statistics") is None:
        ctx.recipe_problem("reconstruct", "there are no statistics, whose text it runs on", "put `calibrate` first")
    elif not ctx.config.sequential:
        ctx.recipe_problem("reconstruct", "it trains layers in order, and `sequential` is false")


def reconstruct(
    ctx: StageContext,
    model: Any,
    stream: BlockStream,
    index: int,
    targets: list[Tensor],
    metric: Tensor | None,
    options: ReconstructConfig,
) -> dict[str, float]:
    """Train layer `index` in place; a step reads one batch of the stream.

    Args:
        stream: its `hidden` are the layer's inputs, from the quantized layers before it.
        targets: what the layer is to give, batch by batch, [b, L, hidden].
        metric: M [hidden, hidden], or None.

    Returns:
        The loss of the first step and of the last ones, relative (0 is perfect, 1 is a layer that adds nothing).

    Raises:
        StageError: if too many steps in a row have no finite loss.
        Interrupted: at SIGINT or SIGTERM.
    """
    import torch

    from a1q.distill.local import relative_error
    from a1q.quant.module import quantized_modules
    from a1q.training.device import autocast
    from a1q.training.loop import LoopSpec, run_loop
    from a1q.training.parameters import parameter_groups

    block = model.get_submodule(stream.names[index])
    modules = [module for _, module in quantized_modules(block)]
    kept = [module.latent is not None for module in modules]
    for module in modules:
        module.straight_through_fp16 = True
        if "weights" not in options.trainable:
            module.drop_latent()  # indices stand; a latent would no longer agree with the trained scales
        elif module.latent is None:
            module.start_latent()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    groups, state = parameter_groups(block, modules, options.trainable, vars(options.lr))
    root = _root(metric, targets[0].shape[-1]).to(stream.device)
    scale = _size_of_addition(targets, stream.hidden, root)
    recent: list[float] = []

    def loss_of(step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        number = int(torch.randint(len(targets), ()))  # the loop seeds the generator for every step
        with autocast(ctx.runtime):
            output = stream.run(index, stream.hidden[number], number)
        loss = relative_error(output, targets[number], max(scale, math.ulp(0.0)), root)
        recent.append(float(loss.detach()))
        return loss, {"tokens": output.shape[0] * output.shape[1]}

    spec = LoopSpec(
        steps=options.steps,
        seed=ctx.seed + index,
        warmup=min(10, options.steps // 4),
        final_lr=0.01,
        clip=None,
        betas=(0.9, 0.99),
        keep="last",
        checkpoint_seconds=math.inf,
        name=f"reconstruct-{index:05d}",
    )
    run_loop(ctx, parameter_groups=groups, loss_of=loss_of, evaluate=None, spec=spec, state=state, identity={})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad)).grad = None
    for module, keep in zip(modules, kept, strict=True):
        module.drop_latent()
        if keep:
            # Trained latents end beside the edges of their cells, where the first steps of another training, which
            # are as long as its learning rate whatever the gradients, would push many across; so back to the grid.
            module.start_latent()
    tail = recent[-max(1, len(recent) // 10) :]
    return {"first": recent[0], "last": sum(tail) / len(tail)}


def _size_of_addition(targets: list[Tensor], hidden: list[Tensor], root: Tensor) -> float:
    """The mean of cᵀ M c per token, c = target - hidden, both [b, L, hidden] batch by batch."""
    total = sum(
        float(((target - before).to(root) @ root).square().sum())
        for target, before in zip(targets, hidden, strict=True)
    )
    return total / sum(target.numel() / target.shape[-1] for target in targets)


def _root(metric: Tensor | None, size: int) -> Tensor:
    """R [hidden, hidden] float32 with R Rᵀ = M, of mean diagonal 1."""
    import torch

    identity = torch.eye(size, dtype=torch.float64)
    if metric is None or not bool(metric.diagonal().mean() > 0):
        return identity.float()
    m = metric.double().cpu()
    m = (m / m.diagonal().mean() + ISOTROPIC * identity) / (1 + ISOTROPIC)
    return torch.linalg.cholesky((m + m.T) / 2).float()
