"""What every quantized module is, whatever its scheme and whatever it computes with its weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from a1q.errors import StageError
from a1q.models.view import QUANTIZED, SNAPPED
from a1q.quant.build import complete, make_scheme
from a1q.quant.importance import Inputs
from a1q.quant.scheme import Scheme

FORMS = ("dense", "factored", "batched")
SETS = ("weights", "scales", "magnitudes", "lut")


class QuantModule(nn.Module):
    """A module whose weight Ŵ [out, in] a scheme says; an embedding's is [vocabulary, hidden].

    Parts of the scheme are parameters of this module under their own names (fp32; fp16 and frozen once snapped), but
    for `indices`, a uint8 buffer. While `latent` [out, in] is there, it decides the indices: every forward
    pass, `parts()` and `snap()` derive them anew. `weight` reads the quantized weight; a write to its data is lost.
    """

    kind: ClassVar[str]
    """As in `a1q.models.view.ModuleView`: `linear` or `embedding`."""
    scheme: Scheme
    spec: dict[str, Any]
    indices: Tensor
    bias: Any
    """Parameter [out] or None."""
    latent: nn.Parameter | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    snapped_sets: tuple[str, ...] = ()
    """Sets whose parameters hold fp16-exact numbers already; whoever trains or replaces them clears it."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        parts: Mapping[str, Tensor],
        bias: Tensor | None = None,
        latent: Tensor | None = None,
        state: str = QUANTIZED,
    ):
        """Take tensors as they are: `parts` as `Scheme.fit` or `Scheme.snap` gives them, `latent` fp32 [out, in]."""
        nn.Module.__init__(self)  # not that of the dense module, which would make a weight
        self.spec = complete(spec)
        self.scheme = make_scheme(self.spec)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        self.register_buffer("indices", parts["indices"])
        self.part_names: tuple[str, ...] = ()
        self._set_parts(parts, state)
        self.register_parameter("latent", None)
        if latent is not None:
            self.start_latent(latent)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.adapter_alpha = 0.0
        self.form = "dense"
        self.straight_through_fp16 = False

    @classmethod
    @abstractmethod
    def in_place_of(
        cls,
        dense: nn.Module,
        spec: Mapping[str, Any],
        parts: Mapping[str, Tensor],
        latent: Tensor | None = None,
        state: str = QUANTIZED,
    ) -> Self:
        """The quantized module that does the work of `dense`, whose weight is not looked at."""

    @classmethod
    def quantize(
        cls,
        module: nn.Module,
        spec: Mapping[str, Any],
        inputs: Inputs | None = None,
        seed: int = 0,
        keep_latent: bool = True,
    ) -> Self:
        """Fit the scheme to a dense module, `inputs` being what it is multiplied with.

        Raises:
            StageError: if the weight is not finite, or the module computes something of its own.
            ValueError: if `inputs` is no such thing or has another shape.
        """
        assert isinstance(module.weight, Tensor)
        weight = module.weight.detach().float()
        scheme = make_scheme(spec)
        parts = fit_parts(scheme, weight, cls.importance(inputs), seed)
        return cls.in_place_of(module, spec, parts, latent_for(scheme, parts, weight) if keep_latent else None)

    @classmethod
    def importance(cls, inputs: Inputs | None) -> Inputs | None:
        """How a fit's errors count, where the weight's products are made with `inputs`."""
        return inputs

    # -- what the module is ----------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.indices.shape[0] * self.scheme.vector, self.indices.shape[1]

    @property
    def weight(self) -> Tensor:
        """Ŵ [out, in] fp32 as the dense form uses it, differentiable; without the adapter."""
        if self.state == SNAPPED:
            return self.dequantize()
        return self.scheme.weight(self._stored(), self.latent, self.straight_through_fp16)

    def rows(self, start: int, stop: int) -> Tensor:
        """Ŵ [stop - start, in] fp32, detached, as `weight` has these rows, which are whole vectors; no other is made.

        (The whole weight is, where the scheme can't say rows by themselves.)
        """
        with torch.no_grad():
            rows = torch.arange(start, stop, device=self.indices.device)
            stored = self.scheme.select_rows(self._stored(), rows)
            if stored is None:
                return self.weight[start:stop]
            if self.state == SNAPPED:
                return self.scheme.dequantize(stored)
            latent = None if self.latent is None else self.latent[start:stop]
            return self.scheme.weight(stored, latent, self.straight_through_fp16)

    def trained_parts(self) -> dict[str, Tensor]:
        """Parts that train, by name, where rows can be made of them (`rows_of`) and no latent decides; else none."""
        nothing = torch.arange(0, device=self.indices.device)
        if self.latent is not None or self.scheme.select_rows(self._stored(), nothing) is None:
            return {}
        return {name: part for name, part in self._stored().items() if part.requires_grad}

    def rows_of(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
        """`rows`, differentiable by `parts`, which stand for its own `trained_parts`."""
        rows = torch.arange(start, stop, device=self.indices.device)
        stored = self.scheme.select_rows({**self._stored(), **parts}, rows)
        assert stored is not None
        return self.scheme.weight(stored, None, self.straight_through_fp16)

    def parts(self) -> dict[str, Tensor]:
        """Name -> tensor, `indices` first: those of `latent` where there is one. Parameters are not copied."""
        stored = self._stored()
        if self.latent is not None:
            with torch.no_grad():
                grid = self.scheme.rounded(stored) if self.straight_through_fp16 else stored
                self.indices.copy_(self.scheme.assign(grid, self.latent))
        return stored

    def dequantize(self) -> Tensor:
        """Ŵ [out, in] fp32, detached: what the parts say, whatever `straight_through_fp16`."""
        with torch.no_grad():
            return self.scheme.dequantize(self.parts())

    @property
    def adapter(self) -> dict[str, Any] | None:
        """`{"rank": r, "alpha": alpha}` of the unmerged adapter, or None."""
        return None if self.lora_A is None else {"rank": self.lora_A.shape[0], "alpha": self.adapter_alpha}

    def trainable(self, set_name: str) -> list[nn.Parameter]:
        """The parameters of one set; empty where the scheme has none of them, or no latent was started.

        Raises:
            StageError: if the module is snapped, or the set is unknown to this scheme and to a1q.
        """
        if self.state == SNAPPED:
            raise StageError("a snapped module does not train")
        if set_name == "weights":
            return [] if self.latent is None else [self.latent]
        if set_name not in SETS and set_name not in self.scheme.trainable:
            raise StageError(f"no trainable set {set_name!r}; there are {', '.join(SETS)}")
        return [getattr(self, name) for name in self.scheme.trainable.get(set_name, ())]

    # -- changing it -----------------------------------------------------------------------------------------
    def start_latent(self, weight: Tensor | None = None) -> None:
        """Let weights train, from `weight` [out, in] or else from the grid as it stands."""
        start = self.dequantize() if weight is None else weight.detach().to(self.indices.device, torch.float32)
        self.latent = nn.Parameter(start)

    def drop_latent(self) -> None:
        """Fix the indices as the latent has them, and forget it."""
        self.parts()
        self.latent = None

    def set_adapter(self, lora_a: Tensor, lora_b: Tensor, alpha: float) -> None:
        """Put an adapter A [rank, in], B [out, rank] in place."""
        rows, columns = self.shape
        if lora_a.shape[1] != columns or lora_b.shape != (rows, lora_a.shape[0]):
            raise ValueError(f"adapter {tuple(lora_a.shape)}, {tuple(lora_b.shape)} does not fit {self.shape}")
        self.lora_A, self.lora_B = nn.Parameter(lora_a.detach()), nn.Parameter(lora_b.detach())
        self.adapter_alpha = float(alpha)

    def drop_adapter(self) -> None:
        """Remove the adapter."""
        self.lora_A = self.lora_B = None
        self.adapter_alpha = 0.0

    def adapter_delta(self) -> Tensor:
        """(alpha / rank) B A [out, in] fp32; zeros without an adapter."""
        if self.lora_A is None or self.lora_B is None:
            return torch.zeros(self.shape, device=self.indices.device)
        return (self.adapter_alpha / len(self.lora_A)) * (self.lora_B.float() @ self.lora_A.float()).detach()

    def refit(self, spec: Mapping[str, Any], target: Tensor, inputs: Inputs | None = None, seed: int = 0) -> None:
        """Fit a scheme, this one or another, to `target` [out, in], and a latent with it. Raises as `quantize`."""
        target = target.detach().float()
        scheme = make_scheme(spec)
        parts = fit_parts(scheme, target, self.importance(inputs), seed)
        self.set_scheme(spec, parts, latent_for(scheme, parts, target))

    def set_scheme(self, spec: Mapping[str, Any], parts: Mapping[str, Tensor], latent: Tensor | None = None) -> None:
        """Put a scheme, this one or another, and its parts in place; a latent, where kept, becomes `latent`."""
        self.spec = complete(spec)
        self.scheme = make_scheme(self.spec)
        self.replace_parts(parts, latent)

    def replace_parts(self, parts: Mapping[str, Tensor], latent: Tensor | None = None) -> None:
        """Put other parts of the present scheme in place; a latent, where kept, becomes `latent` or else the grid."""
        self.indices = parts["indices"].to(self.indices.device)
        self._set_parts(parts, QUANTIZED)
        if self.latent is not None:
            self.latent = None
            self.start_latent(latent)

    def snap(self) -> None:
        """Round every part and the adapter to fp16, on the CPU; the latent is dropped.

        Indices stay those that the last forward pass would use.
        """
        self.drop_latent()
        snapped = self.scheme.snap(self._stored())
        device = self.indices.device
        self.indices = snapped["indices"].to(device)
        self._set_parts(snapped, SNAPPED)
        if self.lora_A is not None and self.lora_B is not None:
            from a1q.quant.grid import to_fp16

            self.lora_A, self.lora_B = (
                nn.Parameter(to_fp16(part).to(device), requires_grad=False) for part in (self.lora_A, self.lora_B)
            )

    # -- computing -------------------------------------------------------------------------------------------
    def project(self, x: Tensor) -> Tensor:
        """x Ŵᵀ [..., out] for x [..., in], in the module's form; without bias and adapter."""
        if self.form == "dense":
            if torch.is_grad_enabled():
                fp16 = self.straight_through_fp16 and self.state != SNAPPED
                y = self.scheme.product(self._stored(), self.latent, x, fp16)
                if y is not None:
                    return y
            return linear(x, self.weight.to(x.dtype))
        parts = self.parts()
        if self.straight_through_fp16 and self.state != SNAPPED:
            parts = self.scheme.rounded(parts)
        return self.scheme.apply(parts, x, self.form)

    def extra_repr(self) -> str:
        rows, columns = self.shape
        options = ", ".join(f"{key}={value}" for key, value in self.spec.items())
        return f"{rows}x{columns}, {self.state}, {options}"

    def _stored(self) -> dict[str, Tensor]:
        return {"indices": self.indices, **{name: getattr(self, name) for name in self.part_names}}

    def _set_parts(self, parts: Mapping[str, Tensor], state: str) -> None:
        for name in self.part_names:
            delattr(self, name)
        self.part_names = tuple(name for name in parts if name != "indices")
        self.state, self.snapped_sets = state, ()
        training = {name for names in self.scheme.trainable.values() for name in names if state == QUANTIZED}
        for name in self.part_names:
            part = parts[name].detach().to(self.indices.device)
            self.register_parameter(name, nn.Parameter(part, requires_grad=name in training))


def fit_parts(scheme: Scheme, weight: Tensor, inputs: Inputs | None, seed: int) -> dict[str, Tensor]:
    """`Scheme.fit` where the weight is, but for Metal, which has no float64.

    Raises:
        StageError: if the weight is not finite.
        ValueError: if `inputs` has another shape or is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise StageError("the weight holds values that are not finite")
    place = "cpu" if weight.device.type == "mps" else weight.device
    parts = scheme.fit(weight.to(place), None if inputs is None else inputs.to(place), seed)
    return {name: part.to(weight.device) for name, part in parts.items()}


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Say which module an error of a fit is about."""
    try:
        yield
    except (StageError, ValueError) as error:
        raise StageError(f"{module}: {error}") from error


def latent_for(scheme: Scheme, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """Latent weights [out, in] that mean the indices of `parts`: `weight` if they are the nearest to it, else Ŵ.

    Fits that feed errors back choose indices that are not the nearest. Latents then start on the grid, all of them: one
    that starts near the edge of its cell would cross it at the first noise, and errors that make up for each other only
    do so together.
    """
    if torch.equal(scheme.assign(parts, weight), parts["indices"]):
        return weight.clone()
    return scheme.dequantize(parts)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantModule]]:
    """(name, module) of every quantized linear and embedding of `model`, in model order.

    A head tied to a quantized embedding is none of its own: `a1q.quant.tied.TiedHead` computes with the embedding's.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            yield name, module
