"""Defects, each put into a bundle that was right: into its saved files, or into the program as it is built."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a1q.coreml import decoder
from a1q.coreml.toolkit import coremltools
from a1q.coreml.weightfile import ENTRY, read_spec

MODULE = "model_layers_1_mlp_down_proj"
"""The module whose weight is changed: one of fourteen."""


class Editor:
    """The saved files of one package, to be changed in place."""

    def __init__(self, folder: Path, file: str = "model.mlpackage"):
        self.path = folder / file
        self.spec = read_spec(self.path)
        self.weights = self.path / "Data/com.apple.CoreML/weights/weight.bin"

    def save(self) -> None:
        """Write the program back."""
        manifest = json.loads((self.path / "Manifest.json").read_text())
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        (self.path / "Data" / entry["path"]).write_bytes(self.spec.SerializeToString(deterministic=True))

    def block(self, function: str) -> Any:
        """The operations of a function."""
        message = self.spec.mlProgram.functions[function]
        return message.block_specializations[message.opset]

    def values(self, name: str, attribute: str = "val") -> Iterator[Any]:
        """The constants called `name` in all functions (coremltools may have numbered them), as messages."""
        for function in self.spec.mlProgram.functions:
            for operation in self.block(function).operations:
                if operation.outputs and operation.outputs[0].name == name:
                    value = operation.attributes.get(attribute)
                    bound = operation.inputs[attribute].arguments[0] if attribute in operation.inputs else None
                    yield bound.value if value is None and bound is not None else value

    def change(self, name: str, how: Callable[[Any], Any], attribute: str = "val", kind: str = "<f2") -> None:
        """Replace the numbers of a constant, wherever they stand, by `how` of them (flat)."""
        places = set()
        for value in self.values(name, attribute):
            if value.WhichOneof("value") == "blobFileValue":
                places.add(value.blobFileValue.offset)
                continue
            tensor = value.immediateValue.tensor
            if tensor.WhichOneof("value") == "bytes":
                numbers = np.frombuffer(tensor.bytes.values, kind).copy()
                tensor.bytes.values = how(numbers).astype(kind).tobytes()
            else:
                held = getattr(tensor, tensor.WhichOneof("value")).values
                held[:] = how(np.array(held)).tolist()
        content = bytearray(self.weights.read_bytes())
        for offset in places:
            _, _, size, start, _ = ENTRY.unpack_from(content, offset)
            numbers = np.frombuffer(bytes(content[start : start + size]), kind).copy()
            changed = how(numbers).astype(kind).tobytes()
            assert len(changed) == size and changed != content[start : start + size], "a change that changes nothing"
            content[start : start + size] = changed
        self.weights.write_bytes(content)
        self.save()


# -- in the saved files ----------------------------------------------------------------------------------------------
def _first(number: float) -> Callable[[Any], Any]:
    def change(numbers: Any) -> Any:
        numbers[0] = number
        return numbers

    return change


def one_table_entry(editor: Editor) -> None:
    """One of the 16 entries of one module's table, by a tenth of their range."""

    def change(lut: Any) -> Any:
        lut[9] += 0.1 * (lut.max() - lut.min())
        return lut

    editor.change(f"{MODULE}_weight", change, "lut")


def indices_of_one_column(editor: Editor) -> None:
    """The lowest bit of one index in every row; two indices are a byte."""

    def change(packed: Any) -> Any:
        packed[5 :: len(packed) // 64] ^= 1
        return packed

    editor.change(f"{MODULE}_weight", change, "indices", "u1")


def row_scales_dropped(editor: Editor) -> None:
    editor.change(f"{MODULE}_a", np.ones_like)


def column_scales_dropped(editor: Editor) -> None:
    editor.change(f"{MODULE}_b", np.ones_like)


def norm_gain_missing(editor: Editor) -> None:
    editor.change("model_layers_1_post_attention_layernorm", np.ones_like)


def final_norm_missing(editor: Editor) -> None:
    editor.change("model_norm", np.ones_like)


def other_rope_base(editor: Editor) -> None:
    """10500 instead of 10000."""
    frequencies = {o.inputs["y"].arguments[0].name for o in _rotating(editor)}
    assert len(frequencies) == 2, "one in each function"
    for name in frequencies:
        editor.change(name, lambda numbers: numbers ** (math.log(10500) / math.log(10000)), kind="<f4")


def _rotating(editor: Editor) -> Iterator[Any]:
    """The products of positions and frequencies."""
    for function in editor.spec.mlProgram.functions:
        operations = list(editor.block(function).operations)
        angles = {o.inputs["x"].arguments[0].name for o in operations if o.type == "cos"}
        yield from (o for o in operations if o.outputs and o.outputs[0].name in angles)


def mask_shows_the_next(editor: Editor) -> None:
    editor.change("columns", lambda numbers: numbers - 1, kind="<i4")


def mask_hides_the_present(editor: Editor) -> None:
    editor.change("columns", lambda numbers: numbers + 1, kind="<i4")


def _slots(editor: Editor, function: str) -> list[Any]:
    """The constants that say from which slot of the cache a layer reads, keys and values by turns."""
    block = list(editor.block(function).operations)
    reads = {o.outputs[0].name for o in block if o.type == "read_state"}
    begins = [o.inputs["begin"].arguments[0].name for o in block if o.type == "slice_by_size" and _x(o) in reads]
    named = {o.outputs[0].name: o for o in block if o.outputs}
    return [named[name].attributes["val"].immediateValue.tensor.ints.values for name in begins]


def _x(operation: Any) -> str:
    return str(operation.inputs["x"].arguments[0].name)


def swapped_states(editor: Editor) -> None:
    """`infer` reads layer 0's keys where layer 1's are, and the other way round."""
    slots = _slots(editor, "infer")
    slots[0][0], slots[2][0] = slots[2][0], slots[0][0]
    editor.save()


def swapped_keys_and_values(editor: Editor) -> None:
    """In `prefill`, of layer 1."""
    slots = _slots(editor, "prefill")
    slots[2][0], slots[3][0] = slots[3][0], slots[2][0]
    editor.save()


def lost_write(editor: Editor) -> None:
    """What `infer` writes last never reaches the state."""
    operations = editor.block("infer").operations
    place = max(i for i, operation in enumerate(operations) if operation.type == "write_state")
    after = operations[place + 1]
    assert after.type == "read_state"
    _rename(operations, after.outputs[0].name, operations[place].inputs["data"].arguments[0].name)
    del operations[place : place + 2]
    editor.save()


def stale_read(editor: Editor) -> None:
    """`prefill` reads layer 1's values out of the cache as it was before the call."""
    block = editor.block("prefill").operations
    first = next(o.outputs[0].name for o in block if o.type == "read_state")
    reads = {o.outputs[0].name for o in block if o.type == "read_state"}
    last = [o for o in block if o.type == "slice_by_size" and _x(o) in reads][-1]
    last.inputs["x"].arguments[0].name = first
    editor.save()


def _rename(operations: Any, old: str, new: str) -> None:
    for operation in operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.name == old:
                    binding.name = new


def rows_of_the_embedding_moved(editor: Editor) -> None:
    """Every token gets its neighbour's row."""
    editor.change("embedding_weight", lambda table: np.roll(table, 64))


def head_from_another_table(editor: Editor) -> None:
    """The head multiplies with the embedding's table though it has one of its own."""
    [place] = {v.blobFileValue.offset for v in editor.values("embedding_weight")}
    for value in editor.values("lm_head_1_weight"):
        value.blobFileValue.offset = place
    editor.save()


IN_FILES = [
    one_table_entry, indices_of_one_column, row_scales_dropped, column_scales_dropped, norm_gain_missing,
    final_norm_missing, other_rope_base, mask_shows_the_next, mask_hides_the_present, swapped_states,
    swapped_keys_and_values, lost_write, stale_read, rows_of_the_embedding_moved,
]  # fmt: skip
"""Defects of a palettized model of rank 1 whose head is tied."""


# -- in the program --------------------------------------------------------------------------------------------------
Patch = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def building_with(patch: Patch) -> Iterator[None]:
    """Programs built inside have the defect."""
    coremltools()
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        yield


def _wrapped(monkeypatch: pytest.MonkeyPatch, name: str, changed: Callable[..., Any]) -> None:
    """Let `changed(original, decoder, ...)` stand in for a method of `Decoder`."""
    original = getattr(decoder.Decoder, name)
    monkeypatch.setattr(decoder.Decoder, name, lambda self, *args, **more: changed(original, self, *args, **more))


def shifted_prefill_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill writes one position too far."""
    from dataclasses import replace

    from coremltools.converters.mil import Builder as mb

    def changed(original: Any, self: Any, x: Any, slot: int, frame: Any) -> Any:
        if self.positions == 1:
            return original(self, x, slot, frame)
        shifted = replace(frame, start=mb.add(x=frame.start, y=np.int32(1)), end=mb.add(x=frame.end, y=np.int32(1)))
        result = original(self, x, slot, shifted)
        frame.cache = shifted.cache
        return result

    _wrapped(monkeypatch, "_remember", changed)


def unscaled_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of the scores is left out."""

    def changed(
        original: Any, self: Any, x: Any, name: str, axis: int, factor: float = 1.0, stream: float = 1.0
    ) -> Any:
        return original(self, x, name, axis, stream=stream)

    _wrapped(monkeypatch, "_norm", changed)


def rotated_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from coremltools.converters.mil import Builder as mb

    def changed(original: Any, self: Any, x: Any, cos: Any, sin: Any) -> Any:
        return original(self, x, cos, mb.mul(x=sin, y=np.float16(-1)))

    _wrapped(monkeypatch, "_rotate", changed)


def keys_left_unrotated(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(original: Any, self: Any, x: Any, cos: Any, sin: Any) -> Any:
        return x if x.shape[1] == self.architecture.kv_heads else original(self, x, cos, sin)

    _wrapped(monkeypatch, "_rotate", changed)


def skipped_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(original: Any, self: Any, x: Any, begin: int, end: int, frame: Any) -> Any:
        return original(self, x, begin, end - 1, frame)

    _wrapped(monkeypatch, "layers", changed)


def window_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding layers see one position more."""
    from dataclasses import replace

    def changed(original: Any, self: Any, rows: Any) -> Any:
        own, self.architecture = self.architecture, replace(self.architecture, window=self.architecture.window + 1)
        masks = original(self, rows)
        self.architecture = own
        return masks

    _wrapped(monkeypatch, "masks", changed)


def swapped_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding layers rotate like the global ones, and the other way round."""

    def changed(original: Any, self: Any, rows: Any) -> Any:
        first, second = original(self, rows).items()
        return {first[0]: second[1], second[0]: first[1]}

    _wrapped(monkeypatch, "rotations", changed)


IN_PROGRAM: list[tuple[Patch, str]] = [
    (shifted_prefill_write, "qwen3"),
    (unscaled_queries, "qwen3"),
    (rotated_the_other_way, "llama"),
    (keys_left_unrotated, "mistral"),
    (skipped_layer, "qwen2"),
    (window_off_by_one, "gemma3_text"),
    (swapped_kinds, "gemma3_text"),
]
"""A defect, and the family in which it is put."""
