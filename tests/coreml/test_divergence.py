"""The operation where fp16 leaves fp32, in programs in which it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a1q.coreml.bundle import Bundle
from a1q.coreml.divergence import UNIT, TracingBackend, relative_error, trace, trace_bundle
from a1q.coreml.interpreter import Interpreter, half_rounded
from a1q.coreml.runner import InterpreterBackend, make_runner
from tests.coreml.anemll.exported import exported, family
from tests.coreml.models import SCHEMES, decoder, package_of
from tests.coreml.one_operation import program_of

RNG = np.random.default_rng(0)
X = RNG.standard_normal((1, 64)).astype(np.float16).astype(np.float32)


def drifting(mb, x):
    """Many harmless operations, then a difference of nearly equal numbers, then harmless ones again."""
    for i in range(30):
        x = mb.mul(x=x, y=np.float16(1.1 if i % 2 else 1 / 1.1), name=f"harmless_{i}")
    x = mb.add(x=x, y=np.float16(500), name="large")
    x = mb.sub(x=x, y=np.float16(500), name="cancelled")
    return mb.mul(x=x, y=np.float16(3), name="after")


def test_the_first_operation_that_leaves_is_named():
    found = trace(program_of(drifting, [X], half=True), [("main", {"x": X})])
    assert found.first is not None
    assert (found.first.place.name, found.first.place.type, found.first.place.function) == ("cancelled", "sub", "main")
    assert found.first.place.number == 31
    assert found.growing(1)[0].place.name == "cancelled"
    assert found.overflow is None
    errors = [found.operations["main", f"harmless_{i}"].error for i in range(30)]
    assert errors[-1] > errors[0] > 0  # they do drift
    assert max(errors) < found.first.error / 10


def harmless(mb, x):
    for i in range(99):
        x = mb.mul(x=x, y=np.float16(1.1 if i % 2 else 1 / 1.1))
    return mb.mul(x=x, y=np.float16(1.1), name="h")


def test_without_a_cause_nothing_is_named():
    found = trace(program_of(harmless, [X], half=True), [("main", {"x": X})])
    assert found.first is None and found.overflow is None
    assert len(found.operations) == 100


def test_own_is_one_rounding_and_error_is_of_all():
    found = trace(program_of(drifting, [X], half=True), [("main", {"x": X})])
    operations = list(found.operations.values())
    assert operations[0].own == operations[0].error
    assert all(0 < operation.own < UNIT for operation in operations[:31])
    assert found.operations["main", "cancelled"].own == 0  # it only shows what was lost before: nothing to round here
    exact = X * np.float32(np.float16(1 / 1.1))
    rounded = exact.astype(np.float16).astype(np.float64)
    expected = np.sqrt(((rounded - exact) ** 2).sum() / (exact.astype(np.float64) ** 2).sum())
    assert operations[0].own == pytest.approx(expected, rel=1e-6)


def test_overflow_peak_and_headroom():
    def large(mb, x):
        x = mb.mul(x=x, y=np.float16(100), name="near")
        x = mb.mul(x=x, y=np.float16(1000), name="beyond")
        return mb.mul(x=x, y=np.float16(0.001), name="after")

    found = trace(program_of(large, [X], half=True), [("main", {"x": X})])
    assert found.overflow is not None and found.first == found.overflow
    assert found.overflow.place.name == "beyond"
    near, beyond = found.operations["main", "near"], found.operations["main", "beyond"]
    assert near.peak == pytest.approx(100 * np.abs(X).max(), rel=1e-6)
    assert near.headroom == pytest.approx(65504 / near.peak) and near.headroom > 1 > beyond.headroom


def test_masks_hide_nothing_and_are_not_taken_for_errors():
    """Large finite and infinite masks; beside them a difference that must be seen all the same."""
    places = np.arange(64, dtype=np.int32).reshape(1, 64)

    def masked(mb, x, places):
        visible = mb.cast(x=mb.less(x=places, y=np.int32(40)), dtype="fp16")
        mask = mb.mul(x=mb.sub(x=visible, y=np.float16(1)), y=np.float16(40000), name="mask")
        hidden = mb.add(x=mb.sub(x=mb.add(x=x, y=np.float16(500)), y=np.float16(500)), y=mask, name="hidden")
        return mb.softmax(x=hidden, axis=1)

    found = trace(program_of(masked, [X, places], half=True), [("main", {"x": X, "y": places})])
    assert found.operations["main", "mask"].place.positional
    assert found.operations["main", "mask"].error == 0
    assert found.operations["main", "hidden"].error > 0.01
    assert found.operations["main", "hidden"].peak == pytest.approx(np.abs(X[:, :40]).max(), abs=1e-3)
    assert found.peaks()[None].peak < 1000

    infinite = np.where(places < 40, 0, -np.inf).astype(np.float32)
    add = program_of(lambda mb, x, mask: mb.softmax(x=mb.add(x=x, y=mask), axis=1), [X, infinite], half=True)
    found = trace(add, [("main", {"x": X, "y": infinite})])
    assert found.first is None and found.overflow is None


def calls(ids, chunk=32):
    """A prompt of one chunk, then token by token."""
    return [
        ("prefill", {"input_ids": ids[None, :chunk], "position": np.int32([0]), "last": np.int32([chunk - 1])}),
        *(("infer", {"input_ids": ids[None, i : i + 1], "position": np.int32([i])}) for i in range(chunk, len(ids))),
    ]


IDS = RNG.integers(0, 320, 35).astype(np.int32)


def test_a_decoder_stays_and_its_layers_are_told_apart(tmp_path):
    package, _ = package_of(decoder(SCHEMES["rank-1"]), tmp_path)
    found = trace(package.program, calls(IDS))
    assert found.first is None and found.overflow is None
    assert set(found.peaks()) == {None, 0, 1}
    assert {function for function, _ in found.operations} == {"infer", "prefill"}
    assert all(deviation.headroom > 10 for deviation in found.peaks().values())
    assert not any(np.isnan(deviation.error) for deviation in found.operations.values())


def test_the_layer_that_overflows_is_named(tmp_path):
    model = decoder()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(60000)
    package, _ = package_of(model, tmp_path)
    found = trace(package.program, calls(IDS))
    assert found.overflow is not None
    assert found.overflow.place.layer == 1
    assert found.overflow.place.function == "prefill" and found.overflow.call == 0
    assert found.peaks()[1].headroom < 1 < found.peaks()[0].headroom
    assert "mlp" in str(found.overflow.place)


def test_side_by_side_is_what_each_does_alone(tmp_path):
    """A tracing backend's outputs and those of an interpreter; the states of both precisions are their own."""
    package, _ = package_of(decoder(SCHEMES["rank-1"]), tmp_path)
    backend = TracingBackend(Bundle(tmp_path, {}, {"model": package}))
    interpreter = Interpreter(package.program, "fp32")
    states, state = backend.new_state(), interpreter.new_state()
    for function, inputs in calls(IDS):
        traced, plain = backend.run("model", function, inputs, states), interpreter.run(function, inputs, state)
        assert all(np.array_equal(traced[name], plain[name]) for name in plain)
    assert np.array_equal(states[0]["kv_cache"], state["kv_cache"])
    assert not np.array_equal(states[0]["kv_cache"], states[1]["kv_cache"])
    assert backend.tracer.result().operations == trace(package.program, calls(IDS)).operations


def test_parts_pass_on_their_own_precision(tmp_path):
    """Two programs, one after the other: the second's fp16 run gets what the first's has computed."""

    class Part:
        def __init__(self, build):
            self.program = program_of(build, [X], half=True)

    parts = {"one": Part(harmless), "two": Part(lambda mb, x: mb.mul(x=x, y=np.float16(1), name="h"))}
    backend = TracingBackend(Bundle(tmp_path, {}, parts))
    states = backend.new_state()
    hidden = backend.run("one", "main", {"x": X}, states)["h"]
    backend.run("two", "main", {"x": hidden}, states)
    errors = {key: deviation.error for key, deviation in backend.tracer.result().operations.items()}
    assert errors["two: main", "h"] == errors["one: main", "h"]
    assert errors["two: main", "h"] > 2 * relative_error(hidden, half_rounded(hidden))  # more than one rounding


def test_a_model_in_parts(tmp_path):
    """Embeddings, chunks that share a state, infinite masks, head: the fp16 run is what an fp16 backend gives alone."""
    bundle = exported(family("gemma3_text"), tmp_path)
    backend, half = TracingBackend(bundle), InterpreterBackend(bundle, "fp16")
    traced, alone = make_runner(bundle, backend), make_runner(bundle, half)
    traced.prefill(IDS.tolist())
    alone.prefill(IDS.tolist())
    state = traced.state[1]
    assert all(np.array_equal(state[name], alone.state[name]) for name in alone.state)
    found = backend.tracer.result()
    assert found.first is None and found.overflow is None
    assert {function.split(": ")[0] for function, _ in found.operations} == set(bundle.packages)
    layers = {layer for layer in found.peaks() if layer is not None}
    assert layers == set(range(max(part["layers"][1] for part in bundle.meta["parts"])))
    assert max(deviation.peak for deviation in found.peaks().values()) < 10000, "no score that the app's mask hides"
    assert set(trace_bundle(bundle, IDS.tolist(), 30).operations) == set(found.operations)


def test_relative_error():
    wanted = np.array([3.0, 4.0, np.inf], np.float32)
    assert relative_error(wanted, np.array([3.0, 4.5, np.inf], np.float32)) == pytest.approx(0.1)
    assert relative_error(wanted, np.array([np.nan, 4.0, np.inf], np.float32)) == np.inf
    assert relative_error(np.zeros(2), np.zeros(2)) == 0


def test_relative_error_of_large_arrays():
    """In blocks as in one piece, with infinities that are in both at any place."""
    wanted = RNG.standard_normal((3, 7, 1111)).astype(np.float32)
    found = half_rounded(wanted)
    wide = wanted.astype(np.float64)
    assert relative_error(wanted, found) == pytest.approx(np.linalg.norm(found - wide) / np.linalg.norm(wide), rel=1e-9)
    wanted[2, 6, 1110] = found[2, 6, 1110] = -np.inf
    assert np.isfinite(relative_error(wanted, found))
    found[2, 6, 1109] = np.inf
    assert relative_error(wanted, found) == np.inf
