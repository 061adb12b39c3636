"""What trains and what stays: parameter sets of quantized modules, everything else frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from a1q.engine.pattern import compile_pattern
from a1q.engine.stage import Group
from a1q.errors import StageError
from a1q.models.view import QUANTIZED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from a1q.quant.module import QuantModule

NORMS = "norms"
"""The one set outside the quantized modules: the model's normalization gains. It costs no bits."""


def select_modules(
    modules: Mapping[str, QuantModule], groups: Mapping[str, Group], names: Iterable[str] | None
) -> dict[str, QuantModule]:
    """Those of `modules` that still train and that the named groups match (all for None), in model order."""
    modules = {name: module for name, module in modules.items() if module.state == QUANTIZED}
    if names is None:
        return modules
    patterns = [compile_pattern(groups[name].match) for name in names]
    return {name: module for name, module in modules.items() if any(each.fullmatch(name) for each in patterns)}


def parameter_groups(
    model: nn.Module,
    modules: Iterable[QuantModule],
    sets: Iterable[str],
    rates: Mapping[str, float],
    inside: str = "",
    freeze: Iterable[str] = (),
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Freeze `model` but for the named sets of `modules`.

    A part that belongs to two sets (g: to scales and magnitudes) trains with the first that names it. Learning rates
    are relative to what they move: of weights to the distance between levels, of all else to its rms. Adam's steps are
    about as long as its learning rate, so one rate serves all bit widths, schemes and layers.

    Args:
        rates: set name -> learning rate in such units.
        inside: what the names of gains that train begin with.
        freeze: sets whose parameters stand still, also as part of another set.

    Returns:
        The optimizer's groups, one per parameter, and the trained parameters by name.

    Raises:
        StageError: if nothing is left to train.
    """
    model.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = list(modules)
    units = {id(module.latent): level_distance(module) for module in modules if module.latent is not None}
    held = {id(parameter) for module in modules for name in freeze for parameter in module.trainable(name)}
    groups: list[dict[str, Any]] = []
    state: dict[str, Tensor] = {}
    for set_name in sets:
        if set_name == NORMS:
            named = [item for item in model.named_parameters() if item[0].startswith(inside)]
            found = [item for name, item in named if item.ndim == 1 and "norm" in name]
        else:
            found = [parameter for module in modules for parameter in module.trainable(set_name)]
        new = [item for item in found if names[id(item)] not in state and id(item) not in held]
        state |= {names[id(parameter)]: parameter.requires_grad_(True) for parameter in new}
        for parameter in new:
            rate = rates[set_name] * units.get(id(parameter), rms(parameter))
            groups.append({"name": set_name, "params": [parameter], "lr": rate})
    if not groups:
        raise StageError(f"there is nothing to train: no module has parameters in {', '.join(sets)}")
    return groups, state


def level_distance(module: QuantModule) -> float:
    """About how far apart the levels of a module's grid are: 2**bits of them over four times the rms of Ŵ."""
    return rms(module.dequantize()) * 4 / 2 ** module.spec["bits"]


def latents(state: Iterable[str]) -> list[str]:
    """Those names of trained parameters that are latent weights."""
    return [name for name in state if name.endswith(".latent")]


def rms(tensor: Tensor) -> float:
    """Root of the mean square, of a parameter that may be a scale or a gain."""
    return float(tensor.detach().float().square().mean().sqrt())


def set_aside_latents(modules: Mapping[str, QuantModule]) -> dict[str, Tensor]:
    """Fix the indices of modules whose weights don't train now, and return their latents [out, in] by name.

    Indices are those the latents mean as the module stands, so its function does not change; `start_latent` puts a
    latent back.
    """
    found = {name: module.latent.detach() for name, module in modules.items() if module.latent is not None}
    for name in found:
        modules[name].drop_latent()
    return found
