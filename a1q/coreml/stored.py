"""Are the weights in the packages the model's own, bit for bit?

Logits over a hundred tokens hardly notice one wrong entry among thousands of tables, or a row of the embedding that no
token asks for. So every index, table, integer, scale and fp16 weight is compared with the model's, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle
    from a1q.coreml.operations import Array
    from a1q.coreml.weights import DecoderWeights, Linear

CONSTEXPR = {"indices": "indices", "lut": "lut", "data": "codes", "scale": "scale", "offset": "zero"}
"""Inputs of operations that hold a compressed weight -> the ending of the constant's name."""
NAMED = 3
"""So many differing modules are named."""


def differences(bundle: Bundle, weights: DecoderWeights) -> list[str]:
    """What the packages hold otherwise than the model, one sentence each; empty where all is equal."""
    wrong, missing = unequal(bundle, weights)
    bad = [f"{name} ({count:,} numbers)" for name, count in wrong.items() if count]
    sentences = []
    for what, names in (("differ from the model's", bad), ("are in no package", missing)):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            sentences.append(f"weights that {what}: {', '.join(names[:NAMED])}{more}")
    return sentences


def unequal(bundle: Bundle, weights: DecoderWeights) -> tuple[dict[str, int], list[str]]:
    """(numbers that differ by constant; constants that are nowhere)."""
    matrices = _matrices(weights, len(bundle.meta["outputs"]))
    expected = {
        f"{name}_{ending}": array for name, matrix in matrices.items() for ending, array in stored(matrix).items()
    }
    wrong: dict[str, int] = {}
    compared: dict[tuple[str, int], Any] = {}  # functions share what they hold; kept, as ids of dead arrays come again
    for part in bundle.packages:
        for function in bundle.packages[part].program.functions.values():
            for name, value in _constants(function):
                if name in expected and (name, id(value)) not in compared:
                    compared[name, id(value)] = value
                    wrong[name] = wrong.get(name, 0) + _unequal(expected[name], value)
    # An embedding that is there in parts need not be there whole; its parts are looked for by themselves.
    whole = {f"embedding_{ending}" for ending in stored(weights.embedding)}
    spared = whole if not whole & wrong.keys() and len(bundle.meta["outputs"]) > 1 and weights.tied else set()
    return wrong, [name for name in expected if name not in wrong and name not in spared]


def stored(matrix: Linear) -> dict[str, Array]:
    """A matrix's constants by the ending of their names, in the order in which they are stored. Biases are left out,
    as those of the projections to the residual stream are stored in its scale."""
    found: dict[str, Array] = {}
    if matrix.palette is not None:
        found = {"indices": matrix.palette.indices, "lut": matrix.palette.lut}
    elif matrix.blocks is not None:
        found = {"codes": matrix.blocks.codes, "scale": matrix.blocks.scale, "zero": matrix.blocks.zero}
    elif matrix.dense is not None:
        found = {"weight": matrix.dense}
    scales = (("a", matrix.a, matrix.a_palettes), ("b", None if matrix.b is None else matrix.b.T, matrix.b_palettes))
    for name, plain, palettes in scales:
        if palettes is not None:
            found |= {f"{name}_indices": palettes.indices, f"{name}_lut": palettes.lut}
        elif plain is not None:
            found[name] = plain
    if matrix.adapter is not None:
        found["lora_A"], found["lora_B"] = matrix.adapter
    return found


def _matrices(weights: DecoderWeights, outputs: int) -> dict[str, Linear]:
    """Every matrix by the name that its constants begin with; a head, and a table it shares, in parts too."""
    found = {name.replace(".", "_"): matrix for name, matrix in weights.linears.items() if name != "lm_head"}
    found["embedding"] = weights.embedding
    head, name = (weights.embedding, "embedding") if weights.tied else (weights.head(), "lm_head")
    size = head.shape[0] // outputs
    if outputs > 1 or not weights.tied:
        found |= {f"{name}_{part + 1}": head.rows(part * size, (part + 1) * size) for part in range(outputs)}
    return found


def _constants(function: Any) -> Iterator[tuple[str, Any]]:
    for operation in function.operations:
        if operation.op_type == "const":
            yield operation.outputs[0].name, operation.outputs[0].val
        elif operation.op_type.startswith("constexpr_"):
            base = operation.outputs[0].name.removesuffix("_weight")
            for key, variable in operation.inputs.items():
                if key in CONSTEXPR:
                    yield f"{base}_{CONSTEXPR[key]}", variable.val


def _unequal(expected: Array, value: Any) -> int:
    """How many numbers differ, by their bits."""
    given = np.asarray(value)
    if given.size != expected.size or given.dtype.itemsize != expected.dtype.itemsize:
        return int(expected.size)
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    return int((given.reshape(expected.shape).view(bits) != np.ascontiguousarray(expected).view(bits)).sum())
