"""The MIL programs of the three kinds of packages. Hidden states go between them as fp16 (1, positions, hidden).

The apps hide positions with a mask of 0 and -inf. Before anything is added to it or multiplied with it, -inf becomes
-40000, so that no NaN can come of it, and what the decoder itself knows to be hidden stays hidden: the Swift apps show
`infer` one position too many, the one that comes next, which holds nothing or what padding left there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.coreml.anemll.names import STATE
from a1q.coreml.architecture import Architecture
from a1q.coreml.layouts import BASE, Options
from a1q.coreml.toolkit import coremltools

if TYPE_CHECKING:
    from a1q.coreml.weights import DecoderWeights

Tick = Callable[[], None]


def embeddings_program(architecture: Architecture, weights: DecoderWeights, options: Options) -> Any:
    """`input_ids` int32 (1, 1) or (1, prefill) -> `hidden_states`, scaled as the first layer takes them.

    Ids outside the vocabulary become its ends: the apps leave the padding of the last chunk uninitialised, and a row
    of arbitrary memory could hold NaN, which no mask hides.
    """
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.input_types import EnumeratedShapes, TensorType
    from coremltools.converters.mil.mil import Function, Placeholder, get_new_symbol, types

    from a1q.coreml.decoder import Decoder

    shapes = EnumeratedShapes(sorted({(1, 1), (1, options.prefill)}), default=(1, 1))
    ids = Placeholder(sym_shape=(1, get_new_symbol()), dtype=types.int32, name="input_ids")
    program = _new_program()
    with Function({"input_ids": ids}, opset_version=ct.target.iOS18) as function:
        known = mb.minimum(
            x=mb.maximum(x=function.inputs["input_ids"], y=np.int32(0)), y=np.int32(architecture.vocabulary - 1)
        )
        decoder = Decoder(
            architecture, weights, options.prefill, options.context, residual_scale=options.residual_scale
        )
        function.set_outputs([_outgoing(decoder.embed(known), "hidden_states")])
        function.set_input_types((TensorType("input_ids", shape=shapes, dtype=np.int32),))
    program.add_function("main", function)
    return program


def layers_program(
    architecture: Architecture,
    weights: DecoderWeights,
    options: Options,
    functions: Mapping[str, int],
    begin: int,
    end: int,
    tick: Tick,
) -> Any:
    """Layers `begin` to `end` (excluded) as functions that share weights and write one cache of the whole model.

    `hidden_states` fp16 (1, S, hidden), `position_ids` int32 (S), `causal_mask` fp16 (1, 1, S, context) and
    `current_pos` int32 (1) -> `output_hidden_states` (1, S, hidden). The last chunk normalises in `infer`. In
    `prefill`, where only the cache counts, it gives the first position alone and as it is.
    """
    ct = coremltools()
    from coremltools.converters.mil.mil import Function, Placeholder, types
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    program = _new_program("infer")
    for name, positions in functions.items():
        shapes = {
            "hidden_states": ((1, positions, architecture.hidden), types.fp16),
            "position_ids": ((positions,), types.int32),
            "causal_mask": ((1, 1, positions, options.context), types.fp16),
            "current_pos": ((1,), types.int32),
        }
        inputs = {key: Placeholder(sym_shape=shape, dtype=kind, name=key) for key, (shape, kind) in shapes.items()}
        state = (2 * architecture.layers, architecture.kv_heads, options.context, architecture.head_dim)
        inputs[STATE] = StateTensorPlaceholder(sym_shape=state, dtype=types.fp16, name=STATE)
        chosen = weights.without_adapters() if name.endswith(BASE) else weights
        with Function(inputs, opset_version=ct.target.iOS18) as function:
            output = _layers(architecture, chosen, options, positions, begin, end, function.inputs, tick)
            function.set_outputs([output])
        program.add_function(name, function)
    return program


def head_program(
    architecture: Architecture,
    weights: DecoderWeights,
    options: Options,
    functions: Mapping[str, int],
    outputs: list[str],
) -> Any:
    """`hidden_states` fp16 (1, 1, hidden), normalised -> one part of the vocabulary per output, (1, 1, rows) each."""
    ct = coremltools()
    from coremltools.converters.mil.mil import Function, Placeholder, types

    from a1q.coreml.decoder import Decoder

    program = _new_program(next(iter(functions)), many=len(functions) > 1)
    for name in functions:
        states = Placeholder(sym_shape=(1, 1, architecture.hidden), dtype=types.fp16, name="hidden_states")
        chosen = weights.without_adapters() if name.endswith(BASE) else weights
        with Function({"hidden_states": states}, opset_version=ct.target.iOS18) as function:
            decoder = Decoder(architecture, chosen, 1, options.context, len(outputs))
            function.set_outputs(decoder.head(_incoming(function.inputs["hidden_states"]), outputs))
        program.add_function(name, function)
    return program


def _layers(
    architecture: Architecture,
    weights: DecoderWeights,
    options: Options,
    positions: int,
    begin: int,
    end: int,
    inputs: Any,
    tick: Tick,
) -> Any:
    """The operations of one function; returns its output."""
    from coremltools.converters.mil import Builder as mb

    from a1q.coreml.decoder import Decoder, Frame

    decoder = Decoder(
        architecture, weights, positions, options.context, residual_scale=options.residual_scale, tick=tick
    )
    start = inputs["current_pos"]
    rows = mb.reshape(x=inputs["position_ids"], shape=[1, 1, positions, 1])
    frame = Frame(
        state=inputs[STATE],
        cache=mb.read_state(input=inputs[STATE]),
        start=start,
        end=mb.add(x=start, y=np.array([positions], np.int32)),
        rotations=decoder.rotations(rows),
        masks=_masks(decoder, rows, inputs["causal_mask"]),
    )
    x = decoder.layers(_incoming(inputs["hidden_states"]), begin, end, frame)
    if end == architecture.layers:
        if positions == 1:
            x = decoder.final_norm(x)
        else:
            x = mb.slice_by_size(x=x, begin=[0, 0, 0, 0], size=[1, architecture.hidden, 1, 1])
    return _outgoing(x, "output_hidden_states")


def _masks(decoder: Any, rows: Any, given: Any) -> dict[str, Any]:
    """What is added to scores per kind of layer: hidden is what the app hides and what the decoder hides."""
    from coremltools.converters.mil import Builder as mb

    from a1q.coreml.decoder import MASKED

    group = decoder.architecture.group
    finite = mb.maximum(x=given, y=np.float16(-MASKED))
    if group > 1:
        finite = mb.concat(values=[finite] * group, axis=2)
    return {kind: mb.minimum(x=own, y=finite) for kind, own in decoder.masks(rows).items()}


def _incoming(x: Any) -> Any:
    """(1, S, hidden) -> (1, hidden, 1, S)."""
    from coremltools.converters.mil import Builder as mb

    return mb.expand_dims(x=mb.transpose(x=x, perm=[0, 2, 1]), axes=[2])


def _outgoing(x: Any, name: str) -> Any:
    """(1, hidden, 1, S) -> the output (1, S, hidden)."""
    from coremltools.converters.mil import Builder as mb

    return mb.transpose(x=mb.squeeze(x=x, axes=[2]), perm=[0, 2, 1], name=name)


def _new_program(default: str = "main", many: bool = True) -> Any:
    """An empty program; `main` is the one function of a program that has no others."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Program

    mb.name_count.clear()  # names of operations count up for the whole process; a package must not depend on that
    program = Program()
    program.default_function_name = default
    program.export_as_multifunction = many and default != "main"
    return program
