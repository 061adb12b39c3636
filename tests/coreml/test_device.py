"""Core ML is faked; the fakes take exactly what the functions of the installed coremltools take."""

from __future__ import annotations

import inspect
import sys
import warnings
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from a1q.coreml import device
from a1q.coreml.device import CoreMLBackend, Placement, compile_package, placements, summarize
from a1q.coreml.toolkit import coremltools
from a1q.errors import MismatchError, StageError

REAL = coremltools()
PARTS = [
    {"name": "embeddings", "file": "e.mlpackage", "role": "embeddings", "functions": {"main": 1}},
    {"name": "ffn_1", "file": "f1.mlpackage", "role": "ffn", "functions": {"infer": 1, "prefill": 64}},
    {"name": "ffn_2", "file": "f2.mlpackage", "role": "ffn", "functions": {"infer": 1, "prefill": 64}},
]


def as_in(real, call):
    """`call`, but refusing arguments that the real function would refuse."""
    signature = inspect.signature(real)

    def checked(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return call(*args, **kwargs)

    return checked


class FakeModel:
    """As `MLModel` behaves on a Mac, which writes down how it is called."""

    calls: ClassVar[list] = []

    def __init__(self, model, compute_units, function_name=None):
        inspect.signature(REAL.models.MLModel).bind(model, compute_units=compute_units, function_name=function_name)
        assert isinstance(model, str)
        assert isinstance(compute_units, REAL.ComputeUnit)
        self.name = model.rsplit("/", 1)[-1], function_name
        self.__proxy__ = object()
        self.calls.append(("load", self.name, compute_units.name))

    def make_state(self):
        inspect.signature(REAL.models.MLModel.make_state).bind(self)
        self.calls.append(("state", self.name))
        return SimpleNamespace(made_by=self.name)

    def predict(self, data, state=None):
        inspect.signature(REAL.models.MLModel.predict).bind(self, data, state=state)
        assert type(data) is dict, "coremltools refuses other mappings"
        if "wrong" in data:
            raise KeyError("wrong input")
        data.clear()  # coremltools changes what it is given
        self.calls.append(("predict", self.name, state))
        return {"y": np.ones((1, 2), np.float16)}


@pytest.fixture
def mac(monkeypatch):
    """A coremltools on a Mac; returns its calls."""
    fake = SimpleNamespace(
        ComputeUnit=REAL.ComputeUnit,
        models=SimpleNamespace(
            MLModel=FakeModel,
            compute_device=REAL.models.compute_device,
            compute_plan=SimpleNamespace(),
            utils=SimpleNamespace(),
        ),
    )
    monkeypatch.setattr(FakeModel, "calls", [])
    monkeypatch.setattr(device, "coremltools", lambda: fake)
    monkeypatch.setattr(device, "available", lambda: None)
    fake.models.utils.compile_model = as_in(REAL.models.utils.compile_model, fake_compile)
    return fake


def fake_compile(model, destination_path):
    from pathlib import Path

    assert isinstance(model, str)
    assert destination_path.endswith(".mlmodelc"), "the real one refuses other names"
    Path(destination_path).mkdir()
    Path(destination_path, "model.mil").write_text(f"compiled {Path(model).name}")
    return destination_path


def bundle(tmp_path):
    return SimpleNamespace(folder=tmp_path, meta={"parts": PARTS})


# -- elsewhere -------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
@pytest.mark.parametrize(
    "call",
    [
        lambda folder: CoreMLBackend(bundle(folder)),
        lambda folder: compile_package(folder / "m.mlpackage"),
        lambda folder: placements(folder / "m.mlpackage"),
    ],
)
def test_elsewhere_the_reason_and_the_command_are_told(tmp_path, call):
    with pytest.raises(MismatchError, match="macOS only") as caught:
        call(tmp_path)
    assert f"a1q verify {tmp_path} --against" in str(caught.value)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_reasons(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert "macOS only" in device.available()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(device.platform, "mac_ver", lambda: ("14.7.1", ("", "", ""), "arm64"))
    assert device.available() == "packages with states need macOS 15, and this is macOS 14.7.1"
    monkeypatch.setattr(device.platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert "libcoremlpython" in device.available()
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    assert device.available() is None


# -- running ---------------------------------------------------------------------------------------------------------
def test_one_state_serves_all_parts(mac, tmp_path):
    backend = CoreMLBackend(bundle(tmp_path), "CPU_AND_NE")
    state = backend.new_state()
    inputs = {"x": np.zeros((1, 2), np.float32)}
    for part, function in [("embeddings", "main"), ("ffn_1", "prefill"), ("ffn_2", "prefill"), ("ffn_1", "prefill")]:
        outputs = backend.run(part, function, inputs, state)
        assert outputs["y"].dtype == np.float32
    assert set(inputs) == {"x"}, "the caller's inputs stay as they are"
    loads = [call for call in FakeModel.calls if call[0] == "load"]
    assert [call[1] for call in loads] == [
        ("f1.mlpackage", "infer"), ("e.mlpackage", None), ("f1.mlpackage", "prefill"), ("f2.mlpackage", "prefill"),
    ]  # fmt: skip
    assert {call[2] for call in loads} == {"CPU_AND_NE"}
    states = [call[2] for call in FakeModel.calls if call[0] == "predict"]
    assert states == [None, state, state, state], "parts without a cache get none"
    assert backend.name == "Core ML, CPU_AND_NE"


def test_core_ml_own_words_are_told(mac, tmp_path, monkeypatch):
    backend = CoreMLBackend(bundle(tmp_path))
    with pytest.raises(StageError, match=r"e\.mlpackage, function main: Core ML says: .*wrong input"):
        backend.run("embeddings", "main", {"wrong": np.zeros(1)}, None)

    class Refused(FakeModel):
        def __init__(self, model, compute_units, function_name=None):
            super().__init__(model, compute_units, function_name)
            warnings.warn("Underlying exception message was: no such opset", RuntimeWarning, stacklevel=1)
            self.__proxy__ = None

    monkeypatch.setattr(mac.models, "MLModel", Refused)
    with pytest.raises(StageError, match=r"can't load .*f1\.mlpackage, function infer: .*no such opset"):
        CoreMLBackend(bundle(tmp_path)).new_state()


def test_compute_units_are_those_of_coremltools():
    assert set(device.COMPUTE_UNITS) == set(REAL.ComputeUnit.__members__)


# -- compiling -------------------------------------------------------------------------------------------------------
def test_compile_replaces_an_older_one(mac, tmp_path):
    out = tmp_path / "m.mlmodelc"
    for _ in range(2):
        assert compile_package(tmp_path / "m.mlpackage") == out
        assert (out / "model.mil").read_text() == "compiled m.mlpackage"
        assert [path.name for path in tmp_path.iterdir()] == ["m.mlmodelc"], "nothing is left beside it"
        (out / "stale").touch()
    assert compile_package(tmp_path / "m.mlpackage", tmp_path / "other.mlmodelc").name == "other.mlmodelc"


def test_a_failed_compilation_leaves_the_older_one(mac, tmp_path):
    compile_package(tmp_path / "m.mlpackage")

    def broken(model, destination_path):
        fake_compile(model, destination_path)
        raise RuntimeError("compiler: bad program")

    mac.models.utils.compile_model = broken
    with pytest.raises(StageError, match="Core ML says: compiler: bad program"):
        compile_package(tmp_path / "m.mlpackage")
    assert (tmp_path / "m.mlmodelc" / "model.mil").read_text() == "compiled m.mlpackage"
    assert [path.name for path in tmp_path.iterdir()] == ["m.mlmodelc"]


# -- placement -------------------------------------------------------------------------------------------------------
def operation(name, kind, blocks=()):
    from coremltools.models import compute_plan as real

    output = real.MLModelStructureProgramNamedValueType(name, real.MLModelStructureProgramValueType())
    return real.MLModelStructureProgramOperation({}, kind, [output], list(blocks), None)


@pytest.fixture
def planned(mac):
    """A compute plan of real coremltools classes: a convolution, a gather, an operation nobody knows, one inside."""
    from coremltools.models import compute_device
    from coremltools.models import compute_plan as real

    engine, processor = (
        object.__new__(kind) for kind in (compute_device.MLNeuralEngineComputeDevice, compute_device.MLCPUComputeDevice)
    )
    inner = real.MLModelStructureProgramBlock([], [operation("inside", "ios18.add")], [])
    operations = [
        operation("weight", "const"),
        operation("dense", "ios18.constexpr_lut_to_dense"),
        operation("conv_0", "ios18.conv"),
        operation("gather_0", "ios17.gather"),
        operation("loop", "while_loop", [inner]),
    ]
    block = real.MLModelStructureProgramBlock([], operations, [])
    program = real.MLModelStructureProgram({"infer": real.MLModelStructureProgramFunction([], block)})
    usage = {
        "conv_0": real.MLComputePlanDeviceUsage(engine, [processor, engine]),
        "gather_0": real.MLComputePlanDeviceUsage(processor, [processor]),
        "inside": real.MLComputePlanDeviceUsage(engine, [engine]),
    }
    cost = {"conv_0": real.MLComputePlanCost(0.6), "gather_0": real.MLComputePlanCost(0.2)}

    class Plan:
        model_structure = real.MLModelStructure(None, program, None)
        get_compute_device_usage_for_mlprogram_operation = as_in(
            real.MLComputePlan.get_compute_device_usage_for_mlprogram_operation,
            lambda self, operation: usage.get(operation.outputs[0].name),
        )
        get_estimated_cost_for_mlprogram_operation = as_in(
            real.MLComputePlan.get_estimated_cost_for_mlprogram_operation,
            lambda self, operation: cost.get(operation.outputs[0].name),
        )

    paths = []

    def load(path, compute_units):
        paths.append((path, compute_units))
        assert path.endswith(".mlmodelc")
        return Plan()

    checked = as_in(real.MLComputePlan.load_from_path, load)
    mac.models.compute_plan.MLComputePlan = SimpleNamespace(load_from_path=checked)
    return SimpleNamespace(paths=paths, Plan=Plan)


def test_placements(planned, tmp_path):
    found = placements(tmp_path / "m.mlpackage", "ALL")
    assert found == [
        Placement("infer", "conv_0", "conv", "NE", ("CPU", "NE"), 0.6),
        Placement("infer", "gather_0", "gather", "CPU", ("CPU",), 0.2),
        Placement("infer", "loop", "while_loop", "unknown", (), None),
        Placement("infer", "inside", "add", "NE", ("NE",), None),
    ]
    assert planned.paths[0][1] is REAL.ComputeUnit.ALL
    assert list(tmp_path.iterdir()) == [], "what was compiled for the plan is gone"
    placements(tmp_path / "m.mlmodelc")
    assert planned.paths[1] == (str(tmp_path / "m.mlmodelc"), REAL.ComputeUnit.CPU_AND_NE)


def test_summary_of_placements(planned, tmp_path):
    summary = summarize(placements(tmp_path / "m.mlpackage"))
    assert summary.operations == {"NE": 2, "CPU": 1, "unknown": 1}
    assert summary.share_of_operations == {"NE": 0.5, "CPU": 0.25, "unknown": 0.25}
    assert summary.share_of_cost == pytest.approx({"NE": 0.75, "CPU": 0.25, "unknown": 0})
    assert summary.off_engine == {"gather": 1}
    assert summarize([]).share_of_cost == {}


def test_a_model_that_is_no_program(planned, tmp_path):
    planned.Plan.model_structure = SimpleNamespace(program=None)
    with pytest.raises(StageError, match="not an ML program"):
        placements(tmp_path / "m.mlpackage")
