"""What a quantization scheme is. Adding one touches `a1q/quant/schemes/NAME.py` and its schema, nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.importance import Inputs

Shape = tuple[int, int]


@dataclass(frozen=True)
class FactorPalettes:
    """The factors of a low-rank scale as palettes: a column of A and a row of B are entries of a table per rank."""

    a_indices: Tensor
    """uint8 [out, r]."""
    a_lut: Tensor
    """float16 [r, 2**n]."""
    b_indices: Tensor
    """uint8 [r, in]."""
    b_lut: Tensor
    """float16 [r, 2**n]."""


@dataclass(frozen=True)
class Palettized:
    """A snapped weight as look-up tables and scales: Ŵ = LUT[idx], or Ŵ = LUT[idx] ⊙ (A B)."""

    indices: Tensor
    """uint8 [out, in]; [out / d, in] where each stands for d consecutive rows."""
    lut: Tensor
    """float16 [tables, 2**bits]; each table serves out / tables consecutive rows. Vectors: [1, 2**bits, d]."""
    a: Tensor | None = None
    """float16 [out, r]."""
    b: Tensor | None = None
    """float16 [r, in]; None with `a` there means rank 1 and ones."""
    factors: FactorPalettes | None = None
    """What `a` and `b` are to be stored as, where they are palettes."""


@dataclass(frozen=True)
class Blockwise:
    """A snapped weight as integers with a scale and a zero point per block: Ŵ = scale * (q - zero)."""

    codes: Tensor
    """uint8 [out, in], values below 2**bits."""
    bits: int
    """4 or 8."""
    scale: Tensor
    """float16 [out, groups]; a block is in / groups consecutive inputs of a row."""
    zero: Tensor
    """uint8 [out, groups], values below 2**bits."""


@dataclass(frozen=True)
class TableForm:
    """A weight of tables between scales: Ŵ[i, k] = Σ_j rows[i, j] (T[indices[i, k]] + shift[i]) columns[j, k].

    What a CPU multiplies quickly (`a1q.quant.compact`). All numbers are floating point, of parts that train too.
    """

    indices: Tensor
    """uint8 [out, in]."""
    tables: Tensor
    """[n, L]; each serves out / n consecutive rows, or with `interleaved` every n-th row."""
    interleaved: bool = False
    rows: Tensor | None = None
    """[out, r]; ones if None."""
    columns: Tensor | None = None
    """[r, in]; ones if None."""
    shift: Tensor | None = None
    """[out]; zeros if None."""


class Scheme(ABC):
    """A way to say a weight [out, in] with few bits.

    A weight is described by *parts*: named tensors, among them `indices` (uint8 [out, in], values < 2**index_bits;
    [out / d, in] where `vector` is d).
    Everything but `indices` and other `integers` may train. torch is imported only inside methods.
    """

    version: ClassVar[int] = 1
    Config: ClassVar[type]
    schema: ClassVar[Mapping[str, Any] | None] = None
    """Inline schema, for plug-ins outside this package only."""
    integers: tuple[str, ...] = ("indices",)
    """Parts that are uint8 below 2**width, stored packed; all others are floating point. A state may lack some."""
    trainable: Mapping[str, tuple[str, ...]]
    """Set name (`scales`, `magnitudes`, `lut`) -> the parts it trains; set by `__init__`, as it may hang on the config.
    `weights` is always the latent weight."""

    def __init__(self, config: Any):
        self.config = config

    @property
    def vector(self) -> int:
        """Consecutive rows that one index stands for."""
        return 1

    @property
    def index_bits(self) -> int:
        """The width of stored indices."""
        return int(self.config.bits * self.vector)

    def width(self, part: str) -> int:
        """The width of one of the stored `integers`."""
        return self.index_bits

    @property
    def details(self) -> str:
        """What the size depends on beside the bits, in a few words for plans: `rank 2`, `a scale per channel`."""
        return ""

    @property
    def hardware(self) -> str:
        """How `hardware_form` says the weight: `palette`, `blockwise`, or empty where a scheme has no such form."""
        return ""

    @property
    def forms(self) -> tuple[str, ...]:
        """The ways in which `apply` computes the product; `factored` and `batched` take the scale apart by ranks."""
        return ("dense",)

    # -- without torch -------------------------------------------------------------------------------------
    @abstractmethod
    def check(self, shape: Shape) -> list[str]:
        """Say why a weight of this shape can't have this scheme; empty when it can."""

    @abstractmethod
    def bits(self, shape: Shape) -> int:
        """Bits of storage after snap: `integers` in their own width, LUTs and every scale in fp16."""

    @abstractmethod
    def part_shapes(self, shape: Shape, snapped: bool = False) -> dict[str, tuple[int, ...]]:
        """Shape of every part but `indices`."""

    # -- with torch ----------------------------------------------------------------------------------------
    @abstractmethod
    def fit(self, weight: Tensor, inputs: Inputs | None, seed: int) -> dict[str, Tensor]:
        """Fit the parts to `weight` [out, in], errors weighted by what is known of its inputs.

        Raises:
            ValueError: if `inputs` holds NaN, infinite or negative values, or does not fit the weight's shape.
        """

    @abstractmethod
    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight [out, in] that the parts say, in float32 (exact reference; snapped parts included)."""

    @abstractmethod
    def weight(self, parts: Mapping[str, Tensor], latent: Tensor | None, fp16: bool) -> Tensor:
        """The weight used in a forward pass, differentiable by the parts and straight-through by `latent`.

        With a latent, indices are derived anew from it; without, `parts["indices"]` stand. With `fp16`, every
        factor is rounded to fp16 going forward with the identity as gradient, so that training sees what
        fp16 hardware will compute.
        """

    @abstractmethod
    def assign(self, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """`indices` of the entries nearest to `weight` on the grid that `parts` span."""

    @abstractmethod
    def snap(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts as stored for good: fp16, rounded on the CPU (fp16 rounding differs between devices)."""

    def select_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor] | None:
        """Parts of the weight that has only `rows` (int64 [n]) of this one, differentiable by `parts`.

        Where `vector` is d, rows come d at a time: all those of one vector after another.

        `weight` and `dequantize` make of them what they make of the whole weight's rows, up to the rounding of a
        matrix product. None, the default, where a scheme can't say rows by themselves: look-ups then make the
        whole weight.
        """
        return None

    def hardware_form(self, parts: Mapping[str, Tensor]) -> Palettized | Blockwise:
        """Snapped parts in the form that exporters for hardware store, exactly the weight that `dequantize` gives.

        Raises:
            NotImplementedError: if `hardware` is empty.
        """
        raise NotImplementedError(f"{type(self).__name__} has no hardware form")

    def table_form(self, parts: Mapping[str, Tensor]) -> TableForm | None:
        """The weight that `dequantize` gives as tables and scales; None, the default, where it is nothing so simple."""
        return None

    def rounded(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts as `weight` sees them with `fp16`, in their own types; here every part rounded by itself.

        The gradient of rounding is the identity.
        """
        from a1q.quant.straight_through import rounded_through

        return {name: part if name in self.integers else rounded_through(part) for name, part in parts.items()}

    def product(self, parts: Mapping[str, Tensor], latent: Tensor | None, x: Tensor, fp16: bool) -> Tensor | None:
        """x [..., in] times the transposed weight, [..., out], differentiable by x, `latent` and `parts` that train.

        For training: without the weight as a tensor that outlives the call. None, the default, where a scheme leaves no
        such way: `weight` then makes it.
        """
        return None

    def apply(self, parts: Mapping[str, Tensor], x: Tensor, form: str) -> Tensor:
        """x [..., in] times the transposed weight, [..., out], without a bias: one function in several forms.

        `dense` multiplies by the dequantized weight. A scheme with scales adds `factored` and `batched`, the ways a
        Neural Engine computes it; a scheme without them computes all forms alike.
        """
        from torch.nn.functional import linear

        return linear(x, self.dequantize(parts).to(x.dtype))
