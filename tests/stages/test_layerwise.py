"""`train: {layerwise: ...}`: what trains in which turn, going back, resuming, and what a plan says of it."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.engine.stage import Group, PlanContext, StageContext
from a1q.errors import Interrupted
from a1q.models.checkpoint import load_model
from a1q.models.view import ModelView, ModuleView
from a1q.quant.linear import quantized_modules
from a1q.stages.train import TrainStage
from a1q.training import layerwise
from tests.tiny import tiny_model
from tests.training.student import GROUPS, build, read_tensors, run_stage, stage_config, stage_context
from tests.training.test_step_loss import layer_states

ONLINE = {"kd": "teacher", "online": True, "local": 1.0, "hard_top1": 0.2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return build(tmp_path_factory.mktemp("layerwise"))


def context(folder: Path, inputs: Mapping[str, Artifact], **options: Any) -> StageContext:
    """A stage's context; what it tells of its progress is collected in `ctx.meta["progress"]`."""
    ctx = stage_context("train", folder, inputs, **{"layerwise": {}, "steps": 3, **options})
    progress, emit = ctx.meta.setdefault("progress", []), ctx.emit

    def both(kind: str, values: Mapping[str, Any]) -> None:
        emit(kind, values)
        if kind == "progress":
            progress.append(dict(values))

    ctx.emit = both
    return ctx


def train(folder: Path, inputs: Mapping[str, Artifact], **options: Any) -> StageContext:
    ctx = context(folder, inputs, **options)
    run_stage(ctx)
    return ctx


class Turns:
    """What the layers' turns look like from within the loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[dict[str, Any]] = []
        loop = layerwise.run_loop

        def spy(ctx: StageContext, **given: Any) -> Any:
            objective = given["evaluate"].__self__
            latents = [name for name, module in quantized_modules(objective.model) if module.latent is not None]
            turn = {"trains": sorted(given["state"]), "latents": latents, "name": given["spec"].name}
            self.seen.append(turn)
            turn["result"] = loop(ctx, **given)
            return turn["result"]

        monkeypatch.setattr(layerwise, "run_loop", spy)


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_layers_train_in_order_one_at_a_time(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the layer's own latents are there in its turn, and its own norms train with it; the final norm doesn't."""
    turns = Turns(monkeypatch)
    ctx = train(tmp_path, inputs, groups=["mlp"], trainable=["weights", "norms"], keep="last", warmup=0)
    assert [turn["name"] for turn in turns.seen] == ["turn-00000", "turn-00001"]
    for index, turn in enumerate(turns.seen):
        layer = f"model.layers.{index}."
        assert all(name.startswith(layer) for name in turn["trains"])
        assert turn["latents"] == [f"{layer}mlp.{kind}_proj" for kind in ("gate", "up", "down")]
        assert {name.removeprefix(layer) for name in turn["trains"] if "norm" in name} == {
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
        }
    before, after = read_tensors(inputs["model"].path), read_tensors(ctx.out)
    assert before.keys() == after.keys(), "attention keeps its latents"
    moved = changed(before, after)
    assert {name.split(".")[2] for name in moved} == {"0", "1"}
    assert all(".mlp." in name or "norm" in name for name in moved) and "model.norm.weight" not in moved
    assert sum(name.endswith("latent") for name in moved) == 6


def test_held_out_divergence_falls_from_turn_to_turn(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    ctx = train(
        tmp_path, inputs, objective=ONLINE, steps=10, batch={"sequences": 8}, evaluate_every=5, lr={"weights": 2e-2}
    )
    metrics = ctx.metrics
    first, second = metrics["layers"]
    assert metrics["kl_after"] == second["kl_after"] < first["kl_after"] < metrics["kl_before"]
    assert metrics["kl_after"] < 0.95 * metrics["kl_before"]
    assert (metrics["steps"], metrics["backtracks"], first["layer"], second["layer"]) == (20, 0, 0, 1)
    assert metrics["first_loss"] == first["first_loss"] and metrics["last_loss"] == second["last_loss"]
    steps = [(item["step"], item["total"], item["layer"]) for item in ctx.meta["progress"]]
    assert steps == [(step, 20, (step - 1) // 10) for step in range(1, 21)]


def test_the_first_turn_is_training_that_layer_alone(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    """With one layer chosen it's the same as a group that names its modules, bit for bit; all else stays as it was."""
    options: dict[str, Any] = {"keep": "last", "steps": 4, "trainable": ["weights", "scales", "lut"]}
    turn = train(tmp_path / "turn", inputs, layerwise={"layers": [1, 1]}, groups=["mlp"], **options)
    alone = context(tmp_path / "alone", inputs, layerwise=None, groups=["last"], **options)
    alone.groups = {**GROUPS, "last": Group("last", r"model\.layers\.1\.mlp\.\w+")}
    run_stage(alone)
    found, wanted = read_tensors(turn.out), read_tensors(alone.out)
    assert found.keys() == wanted.keys()
    assert not changed(wanted, found)
    assert {name.split(".")[2] for name in changed(read_tensors(inputs["model"].path), found)} == {"1"}


def test_a_turn_records_nothing_below_its_layer(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer inputs require a gradient only above the one that trains."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    seen: list[tuple[int, bool]] = []
    forward = Qwen3DecoderLayer.forward

    def watched(self: Any, hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if self.training:
            seen.append((self.self_attn.layer_idx, hidden.requires_grad))
        return forward(self, hidden, *rest, **named)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", watched)
    for layer, wanted in ((0, {(0, False), (1, True)}), (1, {(0, False), (1, False)})):
        seen.clear()
        train(tmp_path / str(layer), inputs, steps=1, layerwise={"layers": [layer, layer]}, trainable=["scales"])
        assert set(seen) == wanted


def test_layers_below_are_not_computed_again(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    calls: list[int] = []
    forward = Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: calls.append(id(self)) or forward(self, x))
    train(tmp_path, inputs, steps=1, layerwise={"layers": [1, 1]}, recompute=True, evaluate_sequences=1)
    evaluations, (lower, upper) = 2, calls[:2]
    assert (calls.count(lower), calls.count(upper)) == (evaluations + 1, evaluations + 2)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("others", ["whole", "top1", "nothing"])
def test_the_local_term_is_that_layers_error_alone(
    tmp_path: Path, inputs: dict[str, Artifact], layer: int, others: str
) -> None:
    """Against the formula in float64, whatever stands beside it; a divergence there is the whole model's."""
    from a1q.distill.cache import TeacherCache
    from a1q.training.batches import batch_rows

    objective = {
        "whole": ONLINE,
        "top1": {**ONLINE, "kl": 0},
        "nothing": {"kd": "teacher", "online": True, "kl": 0, "local": 1.0},
    }[others]
    ctx = train(
        tmp_path,
        inputs,
        objective=objective,
        steps=1,
        layerwise={"layers": [layer, layer]},
        straight_through_fp16=False,
    )
    (told,) = ctx.meta["progress"]
    cache = TeacherCache(inputs["teacher"].path)
    tokens = cache.batch(batch_rows(ctx.seed, 0, 4, cache.size("train")), "train").tokens
    models = load_model(inputs["model"].path).double(), tiny_model().double()
    with torch.no_grad():
        ours, theirs = (layer_states(model, tokens)[layer] for model in models)
        q, p = (model(input_ids=tokens).logits.log_softmax(-1) for model in models)
    errors = (ours - theirs).square().sum(-1) / theirs.square().sum(-1)
    assert told["local"] == pytest.approx(float(errors.mean()), rel=1e-5)
    if others == "whole":
        assert told["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert ("kl" in told, "hard_top1" in told) == (others == "whole", others != "nothing")
    rest = told.get("kl", 0.0) + 0.2 * told.get("hard_top1", 0.0)
    assert told["loss"] == pytest.approx(told["local"] + rest, rel=1e-6)


def test_every_turn_reads_on_in_the_data(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from a1q.distill.cache import TeacherCache

    read: list[int] = []
    batch = TeacherCache.batch

    def noted(self: Any, rows: Any, part: str, *more: Any) -> Any:
        read.extend(rows if part == "train" else ())
        return batch(self, rows, part, *more)

    monkeypatch.setattr(TeacherCache, "batch", noted)
    train(tmp_path, inputs, trainable=["scales"], layerwise={"backtrack": None})
    assert len(read) == len(set(read)) == 2 * 3 * 4


# -- going back --------------------------------------------------------------------------------------------
def test_a_layer_that_starts_badly_sends_training_back_twice_at_most(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer starts beyond the limit whatever the first does; what is measured is its first loss indeed."""
    turns = Turns(monkeypatch)
    found: list[float] = []
    measured = layerwise._Layerwise._first_loss

    def first_loss(self: Any, place: int) -> float:
        found.append(measured(self, place))
        return found[-1]

    monkeypatch.setattr(layerwise._Layerwise, "_first_loss", first_loss)
    far = dataclasses.replace  # a limit that every loss exceeds: the options allow none below 1
    ctx = context(
        tmp_path, inputs, objective=ONLINE, trainable=["scales", "lut"], batch={"sequences": 4, "accumulate": 2}
    )
    ctx.config = far(ctx.config, layerwise=far(ctx.config.layerwise, backtrack=0.1))
    run_stage(ctx)
    assert [turn["trains"][0].split(".")[2] for turn in turns.seen] == ["0", "0", "0", "1"]
    assert ctx.metrics["backtracks"] == 2 and ctx.metrics["steps"] == 4 * 3
    assert len(found) == 2, "after two returns nobody asks any more"
    logs = [line for line in ctx.meta["logs"] if "starts with a loss" in line]
    before = [turn["result"].last_loss for turn in turns.seen[:2]]
    for line, first, last, times in zip(logs, found, before, (1, 2), strict=True):
        assert line == (
            f"model.layers.1 starts with a loss of {first:.5g}, and model.layers.0 ended with {last:.5g}: "
            f"back to that one ({times} of at most 2 times)"
        )
    totals = [item["total"] for item in ctx.meta["progress"]]
    assert totals == [6] * 3 + [9] * 3 + [12] * 6
    assert [item["step"] for item in ctx.meta["progress"]] == list(range(1, 13))


def test_the_loss_that_decides_is_that_of_the_turns_first_step(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(monkeypatch)
    found: list[float] = []
    measured = layerwise._Layerwise._first_loss
    monkeypatch.setattr(
        layerwise._Layerwise, "_first_loss", lambda self, place: found.append(measured(self, place)) or found[-1]
    )
    ctx = train(tmp_path, inputs, objective=ONLINE, trainable=["scales"], batch={"sequences": 4, "accumulate": 2})
    assert found == [pytest.approx(turns.seen[1]["result"].first_loss, rel=1e-6)]
    assert ctx.metrics["backtracks"] == 0
    never = train(tmp_path / "never", inputs, trainable=["scales"], layerwise={"backtrack": None})
    assert never.metrics["backtracks"] == 0 and len(found) == 1


# -- going on ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("loop", "step"), [pytest.param("finished-00000", 5, marks=pytest.mark.slow), ("turn-00001", 7)]
)
def test_kill_9_and_resume_ends_with_the_same_bytes(tmp_path: Path, loop: str, step: int) -> None:
    """At the start of the second turn, and in the middle of it."""
    inputs = build(tmp_path)
    whole = train(tmp_path / "whole", inputs, steps=4)
    command = [sys.executable, "-m", "tests.training.student", str(tmp_path), "train", loop, str(step), "layerwise"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    resumed = train(tmp_path / "killed", inputs, steps=4)
    assert resumed.metrics["resumed_from"] == (step - 1) // 2 * 2
    trained = [item["step"] for item in resumed.meta["progress"]]
    assert trained == list(range(resumed.metrics["resumed_from"] + 1, 9)), "finished turns are not trained again"
    for file in ("model.safetensors", "config.json"):
        assert (whole.out / file).read_bytes() == (resumed.out / file).read_bytes()
    assert whole.metrics["layers"] == resumed.metrics["layers"]


def test_sigterm_after_a_return_goes_on_behind_it(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision to go back is in what the run before left: it's not taken again."""
    asked: list[int] = []
    decides = iter([True, False, True, False])
    monkeypatch.setattr(layerwise._Layerwise, "_goes_back", lambda self, place: place > 0 and next(decides))
    whole = train(tmp_path / "whole", inputs, steps=2)
    ctx = context(tmp_path / "stopped", inputs, steps=2)
    ctx.should_stop = lambda: asked.append(0) or (signal.SIGTERM if len(asked) == 5 else 0)
    with pytest.raises(Interrupted):
        run_stage(ctx)
    monkeypatch.setattr(layerwise._Layerwise, "_goes_back", lambda self, place: False)
    resumed = train(tmp_path / "stopped", inputs, steps=2)
    assert resumed.metrics["resumed_from"] == 5
    assert (resumed.metrics["backtracks"], resumed.metrics["steps"]) == (1, 6)
    assert [item["step"] for item in resumed.meta["progress"]] == [6]
    assert (whole.out / "model.safetensors").read_bytes() == (resumed.out / "model.safetensors").read_bytes()
    again = train(tmp_path / "stopped", inputs, steps=2)
    assert again.metrics["resumed_from"] == 6 and not again.meta["progress"]
    assert (whole.out / "model.safetensors").read_bytes() == (again.out / "model.safetensors").read_bytes()


def test_models_on_the_way_are_kept_by_the_steps_of_all_turns(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    ctx = train(tmp_path, inputs, steps=5, keep_every=3, keep="last", evaluate_every=5)
    kept = sorted(path.name for path in (ctx.out / "steps").iterdir())
    assert kept == ["step-00000003", "step-00000006", "step-00000009"]
    end = read_tensors(ctx.out)
    for name, layers in zip(kept, ({"0"}, {"0", "1"}, {"0", "1"}), strict=True):
        found = read_tensors(ctx.out / "steps" / name)
        assert found.keys() == end.keys(), "latents too, of layers before and behind"
        assert {item.split(".")[2] for item in changed(read_tensors(inputs["model"].path), found)} == layers


# -- plan --------------------------------------------------------------------------------------------------
def view(layers: int = 3, **changes: Any) -> ModelView:
    """Two quantized linears in each of some layers, and a quantized embedding."""
    scheme = {"scheme": "lut_lowrank", "bits": 2, "rank": 1}
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in ("mlp.up_proj", "self_attn.q_proj")]
    modules = {name: ModuleView(name, (96, 64), state="quantized", scheme=scheme) for name in names}
    table = {"scheme": "lut", "bits": 4, "granularity": "tensor"}
    modules["model.embed_tokens"] = ModuleView("model.embed_tokens", (320, 64), "embedding", "quantized", table)
    return ModelView(
        {**modules, **changes}, 80_000, {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": layers}
    )


def plan(model: ModelView, **options: Any) -> tuple[Any, list[tuple[str, ...]]]:
    problems: list[tuple[str, ...]] = []

    def report(path: str, message: str, hint: str, mismatch: bool) -> None:
        problems.append((path, message, hint, "mismatch" if mismatch else "recipe"))

    config = stage_config("train", {"objective": {"kd": "teacher"}, "layerwise": {}, **options})
    views = {"model": model, "teacher": {"vocabulary": 320, "seq_len": 16, "random_negatives": 32}}
    return TrainStage().plan(PlanContext("train", config, views, GROUPS, {}, report)), problems


def test_plan_tells_the_turns_and_takes_one_layers_memory() -> None:
    outcome, problems = plan(view())
    together, _ = plan(view(), layerwise=None, groups=["linears"])
    assert problems == []
    assert "layer by layer: layers 0 to 2, 200 steps each" in outcome.notes
    assert outcome.notes[0] == "trains weights, scales, lut of 6 modules", "the embedding stands still"
    weights = 96 * 64
    assert together.memory_bytes - outcome.memory_bytes == 28 * 6 * weights - (28 * 2 + 4 * 6) * weights
    assert {name for name, module in outcome.view.modules.items() if not module.latent} == {"model.embed_tokens"}
    some, problems = plan(view(), layerwise={"layers": [1, 1]}, trainable=["scales"], steps=10, keep_every=5)
    assert problems == [] and "layer by layer: layer 1, 10 steps each" in some.notes
    once, _ = plan(view(), layerwise={"layers": [1, 1]}, trainable=["scales"], steps=10)
    assert some.disk_bytes == 3 * once.disk_bytes
    both, _ = plan(view(), layerwise={"layers": [0, 1]}, trainable=["scales"], steps=10, keep_every=5)
    assert both.disk_bytes == 5 * once.disk_bytes


@pytest.fixture(autouse=True)
def linears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUPS, "linears", Group("linears", r"model\.layers\.\d+\..*_proj"))
    monkeypatch.setitem(GROUPS, "one", Group("one", r"model\.layers\.1\..*_proj"))


@pytest.mark.parametrize(
    ("options", "path", "message", "hint"),
    [
        ({"groups": ["linears", "head"]}, "groups", "model.embed_tokens: in no decoder layer", "leave it out here"),
        ({"layerwise": {"layers": [1, 3]}}, "layerwise.layers", "layer 3 is outside the model: its 3 layers are 0 to 2",
         "`layers: [1, 2]`"),
        ({"layerwise": {"layers": [7, 9]}}, "layerwise.layers", "layer 9 is outside the model", "`layers: [2, 2]`"),
        ({"layerwise": {"layers": [2, 1]}}, "layerwise.layers", "the first layer, 2, is behind the last, 1",
         "`layers: [1, 2]`"),
        ({"layerwise": {"layers": [0, 0]}, "groups": ["one"]}, "layerwise.layers", "is in the layers 0 to 0",
         "they are in layer 1"),
    ],
)  # fmt: skip
def test_plan_refuses_layers_that_are_not_there(options: dict[str, Any], path: str, message: str, hint: str) -> None:
    _, [problem] = plan(view(), **options)
    assert problem[0] == path and message in problem[1] and hint in problem[2] and problem[3] == "recipe"


def test_plan_refuses_a_model_without_quantized_layers() -> None:
    only = view(0)
    _, problems = plan(dataclasses.replace(only, config={**only.config, "num_hidden_layers": 2}))
    assert [problem[0] for problem in problems] == ["layerwise"]


def test_layers_with_nothing_to_train_have_no_turn() -> None:
    """In the second layer tables are fixed."""
    fixed = {"scheme": "lut_lowrank", "bits": 2, "rank": 1, "lut": "fixed"}
    names = [f"model.layers.1.{kind}" for kind in ("mlp.up_proj", "self_attn.q_proj")]
    changes = {name: ModuleView(name, (96, 64), state="quantized", scheme=fixed) for name in names}
    outcome, problems = plan(view(**changes), trainable=["lut"])
    assert problems == [] and "layer by layer: layers 0, 2, 200 steps each" in outcome.notes
    assert any("layers 0 to 2" in note for note in plan(view(**changes), trainable=["lut", "norms"])[0].notes)
    _, [problem] = plan(view(**changes), trainable=["lut"], groups=["one"])
    assert problem[:2] == ("trainable", "there is nothing to train: these modules' schemes have no lut")


def test_names_say_the_layer_that_the_model_has() -> None:
    """In every family, what planning reads off the names is where the module is."""
    from a1q.models.blocks import decoder_layers
    from a1q.training.layers import layer_of
    from tests.tiny import FAMILIES, tiny_family

    for family in FAMILIES:
        model = tiny_family(family)
        layers = decoder_layers(model)[0]
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                within = [index for index, layer in enumerate(layers) if name.startswith(f"{layer}.")]
                assert [layer_of(name)] == (within or [None]), name


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("layerwise: {}", "layerwise: {layers: [2, 4]}", "layer 4 is outside the model: its 4 layers are 0 to 3"),
        ("groups: [mlp, attn]", "groups: [embed]", "model.embed_tokens: in no decoder layer"),
        ("layerwise: {}", "layerwise: {layers: [0]}", "at least 2"),
        ("layerwise: {}", "layerwise: {layer: [0, 1]}", "did you mean 'layers'?"),
    ],
)
def test_a_wrong_recipe_is_shown_at_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, told: str
) -> None:
    from a1q.recipe import shipped_recipes
    from tests.cli.support import a1q
    from tests.recipe.fakes import header_model

    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    text = Path(shipped_recipes()["layerwise"]).read_text(encoding="utf-8")
    text = text.replace("builtin:pico", str(header_model(tmp_path / "model", layers=4)))
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    line = file.read_text(encoding="utf-8").splitlines().index(next(x for x in file.open() if new in x).rstrip()) + 1
    done = a1q("plan", file)
    assert done.exit_code == 2, done.output
    assert f"mine.yaml:{line}:" in done.output and told in done.output and "Traceback" not in done.output
