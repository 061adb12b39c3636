"""The layout `single`: one package, embedding and head inside.

`infer` takes one token, `prefill` a chunk; both share weights and state, and compute positions, mask and rotation
from the input `position`. With adapter functions, `infer_base` and `prefill_base` are the model without its adapters.
A tied head and the embedding read the same tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.coreml.architecture import MAX_DIMENSION, Architecture, head_parts
from a1q.coreml.layouts import BASE, Options, Part, linear_bytes
from a1q.coreml.toolkit import coremltools

if TYPE_CHECKING:
    from a1q.coreml.weights import DecoderWeights

STATE = "kv_cache"
"""Name of the package's state."""
PACKAGE = "model.mlpackage"


def problems(config: Mapping[str, Any], options: Options, step: int) -> list[str]:
    """See `a1q.coreml.layouts.Layout`."""
    vocabulary = int(config["vocab_size"])
    if options.chunks not in (None, 1):
        return ["`chunks` divides the layers of layout `anemll`; `single` is one package"]
    return head_problems(vocabulary, options.head_parts or head_parts(vocabulary, step), step)


def companions(folder: Path, meta: Mapping[str, Any], options: Options) -> None:
    """Nothing: meta.json says it all."""


def parts(architecture: Architecture, weights: DecoderWeights, options: Options) -> list[Part]:
    """The one part of this layout."""
    functions = {"infer": 1, "prefill": options.prefill}
    if options.adapter_functions:
        functions |= {f"{name}{BASE}": positions for name, positions in functions.items()}
    theory = linear_bytes(weights, 0, architecture.layers) + weights.embedding.theory_bits // 8
    theory += 2 * weights.norms["model.norm"].size
    if not weights.tied:
        theory += weights.head().theory_bits // 8

    def build(tick: Callable[[], None]) -> Any:
        return build_program(architecture, weights, options, tick)

    return [Part("model", PACKAGE, "model", functions, (0, architecture.layers), theory, build)]


def outputs(architecture: Architecture, weights: DecoderWeights, options: Options) -> list[str]:
    """Names of the logits' outputs."""
    count = options.head_parts or head_parts(architecture.vocabulary, weights.head().row_step)
    return ["logits"] if count == 1 else [f"logits{part + 1}" for part in range(count)]


def head_problems(vocabulary: int, count: int, step: int) -> list[str]:
    """Why the head can't be cut into `count` parts (0: into any number) whose tables and vectors stay whole."""
    tables = f" of whole groups of {step} channels that share a table or an index" if step > 1 else ""
    if not count:
        return [f"a head of {vocabulary} rows can't be cut into equal parts{tables} of at most {MAX_DIMENSION} rows"]
    if vocabulary % (count * step):
        fitting = [n for n in range(1, 65) if vocabulary % (n * step) == 0 and vocabulary // n <= MAX_DIMENSION]
        near = sorted(sorted(fitting, key=lambda n: abs(n - count))[:4])
        return [
            f"head_parts {count} does not divide a head of {vocabulary} rows into equal parts{tables}; "
            + (f"these do: {', '.join(map(str, near))}" if near else "no number up to 64 does")
        ]
    if vocabulary // count > MAX_DIMENSION:
        least = -(-vocabulary // MAX_DIMENSION)
        return [
            f"head_parts {count} gives {vocabulary // count} rows each; the Neural Engine takes dimensions up to "
            f"{MAX_DIMENSION}, so at least {least} parts"
        ]
    return []


def build_program(
    architecture: Architecture,
    weights: DecoderWeights,
    options: Options,
    tick: Callable[[], None] = lambda: None,
) -> Any:
    """The MIL program (`coremltools.converters.mil.mil.Program`)."""
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    mb.name_count.clear()  # names of operations count up for the whole process; a package must not depend on that
    program = Program()
    for part in parts(architecture, weights, options):
        for name, positions in part.functions.items():
            shapes = {"input_ids": (1, positions), "position": (1,)} | ({"last": (1,)} if positions > 1 else {})
            inputs = {key: Placeholder(sym_shape=shape, dtype=types.int32, name=key) for key, shape in shapes.items()}
            state = (2 * architecture.layers, architecture.kv_heads, options.context, architecture.head_dim)
            inputs[STATE] = StateTensorPlaceholder(sym_shape=state, dtype=types.fp16, name=STATE)
            chosen = weights.without_adapters() if name.endswith(BASE) else weights
            with Function(inputs, opset_version=ct.target.iOS18) as function:
                results = _emit(architecture, chosen, options, positions, function.inputs, tick)
                function.set_outputs(results)
            program.add_function(name, function)
    program.default_function_name = "infer"
    program.export_as_multifunction = True
    return program


def _emit(
    architecture: Architecture,
    weights: DecoderWeights,
    options: Options,
    positions: int,
    inputs: Any,
    tick: Callable[[], None],
) -> list[Any]:
    """The operations of one function; returns its outputs."""
    from coremltools.converters.mil import Builder as mb

    from a1q.coreml.decoder import Decoder, Frame

    names = outputs(architecture, weights, options)
    decoder = Decoder(architecture, weights, positions, options.context, len(names), options.residual_scale, tick=tick)
    x = decoder.embed(inputs["input_ids"])
    start = inputs["position"]
    offsets = np.arange(positions, dtype=np.int32).reshape(1, 1, -1, 1)
    rows = mb.add(x=mb.reshape(x=start, shape=[1, 1, 1, 1]), y=offsets)
    frame = Frame(
        state=inputs[STATE],
        cache=mb.read_state(input=inputs[STATE]),
        start=start,
        end=mb.add(x=start, y=np.array([positions], np.int32)),
        rotations=decoder.rotations(rows),
        masks=decoder.masks(rows),
    )
    x = decoder.layers(x, 0, architecture.layers, frame)
    if positions > 1:
        x = _select(x, inputs["last"], positions)
    return decoder.head(decoder.final_norm(x), names)


def _select(x: Any, last: Any, positions: int) -> Any:
    """The position `last` of (1, hidden, 1, S), by a product with a one-hot row, which the Neural Engine can do."""
    from coremltools.converters.mil import Builder as mb

    offsets = np.arange(positions, dtype=np.int32).reshape(1, 1, 1, -1)
    chosen = mb.equal(x=mb.reshape(x=last, shape=[1, 1, 1, 1]), y=offsets)
    return mb.reduce_sum(x=mb.mul(x=x, y=mb.cast(x=chosen, dtype="fp16")), axes=[3], keep_dims=True)
