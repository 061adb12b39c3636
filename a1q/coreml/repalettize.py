"""Modules fitted anew, in a scheme that Core ML can hold: on request only, and with the loss measured.

An exporter never changes a weight by itself. Where a scheme has no form that Core ML can hold, or an embedding is dense
and large, the option `repalettize` names the modules and their new scheme::

    repalettize:
      embedding: {match: 'model\\.embed_tokens', scheme: lut, bits: 4, granularity: group, channels: 16}
      head: {match: lm_head, scheme: lut, bits: 6}

Each entry has a name of its own, a pattern for whole module names as in a recipe's `groups`, and a scheme as in the
rules of `quantize`. Nothing trains afterwards, so what is lost here stays lost.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.matching import matching, near_modules, summarize
from a1q.engine.stage import Group
from a1q.errors import StageError
from a1q.models.view import SNAPPED, ModelView, ModuleView
from a1q.quant.bits import module_bits
from a1q.quant.build import complete, make_scheme

if TYPE_CHECKING:
    from torch import nn

    from a1q.coreml.operations import Array

Rules = Mapping[str, Mapping[str, Any]]
"""Name -> {match, scheme, ...}."""
ALTERNATIVES = "`lut`, `lut_lowrank`, `vector_lut` and `balanced` it can"


@dataclass(frozen=True)
class Module:
    """One module that was fitted anew."""

    name: str
    before: str
    """`dense`, or the scheme it had."""
    after: str
    error: float
    """Σ (W - Ŵ)² / Σ W², W being the weight that it had before."""
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Loss:
    """What fitting anew cost."""

    modules: tuple[Module, ...]
    positions: int
    """Positions of text at which the model was compared before and after."""
    kl: float
    """Mean KL divergence in nats, before to after."""
    max_error: float
    """Largest difference of a logit."""
    agreement: float
    """Share of the positions where both rank the same token first."""

    def as_json(self) -> dict[str, Any]:
        """Plain values, sizes summed."""
        return {
            **dataclasses.asdict(self),
            "bytes_before": sum(module.bytes_before for module in self.modules),
            "bytes_after": sum(module.bytes_after for module in self.modules),
        }


def problems(rules: Rules, view: ModelView) -> list[str]:
    """Say why these rules don't fit the model; empty when they do. No torch."""
    found = []
    owners: dict[str, list[str]] = {}
    for rule, options in rules.items():
        place = f"repalettize.{rule}"
        try:
            names = matching(_group(rule, options), view)
            scheme = make_scheme(_mapping(options))
        except ValueError as error:
            found.append(f"{place}.match: {error}")
            continue
        except StageError as error:
            found.append(f"{place}: {error}")
            continue
        if not names:
            near = near_modules(_group(rule, options), view)
            found.append(f"{place} matches no module: {options['match']}; {near}")
        if not scheme.hardware:
            found.append(f"{place}: Core ML can't hold {_named(options)} either; {ALTERNATIVES}")
        refusals: dict[str, list[str]] = {}
        for name in names:
            owners.setdefault(name, []).append(rule)
            for refusal in scheme.check(view.modules[name].shape):
                refusals.setdefault(refusal, []).append(name)
        found += [f"{place}: {refusal}, in {', '.join(summarize(at))}" for refusal, at in refusals.items()]
    twice = [name for name, named in owners.items() if len(named) > 1]
    if twice:
        named = " and ".join(owners[twice[0]])
        found.append(f"repalettize: {', '.join(summarize(twice))} in both {named}; each may be in one rule")
    return found


def advice(modules: Sequence[ModuleView]) -> str:
    """What to do about modules whose scheme Core ML can't hold: the alternatives, and the option to type."""
    bits = max(int((module.scheme or {}).get("bits", 4)) for module in modules)
    # Tables of their own pay for groups of channels as long as they are small beside the indices.
    grouped = bits <= 4 and all(module.shape[0] % 16 == 0 for module in modules)
    table = "granularity: group, channels: 16" if grouped else "granularity: tensor"
    shapes = (re.sub(r"(?<=\.)\d+(?=\.)", "#", module.name) for module in modules)
    pattern = "|".join(re.escape(shape).replace(r"\#", r"\d+") for shape in dict.fromkeys(shapes))
    return (
        f"{ALTERNATIVES}: `convert` to one of them before the snap, or have them fitted anew, which loses quality that "
        f"is then measured: `repalettize: {{again: {{match: '{pattern}', scheme: lut, bits: {bits}, {table}}}}}`"
    )


def chosen(rules: Rules, view: ModelView) -> dict[str, dict[str, Any]]:
    """Module name -> complete scheme mapping, in model order, of rules that `problems` finds nothing wrong with."""
    owners = {name: rule for rule, options in rules.items() for name in matching(_group(rule, options), view)}
    return {name: complete(_mapping(rules[owners[name]])) for name in view.modules if name in owners}


def planned(rules: Rules, view: ModelView) -> ModelView:
    """The model as it will be."""
    return view.replace(
        {
            name: dataclasses.replace(view.modules[name], state=SNAPPED, scheme=spec, latent=False)
            for name, spec in chosen(rules, view).items()
        }
    )


def repalettize(
    model: nn.Module,
    rules: Rules,
    view: ModelView,
    tokens: Array,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Loss:
    """Fit modules of a loaded model anew and measure what the whole model loses.

    Args:
        model: see `replace_modules`.
        tokens: integers [n, L] of real text on which the whole model is compared before and after. The logits
            before are kept: n · L · vocabulary numbers of 4 bytes.
        tick: called with (modules done, modules).

    Raises:
        StageError: if a weight is not finite, or the rules name no module.
    """
    import numpy as np

    expected = [_logits(model, sequence) for sequence in tokens]
    modules = replace_modules(model, rules, view, tick)
    found = [_compared(expected.pop(0), _logits(model, sequence)) for sequence in tokens]
    kl, error, same = np.concatenate(found, axis=1)
    return Loss(modules, tokens.size, float(kl.mean()), float(error.max()), float(same.mean()))


def replace_modules(
    model: nn.Module, rules: Rules, view: ModelView, tick: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Module, ...]:
    """Replace modules of a loaded model by freshly fitted, snapped ones; adapters and biases stay.

    The same model and rules give the same modules, so that a package can be compared with them later.

    Args:
        model: dense or snapped, with the modules of `view`. It is changed.

    Raises:
        StageError: if a weight is not finite, or the rules name no module.
    """
    from torch import nn

    from a1q.quant.embedding import QuantEmbedding
    from a1q.quant.linear import QuantLinear
    from a1q.quant.measure import relative_error
    from a1q.quant.tied import swap_module

    specs = chosen(rules, view)
    if not specs:
        raise StageError("repalettize: no module of this model is named")
    modules = []
    for done, (name, spec) in enumerate(specs.items(), 1):
        before, old = view.modules[name], model.get_submodule(name)
        cls = QuantEmbedding if isinstance(old, nn.Embedding) else QuantLinear
        new = cls.quantize(old, spec, keep_latent=False)
        if isinstance(old, QuantLinear) and old.lora_A is not None and old.lora_B is not None:
            new.set_adapter(old.lora_A, old.lora_B, old.adapter_alpha)
        new.snap()
        wrong, whole = relative_error(old.weight.detach(), new.dequantize(), None)  # type: ignore[operator]
        modules.append(
            Module(
                name,
                _described(before.scheme),
                _described(spec),
                wrong / whole if whole else 0.0,
                math.ceil(module_bits(before) / 8),
                math.ceil(module_bits(dataclasses.replace(before, state=SNAPPED, scheme=spec)) / 8),
            )
        )
        swap_module(model, name, new)
        tick(done, len(specs))
    return tuple(modules)


def _compared(before: Array, after: Array) -> Array:
    """KL divergence, largest difference, and whether the first choice is the same: [3, L] from [L, vocabulary]."""
    import numpy as np

    from a1q.coreml.figures import divergence

    rows = []
    for expected, found in zip(before.astype(np.float64), after.astype(np.float64), strict=True):
        rows.append((divergence(expected, found), np.abs(expected - found).max(), expected.argmax() == found.argmax()))
    return np.array(rows, np.float64).T


def _logits(model: nn.Module, sequence: Array) -> Array:
    """float32 [L, vocabulary] of integers [L]."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        ids = torch.as_tensor(sequence.astype("int64"), device=device)[None]
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()


def _group(rule: str, options: Mapping[str, Any]) -> Group:
    return Group(rule, options["match"])


def _mapping(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "match"}


def _named(options: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in _mapping(options).items())


def _described(spec: Mapping[str, Any] | None) -> str:
    from a1q.quant.planning import describe

    return "dense" if spec is None else describe(spec)
