"""Whole programs: states, inputs, overflows, and a decoder that coremltools has converted from torch."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from a1q.coreml.interpreter import Interpreter, half_rounded
from a1q.coreml.reader import read_package
from a1q.coreml.toolkit import coremltools
from tests.coreml.models import SCHEMES, decoder, package_of
from tests.coreml.one_operation import program_of

RNG = np.random.default_rng(0)


def stateful(build, shape=(2, 3, 4)):
    """A program whose function takes `x` fp16 [1, 3, 4], `at` int32 [1], and the state `cache`."""
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    inputs = {
        "x": Placeholder(sym_shape=(1, *shape[1:]), dtype=types.fp16, name="x"),
        "at": Placeholder(sym_shape=(1,), dtype=types.int32, name="at"),
        "cache": StateTensorPlaceholder(sym_shape=shape, dtype=types.fp16, name="cache"),
    }
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        function.set_outputs(list(build(mb, **function.inputs)))
    program = Program()
    program.add_function("main", function)
    return program


def put(mb, cache, x, slot):
    return mb.slice_update(
        x=cache, update=x, begin=np.array([slot, 0, 0], np.int32), end=np.array([slot + 1, 3, 4], np.int32)
    )


X = RNG.standard_normal((1, 3, 4)).astype(np.float16).astype(np.float32)
AT = np.zeros(1, np.int32)


def called(program, state, x=X):
    return Interpreter(program, "fp32").run("main", {"x": x, "at": AT}, state)


def test_states_of_two_programs_are_one():
    """What one program writes, another reads, as chunks of a model do."""
    writer = stateful(
        lambda mb, x, at, cache: [mb.coreml_update_state(state=cache, value=put(mb, mb.read_state(input=cache), x, 1))]
    )
    reader = stateful(lambda mb, x, at, cache: [mb.add(x=x, y=mb.read_state(input=cache), name="sum")])
    state = Interpreter(writer, "fp32").new_state()
    called(writer, state)
    expected = np.stack([np.zeros_like(X[0]), X[0]]) + X
    assert np.array_equal(called(reader, state)["sum"], expected)


def test_an_update_leaves_what_was_read_before():
    """The old value is still needed after the write, whole, in part and in another shape."""

    def build(mb, x, at, cache):
        old = mb.read_state(input=cache)
        turned = mb.transpose(x=mb.slice_by_size(x=old, begin=[1, 0, 0], size=[1, 3, 4]), perm=[0, 2, 1])
        new = mb.coreml_update_state(state=cache, value=put(mb, old, x, 1))
        return [mb.identity(x=turned, name="part"), mb.mul(x=new, y=np.float16(1), name="new")]

    program = stateful(build)
    state = {"cache": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}
    before = state["cache"].copy()
    found = called(program, state)
    assert np.array_equal(found["part"], before[1:].transpose(0, 2, 1))
    assert np.array_equal(found["new"], np.stack([before[0], X[0]]))


def test_a_value_that_does_not_go_back_leaves_the_state():
    program = stateful(lambda mb, x, at, cache: [put(mb, mb.read_state(input=cache), x, 0)])
    state = {"cache": np.ones((2, 3, 4), np.float32)}
    (found,) = called(program, state).values()
    assert np.array_equal(found[0], X[0])
    assert np.array_equal(state["cache"], np.ones((2, 3, 4)))


def test_outputs_outlive_the_next_call():
    """An output that is the state itself must not change with it."""
    program = stateful(
        lambda mb, x, at, cache: [mb.coreml_update_state(state=cache, value=put(mb, mb.read_state(input=cache), x, 0))]
    )
    interpreter = Interpreter(program, "fp32")
    state = interpreter.new_state()
    (first,) = interpreter.run("main", {"x": X, "at": AT}, state).values()
    kept = first.copy()
    interpreter.run("main", {"x": X * 2, "at": AT}, state)
    assert np.array_equal(first, kept)


def test_a_cache_is_not_copied():
    """Writes go into the same memory where nothing needs the old numbers."""
    program = stateful(
        lambda mb, x, at, cache: [
            mb.mul(
                x=mb.coreml_update_state(state=cache, value=put(mb, mb.read_state(input=cache), x, 0)), y=np.float16(1)
            )
        ]
    )
    state = Interpreter(program, "fp32").new_state()
    memory = state["cache"]
    called(program, state)
    assert state["cache"] is memory and np.array_equal(memory[0], X[0])


def test_inputs_are_checked_and_rounded():
    program = program_of(lambda mb, x, i: mb.mul(x=x, y=mb.cast(x=i, dtype="fp16")), [X, AT], half=True)
    interpreter = Interpreter(program, "fp16")
    fine = np.full_like(X, 1 + 2.0**-20)
    (found,) = interpreter.run("main", {"x": fine, "y": np.ones(1, np.int64)}, {}).values()
    assert np.array_equal(found, np.ones_like(X))
    with pytest.raises(ValueError, match=r"takes the inputs x, y; it was given x"):
        interpreter.run("main", {"x": X}, {})
    with pytest.raises(ValueError, match=r"takes x of shape \(1, 3, 4\); it was given \(1, 3, 5\)"):
        interpreter.run("main", {"x": np.zeros((1, 3, 5)), "y": AT}, {})


def test_fp16_overflow_is_infinite_and_noted():
    program = program_of(lambda mb, x: mb.mul(x=x, y=np.float16(2), name="double"), [np.zeros((1, 2))], half=True)
    values = {"x": np.array([[1, 40000]], np.float32)}
    half, single = Interpreter(program, "fp16"), Interpreter(program, "fp32")
    assert np.array_equal(half.run("main", values, {})["double"], [[2, np.inf]])
    assert half.overflows == {"double": 1}
    assert np.array_equal(single.run("main", values, {})["double"], [[2, 80000]])
    assert single.overflows == {}


def test_an_infinite_mask_is_no_overflow():
    x = np.array([[1, 2, 30000]], np.float32)
    mask = np.array([[0, -np.inf, 40000]], np.float32)
    program = program_of(lambda mb, x, m: mb.add(x=x, y=m, name="scores"), [x, mask], half=True)
    interpreter = Interpreter(program, "fp16")
    assert np.array_equal(interpreter.run("main", {"x": x, "y": mask}, {})["scores"], [[1, -np.inf, np.inf]])
    assert interpreter.overflows == {"scores": 1}


def test_values_are_dropped_after_their_last_use():
    """While a chain of operations runs, only what is still needed is alive."""
    import weakref

    def chain(mb, x):
        for _ in range(6):
            x = mb.exp(x=mb.mul(x=x, y=np.float32(0.1)))
        return x

    interpreter = Interpreter(program_of(chain, [np.zeros((1, 2), np.float32)]), "fp32")
    alive = []
    for executed in interpreter.walk("main", {"x": np.ones((1, 2), np.float32)}, {}):
        alive.append(weakref.ref(executed.results[0]))
    del executed
    assert sum(reference() is not None for reference in alive) <= 1


# -- a decoder as converters make it ---------------------------------------------------------------------------
HIDDEN, SIZE, HEADS, KV, CONTEXT, LAYERS, VOCABULARY = 32, 16, 4, 2, 16, 2, 48


class Norm(nn.Module):
    """RMSNorm as a LayerNorm over (x, -x)."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(size))

    def forward(self, x):
        both = torch.cat([x, -x], -1)
        return functional.layer_norm(both, (both.shape[-1],), None, None, 1e-5)[..., : x.shape[-1]] * self.weight


class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index
        inner, wide = HEADS * SIZE, 48
        sizes = {"q": (HIDDEN, inner), "k": (HIDDEN, KV * SIZE), "v": (HIDDEN, KV * SIZE), "o": (inner, HIDDEN)}
        sizes |= {"gate": (HIDDEN, wide), "up": (HIDDEN, wide), "down": (wide, HIDDEN)}
        self.linears = nn.ModuleDict({name: nn.Conv2d(*pair, 1, bias=name == "q") for name, pair in sizes.items()})
        self.norms = nn.ModuleList([Norm(HIDDEN), Norm(HIDDEN), Norm(SIZE), Norm(SIZE)])

    def heads(self, x, name, count):
        return self.linears[name](x).view(1, count, SIZE, -1).permute(0, 1, 3, 2)

    def rotated(self, x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x, mask, cos, sin, cache, position):
        count = x.shape[1]
        h = self.norms[0](x).permute(0, 2, 1).unsqueeze(2)
        query = self.rotated(self.norms[2](self.heads(h, "q", HEADS)), cos, sin)
        key = self.rotated(self.norms[3](self.heads(h, "k", KV)), cos, sin)
        cache[self.index : self.index + 1, :, position : position + count, :] = key
        slot = LAYERS + self.index
        cache[slot : slot + 1, :, position : position + count, :] = self.heads(h, "v", KV)
        keys, values = (
            cache[i : i + 1].squeeze(0).unsqueeze(1).repeat(1, HEADS // KV, 1, 1).view(1, HEADS, CONTEXT, SIZE)
            for i in (self.index, slot)
        )
        weights = (torch.einsum("bhqd,bhkd->bhqk", query, keys) * SIZE**-0.5 + mask).softmax(-1)
        mixed = (weights @ values).permute(0, 1, 3, 2).reshape(1, HEADS * SIZE, 1, count)
        x = x + self.linears["o"](mixed).squeeze(2).permute(0, 2, 1)
        h = self.norms[1](x).permute(0, 2, 1).unsqueeze(2)
        gate = functional.gelu(self.linears["gate"](h), approximate="tanh" if self.index else "none")
        return x + self.linears["down"](gate * self.linears["up"](h)).squeeze(2).permute(0, 2, 1)


class Converted(nn.Module):
    """A decoder in the manner of the ANEMLL converters: mask and positions are inputs, the head is in parts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(i) for i in range(LAYERS)])
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.parts = nn.ModuleList([nn.Conv2d(HIDDEN, VOCABULARY // 2, 1, bias=False) for _ in range(2)])
        angle = torch.outer(torch.arange(CONTEXT).float(), 100 ** (-torch.arange(0, SIZE, 2) / SIZE)).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("cache", torch.zeros(2 * LAYERS, KV, CONTEXT, SIZE))

    def forward(self, ids, position_ids, mask, position):
        x = self.embedding(ids)
        cos, sin = (table[position_ids].view(1, 1, -1, SIZE) for table in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, mask, cos, sin, self.cache, position)
        h = x.permute(0, 2, 1).unsqueeze(2)
        return tuple(part(h).squeeze(2).transpose(1, 2) for part in self.parts)


def arguments(ids, start):
    rows = torch.arange(start, start + len(ids))
    mask = torch.where(torch.arange(CONTEXT) <= rows[:, None], 0.0, -torch.inf)[None, None]
    return torch.tensor([ids]).int(), rows.int(), mask, torch.tensor([start]).int()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A torch decoder, and its programs for 1 and 4 positions as coremltools converts, saves and loads them."""
    ct = coremltools()
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = Converted().eval()
    model.requires_grad_(False)
    for tensor in [*model.parameters(), model.cos, model.sin]:
        tensor.copy_(tensor.half().float())
    names = ("ids", "position_ids", "mask", "position")
    programs = {}
    for count in (1, 4):
        traced = torch.jit.trace(model, arguments([0] * count, 0), check_trace=False)
        saved = ct.convert(
            traced,
            inputs=[
                ct.TensorType(name, tuple(example.shape), np.float16 if example.is_floating_point() else np.int32)
                for name, example in zip(names, arguments([0] * count, 0), strict=True)
            ],
            outputs=[ct.TensorType(name=f"logits{i + 1}", dtype=np.float16) for i in range(2)],
            states=[ct.StateType(ct.TensorType(shape=model.cache.shape, dtype=np.float16), name="cache")],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        path = tmp_path_factory.mktemp("converted") / f"of_{count}.mlpackage"
        saved.save(str(path))
        programs[count] = read_package(path).program
    return model, programs


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("fp16", 1e-2)])
def test_a_converted_decoder_computes_what_torch_does(converted, precision, tolerance):
    """Prefill in chunks, the last one padded, then single tokens, over one state of two programs."""
    model, programs = converted
    interpreters = {count: Interpreter(program, precision) for count, program in programs.items()}
    state = interpreters[1].new_state()
    model.cache.zero_()
    ids = RNG.integers(0, VOCABULARY, 12).tolist()
    for start, stop in [(0, 4), (4, 8), *((i, i + 1) for i in range(7, 12))]:
        given = arguments(ids[start:stop], start)
        expected = torch.cat(model(*given), -1).numpy()
        inputs = {
            name: value.numpy() for name, value in zip(("ids", "position_ids", "mask", "position"), given, strict=True)
        }
        interpreter = interpreters[stop - start]
        outputs = interpreter.run("main", inputs, state)
        found = np.concatenate([outputs["logits1"], outputs["logits2"]], -1)
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
        np.testing.assert_allclose(state["cache"], model.cache.numpy(), atol=tolerance, rtol=0)
        assert interpreter.overflows == {}
    kinds = {op.op_type for op in programs[4].functions["main"].operations}
    assert {"slice_update", "slice_by_index", "tile", "select", "gather", "squeeze", "gelu"} <= kinds


def test_enumerated_shapes(tmp_path):
    """An input of one of several shapes: each runs, and its rank is still checked."""
    ct = coremltools()
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    saved = ct.convert(
        torch.jit.trace(embedding, torch.zeros(1, 4, dtype=torch.int32)),
        inputs=[ct.TensorType("ids", ct.EnumeratedShapes([[1, 1], [1, 4]]), np.int32)],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    saved.save(str(tmp_path / "embedding.mlpackage"))
    interpreter = Interpreter(read_package(tmp_path / "embedding.mlpackage").program, "fp32")
    for count in (1, 4):
        ids = RNG.integers(0, VOCABULARY, (1, count)).astype(np.int32)
        (found,) = interpreter.run("main", {"ids": ids}, {}).values()
        np.testing.assert_allclose(found, embedding(torch.tensor(ids)).detach(), atol=1e-3)
    with pytest.raises(ValueError, match="takes ids of shape"):
        interpreter.run("main", {"ids": np.zeros(4, np.int32)}, {})


def test_a_package_read_back_holds_each_weight_once(tmp_path):
    """Functions that share a weight in the file share it in memory."""
    package, _ = package_of(decoder(SCHEMES["tensor-2"]), tmp_path)
    functions = package.program.functions

    def indices(function):
        return {id(op.indices.val) for op in function.operations if op.op_type == "constexpr_lut_to_dense"}

    assert indices(functions["infer"]) == indices(functions["prefill"])
    assert len(indices(functions["infer"])) == 14


def test_rounding_is_that_of_numpy_everywhere():
    """Every fp16 number, what lies midway between two and beside that, subnormal, infinite or none; any shape."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = np.sort(halves[np.isfinite(halves)])
    midway = (halves[:-1] + halves[1:]) / 2
    odd = np.array([np.inf, -np.inf, np.nan, 65519.996, 65520, 1e38, 1e-45], np.float32)
    cases = [halves, midway, np.nextafter(midway, np.float32(0)), np.nextafter(midway, np.float32(1e9)), odd]
    for numbers in (np.concatenate(cases), odd[:6].reshape(2, 3).T, np.broadcast_to(odd[3:4], (5, 2)), np.float32(0.1)):
        with np.errstate(over="ignore"):
            expected = numbers.astype(np.float16).astype(np.float32)
        found = half_rounded(numbers)
        assert found.dtype == np.float32 and found.shape == np.shape(numbers)
        assert np.array_equal(found, expected, equal_nan=True)
