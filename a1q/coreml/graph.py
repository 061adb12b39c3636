"""The decoder as a MIL program with two functions, `infer` (one position) and `prefill` (a chunk), that share weights.

Activations are (1, channels, 1, positions), projections 1x1 convolutions, shapes static, numbers fp16, and the
keys and values of all layers one state (2 * layers, kv heads, context, head_dim): keys of layer i at i, values at
layers + i. Positions, mask and rotation are computed inside from the input `position`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from a1q.coreml.architecture import STATE, Architecture, head_parts
from a1q.coreml.linear import constant, linear
from a1q.coreml.toolkit import coremltools
from a1q.coreml.weights import DecoderWeights

MASKED = 40000.0
"""Subtracted from the scores of hidden positions: large, finite, exact in fp16."""
SMALLEST_EPSILON = 2.0**-24
"""The smallest positive fp16 number."""


@dataclass(frozen=True)
class Layout:
    """The static shapes of a package."""

    context: int
    """Positions that the cache holds."""
    chunk: int
    """Positions that `prefill` takes at once."""
    head_parts: int
    """Outputs over which the vocabulary is divided."""

    @property
    def functions(self) -> dict[str, int]:
        """Positions per call, by function name."""
        return {"infer": 1, "prefill": self.chunk}

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return ["logits"] if self.head_parts == 1 else [f"logits{part + 1}" for part in range(self.head_parts)]


def layout_of(weights: DecoderWeights, vocabulary: int, context: int, chunk: int) -> Layout:
    """The layout of these weights: how many parts the head needs."""
    palette = weights.head().palette
    step = 1 if palette is None or len(palette.lut) == 1 else palette.rows_per_table
    return Layout(context, chunk, head_parts(vocabulary, step))


def head_is_table(weights: DecoderWeights, layout: Layout) -> bool:
    """Whether the head reads the embedding's own table: it is tied and in one part."""
    return "lm_head" not in weights.linears and layout.head_parts == 1


def build_program(
    architecture: Architecture,
    weights: DecoderWeights,
    layout: Layout,
    tick: Callable[[], None] = lambda: None,
) -> Any:
    """The MIL program (`coremltools.converters.mil.mil.Program`); `tick` is called after every layer of a function."""
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    mb.name_count.clear()  # names of operations count up for the whole process; a package must not depend on that
    program = Program()
    for name, positions in layout.functions.items():
        shapes = {"input_ids": (1, positions), "position": (1,)} | ({"last": (1,)} if positions > 1 else {})
        inputs = {key: Placeholder(sym_shape=shape, dtype=types.int32, name=key) for key, shape in shapes.items()}
        state = (2 * architecture.layers, architecture.kv_heads, layout.context, architecture.head_dim)
        inputs[STATE] = StateTensorPlaceholder(sym_shape=state, dtype=types.fp16, name=STATE)
        with Function(inputs, opset_version=ct.target.iOS18) as function:
            function.set_outputs(_Decoder(architecture, weights, layout, positions, tick).build(function.inputs))
        program.add_function(name, function)
    program.default_function_name = "infer"
    program.export_as_multifunction = True
    return program


class _Decoder:
    """Emits one function."""

    def __init__(
        self,
        architecture: Architecture,
        weights: DecoderWeights,
        layout: Layout,
        positions: int,
        tick: Callable[[], None],
    ):
        self.tick = tick
        self.architecture = architecture
        self.weights = weights
        self.layout = layout
        self.positions = positions

    def build(self, inputs: Any) -> list[Any]:
        """Emit the whole function; returns its outputs."""
        from coremltools.converters.mil import Builder as mb

        table = constant("embedding", self.weights.embedding)
        x = mb.gather(x=table, indices=inputs["input_ids"], axis=0, validate_indices=False)
        x = mb.transpose(x=mb.expand_dims(x=x, axes=[1]), perm=[0, 3, 1, 2])
        self.start = inputs["position"]
        self.end = mb.add(x=self.start, y=np.array([self.positions], np.int32))
        self.rotation, self.mask = self._rotation_and_mask()
        self.state = inputs[STATE]
        self.cache = mb.read_state(input=self.state)  # once: a second read would be merged with it and be stale
        for index in range(self.architecture.layers):
            x = mb.add(x=x, y=self._attention(x, index))
            x = mb.add(x=x, y=self._mlp(x, index))
            self.tick()
        if self.positions > 1:
            x = self._select(x, inputs["last"])
        return self._head(self._norm(x, "model.norm", axis=1), table)

    def _rotation_and_mask(self) -> tuple[tuple[Any, Any], Any]:
        """(cos, signed sin), each (1, 1, S, head_dim), and the mask (1, 1, group * S, context)."""
        from coremltools.converters.mil import Builder as mb

        size, half = self.architecture.head_dim, self.architecture.head_dim // 2
        offsets = np.arange(self.positions, dtype=np.int32).reshape(1, 1, -1, 1)
        rows = mb.add(x=mb.reshape(x=self.start, shape=[1, 1, 1, 1]), y=offsets)
        frequency = self.architecture.rope_theta ** (-np.arange(half, dtype=np.float64) * 2 / size)
        # The angle stays fp32: fp16 could not tell positions above 2048 apart.
        angle = mb.mul(x=mb.cast(x=rows, dtype="fp32"), y=np.float32(frequency).reshape(1, 1, 1, -1))
        cos, sin = (mb.cast(x=wave(x=angle), dtype="fp16") for wave in (mb.cos, mb.sin))
        sin = mb.concat(values=[mb.mul(x=sin, y=np.float16(-1)), sin], axis=3)
        cos = mb.concat(values=[cos, cos], axis=3)

        columns = constant("columns", np.arange(self.layout.context, dtype=np.int32).reshape(1, 1, 1, -1))
        visible = mb.cast(x=mb.less_equal(x=columns, y=rows), dtype="fp16")
        mask = mb.mul(x=mb.sub(x=visible, y=np.float16(1)), y=np.float16(MASKED))
        if self.architecture.group > 1:
            mask = mb.concat(values=[mask] * self.architecture.group, axis=2)
        return (cos, sin), mask

    def _norm(self, x: Any, name: str, axis: int, factor: float = 1.0) -> Any:
        """RMSNorm along `axis` as LayerNorm over (x, -x), whose mean is 0: squares of x never leave the operation,
        which in fp16 would overflow at activations near 256."""
        from coremltools.converters.mil import Builder as mb

        gain = self.weights.norms[name] * factor
        both = mb.concat(values=[x, mb.mul(x=x, y=np.float16(-1))], axis=axis)
        gamma = constant(name.replace(".", "_"), np.concatenate([gain, gain]).astype(np.float16))
        epsilon = np.float16(max(self.architecture.rms_eps, SMALLEST_EPSILON))
        both = mb.layer_norm(x=both, axes=[axis], gamma=gamma, epsilon=epsilon)
        size = [*x.shape]
        return mb.slice_by_size(x=both, begin=[0] * len(size), size=size)

    def _linear(self, x: Any, name: str) -> Any:
        return linear(x, self.weights.linears[name], name.replace(".", "_"))

    def _attention(self, x: Any, index: int) -> Any:
        from coremltools.converters.mil import Builder as mb

        spec, prefix = self.architecture, f"model.layers.{index}.self_attn"
        x = self._norm(x, f"model.layers.{index}.input_layernorm", axis=1)
        query = self._heads(self._linear(x, f"{prefix}.q_proj"), spec.heads)
        key = self._heads(self._linear(x, f"{prefix}.k_proj"), spec.kv_heads)
        value = self._heads(self._linear(x, f"{prefix}.v_proj"), spec.kv_heads)
        scale = spec.head_dim**-0.5
        if spec.qk_norm:
            query = self._norm(query, f"{prefix}.q_norm", axis=3, factor=scale)
            key = self._norm(key, f"{prefix}.k_norm", axis=3)
        else:
            query = mb.mul(x=query, y=np.float16(scale))
        keys = self._remember(self._rotate(key), index)
        values = self._remember(value, spec.layers + index)

        # Query heads of one group become rows of one matrix product, so that keys and values are not repeated.
        rows = spec.group * self.positions
        query = mb.reshape(x=self._rotate(query), shape=[1, spec.kv_heads, rows, spec.head_dim])
        scores = mb.add(x=mb.matmul(x=query, y=keys, transpose_y=True), y=self.mask)
        mixed = mb.matmul(x=mb.softmax(x=scores, axis=-1), y=values)
        mixed = mb.reshape(x=mixed, shape=[1, spec.heads, self.positions, spec.head_dim])
        mixed = mb.transpose(x=mixed, perm=[0, 1, 3, 2])
        mixed = mb.reshape(x=mixed, shape=[1, spec.heads * spec.head_dim, 1, self.positions])
        return self._linear(mixed, f"{prefix}.o_proj")

    def _heads(self, x: Any, heads: int) -> Any:
        """(1, heads * head_dim, 1, S) -> (1, heads, S, head_dim)."""
        from coremltools.converters.mil import Builder as mb

        x = mb.reshape(x=x, shape=[1, heads, self.architecture.head_dim, self.positions])
        return mb.transpose(x=x, perm=[0, 1, 3, 2])

    def _rotate(self, x: Any) -> Any:
        """Rotary positions on (1, heads, S, head_dim): x * cos + (second half, first half) * (-sin, sin)."""
        from coremltools.converters.mil import Builder as mb

        cos, sin = self.rotation
        first, second = mb.split(x=x, num_splits=2, axis=3)
        return mb.add(x=mb.mul(x=x, y=cos), y=mb.mul(x=mb.concat(values=[second, first], axis=3), y=sin))

    def _remember(self, x: Any, slot: int) -> Any:
        """Write (1, kv heads, S, head_dim) at the current positions of a cache slot; returns the whole slot."""
        from coremltools.converters.mil import Builder as mb

        spec = self.architecture
        begin = mb.concat(values=[np.array([slot, 0], np.int32), self.start, np.array([0], np.int32)], axis=0)
        end = mb.concat(
            values=[np.array([slot + 1, spec.kv_heads], np.int32), self.end, np.array([spec.head_dim], np.int32)],
            axis=0,
        )
        updated = mb.slice_update(x=self.cache, update=x, begin=begin, end=end)
        self.cache = mb.coreml_update_state(state=self.state, value=updated)
        size = [1, spec.kv_heads, self.layout.context, spec.head_dim]
        return mb.slice_by_size(x=self.cache, begin=[slot, 0, 0, 0], size=size)

    def _mlp(self, x: Any, index: int) -> Any:
        from coremltools.converters.mil import Builder as mb

        prefix = f"model.layers.{index}.mlp"
        x = self._norm(x, f"model.layers.{index}.post_attention_layernorm", axis=1)
        gate = mb.silu(x=self._linear(x, f"{prefix}.gate_proj"))
        return self._linear(mb.mul(x=gate, y=self._linear(x, f"{prefix}.up_proj")), f"{prefix}.down_proj")

    def _select(self, x: Any, last: Any) -> Any:
        """The position `last` of (1, hidden, 1, S), by a product with a one-hot row, which the Neural Engine can do."""
        from coremltools.converters.mil import Builder as mb

        offsets = np.arange(self.positions, dtype=np.int32).reshape(1, 1, 1, -1)
        chosen = mb.equal(x=mb.reshape(x=last, shape=[1, 1, 1, 1]), y=offsets)
        return mb.reduce_sum(x=mb.mul(x=x, y=mb.cast(x=chosen, dtype="fp16")), axes=[3], keep_dims=True)

    def _head(self, x: Any, table: Any) -> list[Any]:
        """Logits (1, 1, vocabulary / parts) of (1, hidden, 1, 1)."""
        from coremltools.converters.mil import Builder as mb

        names, vocabulary = self.layout.outputs, self.architecture.vocabulary
        if head_is_table(self.weights, self.layout):
            x = mb.reshape(x=x, shape=[1, 1, self.architecture.hidden])
            return [mb.linear(x=x, weight=table, name=names[0])]
        head = self.weights.head()
        size = vocabulary // len(names)
        outputs = []
        for part, name in enumerate(names):
            logits = linear(x, head.rows(part * size, (part + 1) * size), f"lm_head_{part + 1}")
            outputs.append(mb.reshape(x=logits, shape=[1, 1, size], name=name))
        return outputs
