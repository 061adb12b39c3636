import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from a1q.distill.cache import TeacherCache
from a1q.engine.artifact import Artifact
from a1q.engine.stage import PlanContext, StageContext
from a1q.errors import Interrupted, MismatchError, StageError
from a1q.models.checkpoint import load_model
from a1q.models.view import ModelView, ModuleView
from a1q.quant.linear import quantized_modules
from a1q.stages.train import TrainStage
from tests.tiny import tiny_model
from tests.training.student import GROUPS, TUNE, build, read_tensors, run_stage, stage_config, stage_context


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return build(tmp_path_factory.mktemp("train"))


def train(folder: Path, inputs: dict[str, Artifact], **options: Any) -> StageContext:
    ctx = stage_context("train", folder, inputs, **options)
    run_stage(ctx)
    return ctx


def test_distillation_lowers_the_held_out_loss(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    ctx = train(tmp_path, inputs, steps=40, batch={"sequences": 16}, lr={"weights": 2e-2, "scales": 5e-3})
    metrics = ctx.metrics
    assert metrics["kl_after"] < 0.8 * metrics["kl_before"]
    assert metrics["kept_step"] == metrics["best_step"] > 0
    assert not any("WARNING" in line for line in ctx.meta["logs"])


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("trainable", [["weights", "scales", "lut"], ["scales", "lut"]])
def test_the_artifact_computes_with_the_weights_of_the_last_forward_pass(
    tmp_path: Path, inputs: dict[str, Artifact], trainable: list[str], fp16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: as loaded, and, when training saw fp16 factors, after snap too."""
    import a1q.distill.evaluate  # noqa: F401  (nothing else may hold the model)
    import a1q.models.checkpoint as checkpoint

    last: dict[str, torch.Tensor] = {}
    save = checkpoint.save_model

    def spy(model: Any, *args: Any, **options: Any) -> None:
        last.update({name: module.weight.detach().clone() for name, module in quantized_modules(model)})
        save(model, *args, **options)

    monkeypatch.setattr(checkpoint, "save_model", spy)
    ctx = train(tmp_path, inputs, steps=3, trainable=trainable, straight_through_fp16=fp16, keep="last")
    loaded = dict(quantized_modules(load_model(ctx.out)))
    started = dict(quantized_modules(load_model(inputs["model"].path)))
    assert len(last) == 14
    for name, module in loaded.items():
        assert torch.equal(module.weight, last[name]), name
        assert (module.latent is not None) == ("weights" in trainable)
        if "weights" not in trainable:
            assert torch.equal(module.parts()["indices"], started[name].parts()["indices"])
        if fp16:
            module.snap()
        assert torch.equal(module.dequantize(), last[name]), name


@pytest.mark.parametrize("trainable", [["weights", "scales", "lut"], ["scales"]])
def test_layers_computed_again_give_the_same_bits(
    tmp_path: Path, inputs: dict[str, Artifact], trainable: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    calls: list[bool] = []
    forward = Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: calls.append(self.training) or forward(self, x))
    found = []
    for recompute in (False, True):
        calls.clear()
        ctx = train(tmp_path / str(recompute), inputs, steps=3, trainable=trainable, recompute=recompute, keep="last")
        found.append((read_tensors(ctx.out), sum(calls)))
    (tensors, once), (others, twice) = found
    assert twice == 2 * once
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_beside_the_teacher_itself(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    """Training lowers the held-out KL, which is exact, and a second run gives the same bytes."""
    objective = {"kd": "teacher", "online": True, "local": 0.1, "temperature": 2.0}
    options = {"objective": objective, "steps": 20, "batch": {"sequences": 8}, "recompute": True}
    first, second = (train(tmp_path / name, inputs, **options) for name in ("first", "second"))
    assert first.metrics["kl_after"] < 0.9 * first.metrics["kl_before"]
    tokens = TeacherCache(inputs["teacher"].path).batch(range(TUNE), "tune").tokens
    models = (tiny_model(), load_model(first.out))
    with torch.no_grad():
        p, q = (model(input_ids=tokens).logits.double().log_softmax(-1) for model in models)
    assert first.metrics["kl_after"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert (first.out / "model.safetensors").read_bytes() == (second.out / "model.safetensors").read_bytes()


def test_a_teacher_that_changed_is_refused(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    other = {**inputs, "teacher_model": dataclasses.replace(inputs["teacher_model"], digest="x" * 64)}
    with pytest.raises(MismatchError, match="has changed since"):
        train(tmp_path, other, steps=1, objective={"kd": "teacher", "online": True})
    train(tmp_path, other, steps=1)  # its cached answers are all the same


def test_only_the_chosen_group_and_sets_change(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    ctx = train(tmp_path, inputs, steps=2, groups=["mlp"], trainable=["weights", "lut"], keep="last")
    before, after = read_tensors(inputs["model"].path), read_tensors(ctx.out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} <= {"latent", "lut", "indices"}
    assert all(".mlp." in name for name in changed)
    assert sum(name.endswith("latent") for name in changed) == 6


def test_weights_train_from_the_grid_where_there_is_no_latent(tmp_path: Path) -> None:
    inputs = build(tmp_path, latent=False)
    ctx = train(tmp_path / "run", inputs, steps=2)
    assert all(module.latent is not None for _, module in quantized_modules(load_model(ctx.out)))


def test_without_weights_latents_are_dropped_with_a_word(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    ctx = train(tmp_path, inputs, steps=1, trainable=["scales"], groups=["mlp"])
    latents = {name: module.latent is not None for name, module in quantized_modules(load_model(ctx.out))}
    assert all(kept == (".self_attn." in name) for name, kept in latents.items())
    assert any("latents are dropped" in line for line in ctx.meta["logs"])


def test_norms_train_when_asked(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    ctx = train(tmp_path, inputs, steps=1, trainable=["norms"], keep="last", warmup=0)
    before, after = read_tensors(inputs["model"].path), read_tensors(ctx.out)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all("norm" in name for name in changed)


def test_kill_9_and_resume_ends_with_the_same_bytes(tmp_path: Path) -> None:
    inputs = build(tmp_path)
    whole = train(tmp_path / "whole", inputs, steps=8)
    command = [sys.executable, "-m", "tests.training.student", str(tmp_path), "train", "train", "7"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    resumed = train(tmp_path / "killed", inputs, steps=8)
    assert resumed.metrics["resumed_from"] == 6
    for file in ("model.safetensors", "config.json"):
        assert (whole.out / file).read_bytes() == (resumed.out / file).read_bytes()


def test_sigterm_leaves_a_run_that_goes_on(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    whole = train(tmp_path / "whole", inputs, steps=6)
    ctx = stage_context("train", tmp_path / "stopped", inputs, steps=6)
    asked = iter([0, 0, 0, signal.SIGTERM])
    ctx.should_stop = lambda: next(asked)
    with pytest.raises(Interrupted):
        run_stage(ctx)
    assert not any(ctx.out.iterdir())
    resumed = train(tmp_path / "stopped", inputs, steps=6)
    assert resumed.metrics["resumed_from"] == 4
    assert (whole.out / "model.safetensors").read_bytes() == (resumed.out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["train", "lora_recover"])
@pytest.mark.parametrize("field", ["tokenizer", "chat_template"])
def test_a_cache_of_another_tokenizer_or_template_is_refused(tmp_path: Path, stage: str, field: str) -> None:
    inputs = build(tmp_path)
    description = inputs["teacher"].path / "teacher.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), field: "0123456789abcdef"}))
    with pytest.raises(MismatchError, match=f"`{field}` of the cache is 0123456789ab, the model's is ") as error:
        run_stage(stage_context(stage, tmp_path / "run", inputs))
    assert error.value.problems[0].path == f"stages.{stage}.objective.kd"


def test_another_vocabulary_is_refused(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    other = build(tmp_path)["teacher"]
    description = other.path / "teacher.json"
    description.write_text(description.read_text().replace('"vocabulary": 320', '"vocabulary": 512'))
    with pytest.raises(MismatchError, match="student's vocabulary is 320, the teacher's 512"):
        train(tmp_path / "run", {**inputs, "teacher": other}, steps=1)


# -- plan ------------------------------------------------------------------------------------------------------------
def view(**states: str) -> ModelView:
    modules = {}
    for name, state in states.items():
        full = f"model.layers.0.mlp.{name}_proj"
        scheme = {"scheme": "lut_lowrank", "bits": 2, "rank": 1} if state != "dense" else None
        modules[full] = ModuleView(full, (96, 64), state=state, scheme=scheme)
    return ModelView(modules, 50_000, {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2})


def plan(model: ModelView, teacher: dict[str, Any] | None = None, **options: Any) -> tuple[Any, list[tuple[str, ...]]]:
    problems: list[tuple[str, ...]] = []

    def report(path: str, message: str, hint: str, mismatch: bool) -> None:
        problems.append((path, message, hint, "mismatch" if mismatch else "recipe"))

    config = stage_config("train", {"objective": {"kd": "teacher"}, **options})
    views = {"model": model, "teacher": teacher or {"vocabulary": 320, "seq_len": 16, "random_negatives": 32}}
    return TrainStage().plan(PlanContext("train", config, views, GROUPS, {}, report)), problems


def test_plan_names_what_trains_and_what_it_takes() -> None:
    outcome, problems = plan(view(gate="quantized", up="quantized", down="dense"))
    assert problems == []
    assert outcome.view.modules["model.layers.0.mlp.gate_proj"].state == "quantized"
    assert outcome.notes[0] == "trains weights, scales, lut of 2 modules"
    assert "down_proj" not in "".join(outcome.notes)
    only_scales, _ = plan(view(gate="quantized", up="quantized", down="dense"), trainable=["scales"])
    assert {module.latent for module in outcome.view.modules.values()} == {True, False}
    assert not any(module.latent for module in only_scales.view.modules.values())
    assert only_scales.disk_bytes == outcome.disk_bytes - 2 * 4 * 96 * 64
    assert only_scales.memory_bytes < outcome.memory_bytes
    assert only_scales.notes[-1] == f"checkpoints take up to {3 * 16 * 2 * (96 + 64 + 1) / 1e6:,.1f} MB while it trains"


@pytest.mark.parametrize(
    ("states", "options", "message", "hint"),
    [
        ({"gate": "dense"}, {}, "no module of the model here is quantized", "put a `quantize` stage before it"),
        ({"gate": "snapped"}, {}, "snapped modules no longer train", "put it before `snap`"),
        ({"gate": "quantized", "up": "dense"}, {"groups": ["gate_up"]}, "1 modules are dense", "quantize them before"),
        ({"gate": "quantized"}, {"groups": ["mpl"]}, "no group 'mpl'", "did you mean 'mlp'?"),
    ],
)
def test_plan_refuses_a_wrong_order(
    states: dict[str, str], options: dict[str, Any], message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from a1q.engine.stage import Group

    monkeypatch.setitem(GROUPS, "gate_up", Group("gate_up", r"model\.layers\.\d+\.mlp\.(gate|up)_proj"))
    _, problems = plan(view(**states), **options)
    assert len(problems) == 1
    assert message in problems[0][1] and hint in problems[0][2] and problems[0][3] == "recipe"


def test_plan_refuses_to_train_nothing() -> None:
    model = view(gate="quantized")
    name = next(iter(model.modules))
    scheme = {"scheme": "lut_lowrank", "bits": 2, "rank": 1, "lut": "fixed"}
    fixed = model.replace({name: dataclasses.replace(model.modules[name], scheme=scheme)})
    _, problems = plan(fixed, trainable=["lut"])
    assert problems[0][:2] == ("trainable", "there is nothing to train: these modules' schemes have no lut")
    assert plan(fixed, trainable=["lut", "scales"])[1] == []


def test_plan_refuses_a_teacher_that_cannot_serve() -> None:
    whole = {"vocabulary": 320, "top_k": 320, "seq_len": 16, "random_negatives": 0}
    assert plan(view(gate="quantized"), whole)[1] == []
    teacher = {"vocabulary": 512, "seq_len": 16, "random_negatives": 0}
    _, problems = plan(view(gate="quantized"), teacher)
    assert {(path, kind) for path, _, _, kind in problems} == {
        ("objective.tail", "recipe"),
        ("objective.kd", "mismatch"),
    }


def test_plan_of_a_teacher_that_runs_along() -> None:
    teacher = {"vocabulary": 320, "seq_len": 16, "random_negatives": 0, "parameters": 70_000, "config": {}}
    teacher["config"] = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    model = view(gate="quantized")
    cached, _ = plan(model, {**teacher, "random_negatives": 8})
    online, problems = plan(model, teacher, objective={"kd": "teacher", "online": True, "temperature": 2.0})
    local, more = plan(model, teacher, objective={"kd": "teacher", "online": True, "local": 0.1})
    assert problems == more == []
    assert online.memory_bytes > cached.memory_bytes + 4 * 70_000
    assert local.memory_bytes == online.memory_bytes + 4 * 16 * 16 * (2 * 2 * 64)
    deeper = {**teacher, "config": {**teacher["config"], "num_hidden_layers": 3}}
    _, problems = plan(model, deeper, objective={"kd": "teacher", "online": True, "local": 0.1})
    assert [(path, kind) for path, _, _, kind in problems] == [("objective.local", "mismatch")]
    assert "2 layers of width 64, the teacher 3 of 64" in problems[0][1]
    assert plan(model, deeper, objective={"kd": "teacher", "online": True})[1] == []


@pytest.mark.parametrize(
    ("objective", "path", "hint"),
    [
        ({"online": True, "tail": "bucket"}, "objective.tail", "leave `tail` out"),
        ({"local": 0.1}, "objective.local", "put `online: true` beside it"),
    ],
)
def test_plan_refuses_an_objective_that_contradicts_itself(objective: dict[str, Any], path: str, hint: str) -> None:
    _, problems = plan(view(gate="quantized"), objective={"kd": "teacher", **objective})
    assert [(found, tip, kind) for found, _, tip, kind in problems] == [(path, hint, "recipe")]


def test_planning_imports_no_torch() -> None:
    code = "import sys, a1q.stages.train, a1q.stages.lora_recover; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_on_the_way_are_kept_whole_and_survive_a_resume(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    ctx = train(tmp_path, inputs, steps=5, keep_every=2, keep="last", groups=["mlp"])
    kept = sorted(path.name for path in (ctx.out / "steps").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    short = train(tmp_path / "short", inputs, steps=5, keep_every=4, keep="last", groups=["mlp"])
    found, same = (read_tensors(each.out / "steps" / "step-00000004") for each in (ctx, short))
    end = read_tensors(ctx.out)
    assert found.keys() == same.keys() == end.keys(), "also the latents of what doesn't train"
    assert all(torch.equal(found[name], tensor) for name, tensor in same.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in end.items())
    assert load_model(ctx.out / "steps" / "step-00000002").config.vocab_size == 320


def test_a_start_that_is_not_finite_ends_at_once(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(inputs["model"].path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.a"][3] = torch.nan
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, folder / "model.safetensors", metadata)
    broken = {**inputs, "model": Artifact("model", folder, "b" * 64)}
    with pytest.raises(
        StageError, match=r"nan before the first step; not finite are model\.layers\.0\.mlp\.up_proj\.a"
    ):
        train(tmp_path / "run", broken, steps=5)


def test_out_of_memory_names_what_to_lower(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from a1q.training.distillation import Distillation

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Distillation, "loss_of", full)
    with pytest.raises(StageError) as caught:
        train(tmp_path, inputs, steps=5, batch={"sequences": 6, "accumulate": 2})
    text = str(caught.value)
    for part in (
        "`batch.sequences` from 6 to 3 (with `batch.accumulate` from 2 to 4",
        "`recompute` from false to true",
        "`seq_len` from 16 to 8",
    ):
        assert part in text


def test_a_step_larger_than_the_cache_is_refused() -> None:
    problems: list[tuple[str, str]] = []
    view = ModelView(
        {"model.a": ModuleView("model.a", (8, 8), state="quantized", scheme={"scheme": "lut", "bits": 2})}, 64, {}
    )
    ctx = PlanContext(
        "t",
        stage_config("train", {"objective": {"kd": "teacher"}, "batch": {"sequences": 8, "accumulate": 3}}),
        {"model": view, "teacher": {"sequences": 20}},
        GROUPS,
        {},
        lambda path, message, hint, mismatch: problems.append((path, message)),
    )
    TrainStage().plan(ctx)
    assert ("batch.sequences", "a step reads 8 x 3 sequences, and the teacher cache has 20") in problems
