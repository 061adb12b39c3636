"""`form` of `train` and `eval`: other ways to compute, the same results."""

from pathlib import Path
from typing import Any

import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.quant.linear import QuantLinear
from tests.distill.workspace import write_text
from tests.stages.quantizing import plan, run, view_of
from tests.training.student import build, read_tensors

FORMS = ("factored", "batched")
OPTIONS = {
    "objective": {"kd": "t"},
    "steps": 4,
    "batch": {"sequences": 4},
    "keep": "last",
    "trainable": ["scales", "lut"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return build(tmp_path_factory.mktemp("forms"), spec={"scheme": "lut_lowrank", "bits": 2, "rank": 3})


@pytest.mark.parametrize("form", FORMS)
def test_training_in_any_form_ends_alike(
    tmp_path: Path, inputs: dict[str, Artifact], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    project = QuantLinear.project
    monkeypatch.setattr(QuantLinear, "project", lambda self, x: used.append(self.form) or project(self, x))
    found = {}
    for name in ("dense", form):
        used.clear()
        made, ctx = run("train", tmp_path, inputs, {**OPTIONS, "form": name})
        assert set(used) == {name}
        found[name] = ctx.metrics["kl_after"], read_tensors(made.path)
    (kl, tensors), (other_kl, others) = found["dense"], found[form]
    assert other_kl == pytest.approx(kl, rel=1e-4)
    moved = read_tensors(inputs["model"].path)
    for name, tensor in tensors.items():
        if name.endswith(("indices", ".gain")):
            assert torch.equal(tensor, others[name])
        elif name.endswith((".a", ".b", ".g", ".lut")):
            distance = (tensor - moved[name]).norm()
            assert float((others[name] - tensor).norm()) < 0.02 * float(distance), name


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_the_weight(form: str, fp16: bool) -> None:
    """Against autograd through the written-out weight, in float64."""
    torch.manual_seed(2)
    module = QuantLinear.quantize(torch.nn.Linear(24, 16), {"scheme": "lut_lowrank", "bits": 2, "rank": 3})
    module.drop_latent()
    module.straight_through_fp16 = fp16
    module.form = form
    x, pull = torch.randn(7, 24, requires_grad=True), torch.randn(7, 16)
    (module(x) * pull).sum().backward()
    lut, a, g, b = (getattr(module, name).detach().double().requires_grad_() for name in ("lut", "a", "g", "b"))
    root = g.sqrt()
    left, right, table = a * root, root[:, None] * b, lut
    if fp16:  # the value of the rounded factor, the gradient of the unrounded one
        left, right, table = (part + (part.half().double() - part).detach() for part in (left, right, lut))
    weight = table[module.indices.long()] * (left @ right)
    y = x.detach().double() @ weight.T + module.bias.detach().double()
    (y * pull.double()).sum().backward()
    torch.testing.assert_close(module(x).double(), y, rtol=1e-4, atol=1e-5)
    for name, reference in (("lut", lut), ("a", a), ("g", g), ("b", b)):
        torch.testing.assert_close(getattr(module, name).grad.double(), reference.grad, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), pull.double() @ weight.detach(), rtol=1e-4, atol=1e-5)


def test_schemes_without_the_form_and_weights_that_train_are_problems_at_form(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    flat = build(tmp_path, spec={"scheme": "lut", "bits": 2})["model"]

    def first(model: Artifact, **options: Any) -> tuple[str, str, str, bool]:
        (problem,) = plan("train", {"model": view_of(model), "teacher": None}, {**OPTIONS, **options})[1]
        return problem

    path, message, _, mismatch = first(flat, form="factored", trainable=["lut"])
    assert (path, mismatch) == ("form", False)
    assert message.startswith("lut has no factored form: model.layers.{0..1}.")
    path, message, _, _ = first(inputs["model"], form="batched", trainable=["weights", "scales"])
    assert path == "form" and "holds indices still" in message
    outcome, problems = plan(
        "train", {"model": view_of(inputs["model"]), "teacher": None}, {**OPTIONS, "form": "factored"}
    )
    assert problems == []
    assert "factored: 3 products where the dense form has one, in 14 linears" in outcome.notes


def test_evaluation_in_any_form_finds_the_same(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    entry = write_text(tmp_path / "text.jsonl")
    snapped, _ = run("snap", tmp_path / "snapped", {"model": inputs["model"]}, {})
    found = {}
    for form in ("dense", *FORMS):
        options = {"data": "text", "sequences": 4, "form": form}
        outcome, problems = plan("eval", {"model": view_of(snapped), "teacher": None}, options, {"text": entry})
        assert problems == []
        assert any("3 products" in note for note in outcome.notes) == (form != "dense")
        _, ctx = run("eval", tmp_path / form, {"model": snapped}, options, {"text": entry})
        found[form] = ctx.metrics["loss"]
    assert len(set(found.values())) > 1, "all forms computed alike, to the last bit"
    assert found["factored"] == pytest.approx(found["dense"], rel=1e-5)
    assert found["batched"] == pytest.approx(found["dense"], rel=1e-5)
    dense = Artifact("model", inputs["teacher_model"].path, "")
    ((path, message, _, _),) = plan("eval", {"model": view_of(dense), "teacher": None}, options, {"text": entry})[1]
    assert path == "form" and "no linear here is quantized" in message
