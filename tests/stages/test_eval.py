import json

import pytest
from transformers import AutoModelForCausalLM

from a1q.data import token_sequences
from a1q.distill.evaluate import evaluate_model
from a1q.engine.registry import load_registry
from a1q.errors import MismatchError
from a1q.models.view import DENSE, QUANTIZED, ModelView, ModuleView
from a1q.recipe.schema import Checker
from a1q.stages.eval import COMPARED, OWN, EvalStage, failed_gates
from a1q.stages.kd import KdStage
from tests.distill.workspace import as_artifact, model_artifact, plan_stage, run_stage, write_text
from tests.stages.test_kd import options as kd_options


def check(values):
    """The findings of the schema alone."""
    registry = load_registry()
    return list(Checker(registry).check(registry.schema("stages", "eval"), values))


def options(**changes):
    registry = load_registry()
    values = {"data": "text", "sequences": 9, "batch": 4, **changes}
    assert not check(values)
    return Checker(registry).fill(registry.schema("stages", "eval"), values, set())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def entry(place):
    return write_text(place / "text.jsonl")


@pytest.fixture(scope="module")
def teacher(place):
    return model_artifact(place / "teacher")


@pytest.fixture(scope="module")
def student(place):
    return model_artifact(place / "student", seed=8)


@pytest.fixture(scope="module")
def cache(place, teacher, entry):
    made = run_stage(KdStage, kd_options(), {"model": teacher}, entry, place / "cache")
    return as_artifact("teacher", made.out, **made.meta)


def test_figures_are_those_of_the_models_on_the_test_side(student, teacher, cache, entry, tmp_path):
    seen = []
    found = run_stage(
        EvalStage,
        options(against="teacher"),
        {"model": student, "teacher": cache, "teacher_model": teacher},
        entry,
        tmp_path,
        emit=lambda kind, values: seen.append(values),
    )
    tokens = token_sequences(entry.config, student.path, "test", 16, 9, 0)
    models = [AutoModelForCausalLM.from_pretrained(item.path) for item in (student, teacher)]
    wanted = evaluate_model(*models, tokens)
    assert wanted["kl"] > 0.1
    assert {name: found.metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert found.metrics["bpw"] == found.metrics["bpw_model"] == 16
    assert found.meta["failed_gates"] == []
    report = json.loads((found.out / "report.json").read_text())
    assert report["metrics"] == found.metrics
    assert report["model"] == student.digest and report["data"]["split"] == "test"
    assert seen[-1]["step"] == seen[-1]["total"] == 9


def test_another_seed_reads_the_same_text(student, entry, tmp_path):
    """Figures of two stages, or of two recipes, are of one text."""
    found = [
        run_stage(EvalStage, options(), {"model": student, "teacher": None}, entry, tmp_path / str(seed), seed=seed)
        for seed in (1, 2)
    ]
    assert found[0].metrics == found[1].metrics


def test_without_a_teacher(student, entry, tmp_path):
    found = run_stage(EvalStage, options(), {"model": student, "teacher": None}, entry, tmp_path)
    assert set(found.metrics) == {"loss", "ppl", "tokens", "bpw", "bpw_model"}


def test_a_failed_gate_is_noted_and_the_figures_kept(student, cache, teacher, entry, tmp_path):
    gate = {"kl": {"max": 1e-6}, "top1": {"min": 0}, "bpw": {"max": 3}}
    inputs = {"model": student, "teacher": cache, "teacher_model": teacher}
    found = run_stage(EvalStage, options(against="teacher", gate=gate), inputs, entry, tmp_path)
    failed = found.meta["failed_gates"]
    assert len(failed) == 2
    assert failed[0].startswith("kl is ") and failed[0].endswith(" above its max of 1e-06")
    assert failed[1] == "bpw is 16, above its max of 3"
    assert json.loads((found.out / "report.json").read_text())["failed_gates"] == failed


def test_another_tokenizer_than_the_cache_is_refused(cache, teacher, entry, tmp_path):
    other = model_artifact(tmp_path / "other", vocab_size=300)
    inputs = {"model": other, "teacher": cache, "teacher_model": teacher}
    with pytest.raises(MismatchError, match="tokenizer"):
        run_stage(EvalStage, options(against="teacher"), inputs, entry, tmp_path)


@pytest.mark.parametrize(
    ("bound", "value", "text"),
    [
        ({"max": 1.0}, 1.0, None),
        ({"max": 1.0}, 1.5, "kl is 1.5, above its max of 1"),
        ({"min": 0.5}, 0.4, "kl is 0.4, below its min of 0.5"),
        ({"min": 0.5, "max": 0.6}, 0.55, None),
        ({"max": 1.0}, float("nan"), "kl is nan, above its max of 1"),
        ({"min": 1.0}, float("nan"), "kl is nan, below its min of 1"),
    ],
)
def test_failed_gates(bound, value, text):
    assert failed_gates({"kl": bound}, {"kl": value}) == ({} if text is None else {"kl": text})


def view(state=DENSE):
    scheme = None if state == DENSE else {"scheme": "lut_lowrank", "bits": 2, "rank": 1}
    module = ModuleView("a", (64, 64), state=state, scheme=scheme)
    return ModelView({"a": module}, parameters=3 * 64 * 64, config={"vocab_size": 320})


def test_plan_tells_the_bits_and_which_gates_on_them_will_fail():
    gate = {"bpw": {"max": 2.1}, "bpw_model": {"max": 12}}
    outcome, problems = plan_stage(EvalStage, options(gate=gate), {"model": view(QUANTIZED)})
    assert not problems
    assert outcome.memory_bytes > 0
    lines = "\n".join(outcome.notes)
    assert "9 sequences of 16 tokens" in lines
    assert "this gate will fail: bpw is 2.5" in lines and "bpw_model is" not in lines


def test_gates_against_a_teacher_need_one():
    gate = {name: {"max": 1} for name in OWN + COMPARED}
    _, problems = plan_stage(EvalStage, options(gate=gate), {"model": view()})
    assert [problem[0] for problem in problems] == [f"gate.{name}" for name in COMPARED]
    for _, message, hint, mismatch in problems:
        assert "needs a teacher" in message and "against: ID" in hint and not mismatch
    assert not plan_stage(EvalStage, options(gate=gate, against="teacher"), {"model": view()})[1]


def test_a_gate_on_an_unknown_metric_names_the_nearest():
    (finding,) = check({"data": "text", "gate": {"kll": {"max": 1}}})
    assert finding.path == ("gate", "kll") and finding.hint == "did you mean 'kl'?"


@pytest.mark.parametrize("gate", [{"kl": {}}, {"kl": {"maximum": 1}}, {"kl": {"max": "low"}}, {"kl": 0.02}])
def test_malformed_gates_are_refused_by_the_schema(gate):
    assert check({"data": "text", "gate": gate})
