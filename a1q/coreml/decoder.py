"""Emit a decoder's operations into the current MIL function, one class for every family and layout.

Activations are (1, channels, 1, positions), projections 1x1 convolutions, shapes static, numbers fp16, and the
keys and values of all layers one state (2 * layers, kv heads, context, head_dim): keys of layer i at i, values at
layers + i. A layout makes the inputs and outputs and calls `embed`, `layers`, `final_norm` and `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from a1q.coreml.architecture import SLIDING, Architecture
from a1q.coreml.linear import Matrix, constant, linear
from a1q.coreml.weights import DecoderWeights

MASKED = 40000.0
"""Subtracted from the scores of hidden positions: large, finite, exact in fp16."""
SMALLEST_EPSILON = 2.0**-24
"""The smallest positive fp16 number."""


@dataclass
class Frame:
    """What layers need to know of one call: the cache, where to write, what may be seen, how to rotate."""

    state: Any
    """The state's placeholder."""
    cache: Any
    """The state as read: once per function, for a second read would be merged with it and be stale. Layers put
    here what they have written, and whoever reads later takes it from here."""
    start: Any
    """int32 [1]: the first position written."""
    end: Any
    """int32 [1]: one after the last."""
    rotations: Mapping[str, tuple[Any, Any]]
    """Layer kind -> (cos, signed sin), each (1, 1, S, head_dim)."""
    masks: Mapping[str, Any]
    """Layer kind -> what is added to scores, (1, 1, group * S, context)."""


class Decoder:
    """One function's worth of operations.

    Args:
        positions: S, positions per call.
        context: positions that the cache holds.
        parts: into how many parts of equal size the head is cut.
        residual_scale: factor of the residual stream, for models whose activations do not fit fp16. What is added to
            the stream shrinks with it, norms undo it, so the function stays the same.
        tick: called after every layer.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: DecoderWeights,
        positions: int,
        context: int,
        parts: int = 1,
        residual_scale: float = 1.0,
        tick: Callable[[], None] = lambda: None,
    ):
        self.architecture = architecture
        self.weights = weights
        self.positions = positions
        self.context = context
        self.parts = parts
        self.residual_scale = residual_scale
        self.tick = tick
        self._embedding: list[Matrix] = []

    # -- positions -------------------------------------------------------------------------------------------
    def rotations(self, rows: Any) -> dict[str, tuple[Any, Any]]:
        """(cos, signed sin) per kind of layer, from positions int32 (1, 1, S, 1)."""
        from coremltools.converters.mil import Builder as mb

        # The angle stays fp32: fp16 could not tell positions above 2048 apart.
        places = mb.cast(x=rows, dtype="fp32")
        found = {}
        for kind, (frequency, factor) in self.weights.rotations.items():
            angle = mb.mul(x=places, y=np.float32(frequency).reshape(1, 1, 1, -1))
            cos, sin = mb.cos(x=angle), mb.sin(x=angle)
            if factor != 1:
                cos, sin = (mb.mul(x=wave, y=np.float32(factor)) for wave in (cos, sin))
            cos, sin = (mb.cast(x=wave, dtype="fp16") for wave in (cos, sin))
            sin = mb.concat(values=[mb.mul(x=sin, y=np.float16(-1)), sin], axis=3)
            found[kind] = mb.concat(values=[cos, cos], axis=3), sin
        return found

    def masks(self, rows: Any) -> dict[str, Any]:
        """What is added to scores, per kind of layer, from positions int32 (1, 1, S, 1)."""
        from coremltools.converters.mil import Builder as mb

        causal = self._hide(mb.less_equal(x=self._columns(), y=rows))
        masks = {}
        for kind in self.architecture.kinds:
            mask = causal
            if kind == SLIDING and self.architecture.window < self.context:
                oldest = mb.sub(x=rows, y=np.int32(self.architecture.window - 1))
                # No position is both ahead and behind the window, so the sum stays at -40000.
                mask = mb.add(x=causal, y=self._hide(mb.greater_equal(x=self._columns(), y=oldest)))
            group = self.architecture.group
            masks[kind] = mask if group == 1 else mb.concat(values=[mask] * group, axis=2)
        return masks

    def _columns(self) -> Any:
        return constant("columns", np.arange(self.context, dtype=np.int32).reshape(1, 1, 1, -1))

    @staticmethod
    def _hide(visible: Any) -> Any:
        """0 where `visible`, -40000 elsewhere."""
        from coremltools.converters.mil import Builder as mb

        return mb.mul(x=mb.sub(x=mb.cast(x=visible, dtype="fp16"), y=np.float16(1)), y=np.float16(MASKED))

    # -- the ends --------------------------------------------------------------------------------------------
    def embed(self, ids: Any) -> Any:
        """Token ids int32 (1, S) -> (1, hidden, 1, S)."""
        from coremltools.converters.mil import Builder as mb

        tables = self._tables(self.parts if self.weights.tied else 1)
        size = self.architecture.vocabulary // len(tables)
        x = None
        for part, table in enumerate(tables):
            if len(tables) == 1:
                x = table.rows(ids)
                continue
            # Every part is asked for a row of its own, and those of other parts are multiplied by zero.
            local = mb.sub(x=ids, y=np.int32(part * size))
            inside = mb.logical_and(x=mb.greater_equal(x=local, y=np.int32(0)), y=mb.less(x=local, y=np.int32(size)))
            local = mb.minimum(x=mb.maximum(x=local, y=np.int32(0)), y=np.int32(size - 1))
            chosen = mb.reshape(x=mb.cast(x=inside, dtype="fp16"), shape=[1, 1, 1, ids.shape[1]])
            found = mb.mul(x=table.rows(local), y=chosen)
            x = found if x is None else mb.add(x=x, y=found)
        factor = self.architecture.embedding_scale * self.residual_scale
        return x if factor == 1 else mb.mul(x=x, y=np.float16(factor))

    def final_norm(self, x: Any) -> Any:
        """The norm before the head; (1, hidden, 1, S) both."""
        return self._norm(x, "model.norm", axis=1, stream=self.residual_scale)

    def head(self, x: Any, names: list[str]) -> list[Any]:
        """Logits (1, S, vocabulary / parts) of (1, hidden, 1, S), one output per part."""
        from coremltools.converters.mil import Builder as mb

        size = self.architecture.vocabulary // len(names)
        if self.weights.tied:
            matrices = self._tables(len(names))
        else:
            head = self.weights.head()
            matrices = [Matrix(head.rows(i * size, (i + 1) * size), f"lm_head_{i + 1}") for i in range(len(names))]
        outputs = []
        for matrix, name in zip(matrices, names, strict=True):
            logits = mb.reshape(x=matrix.times(x), shape=[1, size, x.shape[3]])
            outputs.append(mb.transpose(x=logits, perm=[0, 2, 1], name=name))
        return outputs

    def _tables(self, parts: int) -> list[Matrix]:
        """The embedding in parts of equal size, which look-ups and a tied head share."""
        if len(self._embedding) != parts:
            assert not self._embedding, "embedding and tied head are cut alike"
            table, size = self.weights.embedding, self.architecture.vocabulary // parts
            names = ["embedding"] if parts == 1 else [f"embedding_{part + 1}" for part in range(parts)]
            self._embedding = [
                Matrix(table if parts == 1 else table.rows(i * size, (i + 1) * size), name)
                for i, name in enumerate(names)
            ]
        return self._embedding

    # -- layers ----------------------------------------------------------------------------------------------
    def layers(self, x: Any, begin: int, end: int, frame: Frame) -> Any:
        """Layers `begin` to `end` (excluded) on (1, hidden, 1, S)."""
        from coremltools.converters.mil import Builder as mb

        for index in range(begin, end):
            x = mb.add(x=x, y=self._attention(x, index, frame))
            x = mb.add(x=x, y=self._mlp(x, index))
            self.tick()
        return x

    def _attention(self, x: Any, index: int, frame: Frame) -> Any:
        from coremltools.converters.mil import Builder as mb

        spec, layer = self.architecture, f"model.layers.{index}"
        prefix, kind = f"{layer}.self_attn", spec.layer_kinds[index]
        x = self._norm(x, f"{layer}.input_layernorm", axis=1, stream=self.residual_scale)
        query = self._heads(self._linear(x, f"{prefix}.q_proj"), spec.heads)
        key = self._heads(self._linear(x, f"{prefix}.k_proj"), spec.kv_heads)
        value = self._heads(self._linear(x, f"{prefix}.v_proj"), spec.kv_heads)
        if spec.qk_norm:
            query = self._norm(query, f"{prefix}.q_norm", axis=3, factor=spec.query_scale)
            key = self._norm(key, f"{prefix}.k_norm", axis=3)
        else:
            query = mb.mul(x=query, y=np.float16(spec.query_scale))
        cos, sin = frame.rotations[kind]
        keys = self._remember(self._rotate(key, cos, sin), index, frame)
        values = self._remember(value, spec.layers + index, frame)

        # Query heads of one group become rows of one matrix product, so that keys and values are not repeated.
        rows = spec.group * self.positions
        query = mb.reshape(x=self._rotate(query, cos, sin), shape=[1, spec.kv_heads, rows, spec.head_dim])
        scores = mb.add(x=mb.matmul(x=query, y=keys, transpose_y=True), y=frame.masks[kind])
        mixed = mb.matmul(x=mb.softmax(x=scores, axis=-1), y=values)
        mixed = mb.reshape(x=mixed, shape=[1, spec.heads, self.positions, spec.head_dim])
        mixed = mb.transpose(x=mixed, perm=[0, 1, 3, 2])
        mixed = mb.reshape(x=mixed, shape=[1, spec.heads * spec.head_dim, 1, self.positions])
        return self._added(mixed, f"{prefix}.o_proj", f"{layer}.post_attention_layernorm")

    def _mlp(self, x: Any, index: int) -> Any:
        from coremltools.converters.mil import Builder as mb

        layer = f"model.layers.{index}"
        before = "pre_feedforward_layernorm" if self.architecture.post_norms else "post_attention_layernorm"
        x = self._norm(x, f"{layer}.{before}", axis=1, stream=self.residual_scale)
        gate = self._linear(x, f"{layer}.mlp.gate_proj")
        if self.architecture.activation == "silu":
            gate = mb.silu(x=gate)
        else:
            gate = mb.gelu(x=gate, mode="TANH_APPROXIMATION")
        up = self._shrunk(self._linear(x, f"{layer}.mlp.up_proj"))
        product = mb.mul(x=gate, y=up)
        return self._added(product, f"{layer}.mlp.down_proj", f"{layer}.post_feedforward_layernorm", shrunk=True)

    def _added(self, x: Any, name: str, norm: str, shrunk: bool = False) -> Any:
        """What a projection back to the residual stream adds to it, in the stream's scale."""
        x = x if shrunk else self._shrunk(x)
        weight = self.weights.linears[name]
        if weight.bias is not None and self.residual_scale != 1:
            weight = _with_bias(weight, self.residual_scale)
        y = linear(x, weight, name.replace(".", "_"))
        if not self.architecture.post_norms:
            return y
        return self._norm(y, norm, axis=1, factor=self.residual_scale, stream=self.residual_scale)

    def _shrunk(self, x: Any) -> Any:
        from coremltools.converters.mil import Builder as mb

        return x if self.residual_scale == 1 else mb.mul(x=x, y=np.float16(self.residual_scale))

    def _linear(self, x: Any, name: str) -> Any:
        return linear(x, self.weights.linears[name], name.replace(".", "_"))

    def _norm(self, x: Any, name: str, axis: int, factor: float = 1.0, stream: float = 1.0) -> Any:
        """RMSNorm along `axis` as LayerNorm over (x, -x), whose mean is 0: squares of x never leave the operation,
        which in fp16 would overflow at activations near 256.

        Args:
            factor: of the result.
            stream: the scale x is in; epsilon is a square of x and scales with it.
        """
        from coremltools.converters.mil import Builder as mb

        gain, size = self.weights.norms[name] * factor, [*x.shape]
        values, beyond = [x, mb.mul(x=x, y=np.float16(-1))], np.zeros(0)
        epsilon = self.architecture.rms_eps * stream**2
        if epsilon < SMALLEST_EPSILON:
            # Two channels ±c instead, with c² = n ε: of n + 1 squares the mean is n / (n + 1) (mean of x² + ε).
            count = gain.size
            floor = np.zeros([2 if place == axis else extent for place, extent in enumerate(size)], np.float16)
            np.moveaxis(floor, axis, 0)[:] = np.reshape([1, -1], [2] + [1] * (len(size) - 1)) * (count * epsilon) ** 0.5
            values.append(floor)
            gain, beyond, epsilon = gain * (count / (count + 1)) ** 0.5, np.ones(2), 0.0
        gamma = constant(name.replace(".", "_"), np.concatenate([gain, gain, beyond]).astype(np.float16))
        both = mb.concat(values=values, axis=axis)
        both = mb.layer_norm(x=both, axes=[axis], gamma=gamma, epsilon=np.float16(epsilon))
        return mb.slice_by_size(x=both, begin=[0] * len(size), size=size)

    def _heads(self, x: Any, heads: int) -> Any:
        """(1, heads * head_dim, 1, S) -> (1, heads, S, head_dim)."""
        from coremltools.converters.mil import Builder as mb

        x = mb.reshape(x=x, shape=[1, heads, self.architecture.head_dim, self.positions])
        return mb.transpose(x=x, perm=[0, 1, 3, 2])

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        """Rotary positions on (1, heads, S, head_dim): x * cos + (second half, first half) * (-sin, sin)."""
        from coremltools.converters.mil import Builder as mb

        first, second = mb.split(x=x, num_splits=2, axis=3)
        return mb.add(x=mb.mul(x=x, y=cos), y=mb.mul(x=mb.concat(values=[second, first], axis=3), y=sin))

    def _remember(self, x: Any, slot: int, frame: Frame) -> Any:
        """Write (1, kv heads, S, head_dim) at the current positions of a cache slot; returns the whole slot."""
        from coremltools.converters.mil import Builder as mb

        spec = self.architecture
        begin = mb.concat(values=[np.array([slot, 0], np.int32), frame.start, np.array([0], np.int32)], axis=0)
        end = mb.concat(
            values=[np.array([slot + 1, spec.kv_heads], np.int32), frame.end, np.array([spec.head_dim], np.int32)],
            axis=0,
        )
        updated = mb.slice_update(x=frame.cache, update=x, begin=begin, end=end)
        frame.cache = mb.coreml_update_state(state=frame.state, value=updated)
        size = [1, spec.kv_heads, self.context, spec.head_dim]
        return mb.slice_by_size(x=frame.cache, begin=[slot, 0, 0, 0], size=size)


def _with_bias(weight: Any, factor: float) -> Any:
    """The same matrix with its bias multiplied."""
    from dataclasses import replace

    return replace(weight, bias=(weight.bias.astype(np.float32) * factor).astype(np.float16))
