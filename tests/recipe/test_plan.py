"""Planning: views flow along, problems are collected with the right exit code, and nothing cascades."""

import pytest

from a1q.engine.artifact import Artifact
from a1q.engine.stage import Group, Runtime
from a1q.errors import MismatchError, Problem, RecipeError
from a1q.models.view import ModelView, ModuleView
from a1q.quant.schemes.lut_lowrank import LutLowrank
from a1q.recipe import plan as plan_module
from a1q.recipe import runtime
from a1q.recipe.plan import make_plan

RECIPE = """\
a1q: 1
name: base
seed: 7
runtime: {device: cpu, threads: 2}
model: {source: here}
data:
  text: {source: builtin:prose}
groups:
  mlp: {match: '.*mlp.*'}
  odd: {match: 'nothing'}
stages:
  - teach: {model: {source: larger}}
  - id: g
    grow:
      steps: 3
      data: text
      groups: [mlp]
  - id: last
    from: g
    grow: {steps: 5}
"""
VIEW = ModelView(
    {
        name: ModuleView(name, (4, 4), scheme={"scheme": "lut_lowrank", "bits": 4} if "up" in name else None)
        for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.norm")
    },
    36,
)


@pytest.fixture
def plan(load, registry, monkeypatch):
    """Plan a recipe's text; the models `here` and `larger` exist."""

    def read_model(self, source, revision):
        if source == "nowhere":
            raise MismatchError([Problem("no such model", hint="look again")])
        return Artifact("model", plan_module.__file__, f"digest-{source}", {"source": source}), VIEW

    monkeypatch.setattr(plan_module._Planner, "_read_model", read_model)
    return lambda text=RECIPE, **options: make_plan(load(text), registry, **options)


def test_a_plan_holds_everything_the_interpreter_needs(plan):
    made = plan()
    assert (made.name, made.seed, made.source.digest) == ("base", 7, "digest-here")
    assert made.runtime == Runtime("cpu", "no", "fp32", 2)
    assert made.resolved["stages"][1]["grow"]["mode"] == "fast"
    teach, grow, last = made.stages
    assert (teach.type, teach.output) == ("teach", "teacher")
    assert teach.inputs["model"] == "model"
    assert teach.inputs["larger"].digest == "digest-larger"
    assert teach.outcome.view == {"larger": True}
    assert grow.inputs == {"model": "model", "teacher": "teach"}
    assert grow.config.steps == 3
    assert grow.config.groups == ("mlp",)
    assert grow.options["rate"] == 1.0
    assert grow.groups == {"mlp": Group("mlp", ".*mlp.*")}
    assert grow.modules == {"mlp": ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")}
    assert grow.data.keys() == {"text"}
    assert grow.plugins == {"stages/grow": "digest-of-grow"}
    assert grow.parts == {"schemes/lut_lowrank": LutLowrank.version}
    assert last.inputs == {"model": "g", "teacher": "teach"}


def test_smoke_makes_every_stage_tiny_and_leaves_the_recipe_alone(plan):
    made = plan(smoke=True)
    assert made.smoke
    assert made.stages[1].config.steps == 1
    assert made.stages[1].options["inner"] == {"depth": 1}
    assert made.resolved["stages"][1]["grow"]["steps"] == 3


@pytest.mark.parametrize(
    ("changes", "error", "lines"),
    [
        ({"steps: 3": "steps: 13"}, RecipeError, [15]),
        ({"steps: 3": "steps: 14"}, MismatchError, [15]),
        ({"[mlp]": "[odd]"}, MismatchError, [17]),
        ({"[mlp]": "[mpl]"}, RecipeError, [17]),
        ({"source: here": "source: nowhere"}, MismatchError, [5]),
        ({"source: larger": "source: nowhere"}, MismatchError, [12]),
        # the stage after a broken one is not planned: its own problem shows once the first is solved
        ({"steps: 3": "steps: 14", "steps: 5": "steps: 14"}, MismatchError, [15]),
        ({"steps: 3": "steps: 14", "[mlp]": "[mpl]"}, RecipeError, [15, 17]),
        ({"steps: 3": "steps: 14", "from: g": "from: model", "steps: 5": "steps: 13"}, RecipeError, [15, 20]),
    ],
)
def test_problems_are_collected_without_cascades(plan, changes, error, lines):
    text = RECIPE
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(error) as caught:
        plan(text)
    assert [problem.line for problem in caught.value.problems] == lines


def test_a_problem_of_a_source_is_shown_at_the_source(plan):
    with pytest.raises(MismatchError) as caught:
        plan(RECIPE.replace("source: here", "source: nowhere"))
    [problem] = caught.value.problems
    assert (problem.column, problem.path, problem.hint) == (17, "model.source", "look again")


def test_a_device_that_can_not_be_here_is_refused(plan, monkeypatch):
    monkeypatch.setattr(runtime.platform, "system", lambda: "Linux")
    with pytest.raises(MismatchError, match="not a Mac") as caught:
        plan(RECIPE.replace("device: cpu", "device: mps"))
    [problem] = caught.value.problems
    assert (problem.line, problem.path) == (4, "runtime.device")
    monkeypatch.setattr(runtime, "version", lambda name: "2.9.0+cpu")
    assert "without cuda" in runtime.refusal("cuda")
    monkeypatch.setattr(runtime, "version", lambda name: "2.9.0")
    assert runtime.refusal("cuda") == runtime.refusal("cpu") == ""
    monkeypatch.setattr(runtime.platform, "system", lambda: "Darwin")
    assert "Mac" in runtime.refusal("cuda")


def test_fp16_on_the_cpu_is_refused(plan):
    with pytest.raises(MismatchError, match="fp16 products on the CPU are slow and overflow") as caught:
        plan(RECIPE.replace("device: cpu", "device: cpu, amp: fp16"))
    [problem] = caught.value.problems
    assert (problem.line, problem.path, problem.hint) == (4, "runtime.amp", "use `amp: bf16` or `amp: no`")
    assert plan(RECIPE.replace("device: cpu", "device: cpu, amp: bf16")).runtime.amp == "bf16"
    assert [runtime.amp_refusal(Runtime(device, "fp16")) for device in ("cuda", "mps")] == ["", ""]


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("flags\t\t: fpu avx512f amx_bf16\nmodel name: x\n", True),
        ("flags\t\t: fpu avx512_bf16\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16x\nbugs\t: bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("processor\t: 0\n", None),
        (None, None),
    ],
)
def test_a_processor_with_bf16_instructions_says_so(tmp_path, cpuinfo, found):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert runtime.multiplies_bf16(tmp_path / "cpuinfo") is found


def test_bf16_is_noted_where_the_processor_lacks_it(monkeypatch):
    for has, noted in ((True, False), (None, False), (False, True)):
        monkeypatch.setattr(runtime, "multiplies_bf16", lambda has=has: has)
        assert ("no bf16 instructions" in runtime.amp_note(Runtime("cpu", "bf16"))) is noted
        assert runtime.amp_note(Runtime("cuda", "bf16")) == runtime.amp_note(Runtime("cpu", "no")) == ""


def written(**changes):
    return {"device": "auto", "amp": "auto", "params": "fp32", "threads": "auto", "shard": False, **changes}


def test_auto_on_a_machine_without_accelerators(monkeypatch):
    monkeypatch.setattr(runtime, "_device", lambda: "cpu")
    found = runtime.resolve_runtime(written())
    assert found == Runtime("cpu", "no", "fp32", runtime.available_threads())
    assert found.threads >= 1


def test_auto_takes_bf16_on_cuda_only(monkeypatch):
    monkeypatch.setattr(runtime, "_device", lambda: "cuda")
    assert runtime.resolve_runtime(written()).amp == "bf16"
    assert runtime.resolve_runtime(written(device="cpu")).amp == "no"
    assert runtime.resolve_runtime(written(amp="no", threads=3)) == Runtime("cuda", "no", "fp32", 3)


def test_devices_are_told_by_cheap_signs(monkeypatch):
    monkeypatch.setattr(runtime.platform, "system", lambda: "Linux")
    monkeypatch.setattr(runtime.Path, "exists", lambda self: True)
    monkeypatch.setattr(runtime, "version", lambda name: "2.9.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runtime._device() == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runtime._device() == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(runtime, "version", lambda name: "2.9.0+cpu")
    assert runtime._device() == "cpu"
    monkeypatch.setattr(runtime.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(runtime.platform, "machine", lambda: "arm64")
    assert runtime._device() == "mps"


def test_where_a_model_of_a_stage_lies_is_not_in_its_options(plan):
    teach, moved = plan().stages[0], plan(RECIPE.replace("larger", "elsewhere")).stages[0]
    assert teach.options == moved.options == {"model": {}}
    assert teach.config.model["source"] == "larger"
    assert teach.inputs["larger"].digest == "digest-larger" != moved.inputs["larger"].digest
