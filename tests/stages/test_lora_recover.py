import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from a1q.distill.cache import TeacherCache
from a1q.engine.artifact import Artifact
from a1q.engine.stage import PlanContext, StageContext
from a1q.errors import MismatchError
from a1q.models.adapter_source import AdapterView, read_adapter_view, resolve_adapter
from a1q.models.checkpoint import load_model
from a1q.quant.calibration import measure_statistics
from a1q.quant.linear import quantized_modules
from a1q.stages.lora_recover import LoraRecoverStage
from tests.stages.test_train import view
from tests.tiny import tiny_model
from tests.training.student import (
    GROUPS,
    KILLED,
    LENGTH,
    SEQUENCES,
    TUNE,
    build,
    read_tensors,
    run_stage,
    stage_config,
    stage_context,
)

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 320


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return build(tmp_path_factory.mktemp("lora"))


def recover(folder: Path, inputs: dict[str, Artifact], **options: Any) -> StageContext:
    ctx = stage_context("lora_recover", folder, inputs, **{"steps": 12, "rank": 4, **options})
    run_stage(ctx)
    return ctx


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_adapters_lower_the_loss_and_stay_in_the_artifact(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    ctx = recover(tmp_path, inputs, merge="adapter", groups=["mlp"], lr=1e-2, alpha=8)
    assert ctx.metrics["kl_adapter"] < ctx.metrics["kl_before"]
    for name, module in quantized_modules(load_model(ctx.out)):
        assert module.adapter == ({"rank": 4, "alpha": 8.0} if ".mlp." in name else None)
        assert module.latent is not None
    before, after = read_tensors(inputs["model"].path), read_tensors(ctx.out)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith("indices"))


def test_plain_peft_computes_the_same_over_the_exported_folder(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ctx = recover(tmp_path, inputs, merge="adapter", groups=["attn", "mlp"], lr=1e-2, alpha=8)
    own = load_model(ctx.out)
    plain = AutoModelForCausalLM.from_pretrained(inputs["model"].path.parent / "dense")
    with torch.no_grad():
        for name, module in quantized_modules(own):
            plain.get_submodule(name).weight.copy_(module.weight)
    plain.save_pretrained(tmp_path / "exported")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    without = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, ctx.out / "adapter").eval())
    torch.testing.assert_close(adapted, logits(own), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, without, atol=1e-3)
    config = json.loads((ctx.out / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 14


@pytest.mark.parametrize("merge", ["adapter", "refit"])
def test_beside_the_teacher_itself(tmp_path: Path, inputs: dict[str, Artifact], merge: str) -> None:
    """PEFT's wrappers and the hooks on layers leave each other alone, and held-out figures are exact."""
    objective = {"kd": "teacher", "online": True, "local": 0.1}
    ctx = recover(tmp_path, inputs, merge=merge, lr=1e-2, steps=6, refit_steps=3, objective=objective)
    assert ctx.metrics["kl_adapter"] < ctx.metrics["kl_before"]
    tokens = TeacherCache(inputs["teacher"].path).batch(range(TUNE), "tune").tokens
    with torch.no_grad():
        teacher, student = (
            model(tokens).logits.double().log_softmax(-1) for model in (tiny_model(), load_model(ctx.out))
        )
    name = {"adapter": "kl_adapter", "refit": "kl_before" if ctx.metrics.get("kept") == "before" else "kl_refit"}[merge]
    assert ctx.metrics[name] == pytest.approx(float((teacher.exp() * (teacher - student)).sum(-1).mean()), rel=1e-4)


def test_refit_merges_for_good_or_keeps_the_model(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    ctx = recover(tmp_path, inputs, lr=1e-2, refit_steps=10)
    metrics = ctx.metrics
    assert metrics["kl_refit"] <= metrics["kl_merged"]
    assert metrics["kept"] == "refit" and metrics["kl_refit"] < metrics["kl_before"]
    before = dict(quantized_modules(load_model(inputs["model"].path)))
    for name, module in quantized_modules(load_model(ctx.out)):
        assert module.adapter is None and module.spec == before[name].spec
        assert not torch.equal(module.latent, before[name].latent)


def test_refit_weighs_errors_by_statistics(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    import a1q.quant.module

    model = load_model(inputs["model"].path)
    square = measure_statistics(model, TOKENS.numpy(), tmp_path, batch_size=2)
    given: list[torch.Tensor] = []
    fit = a1q.quant.module.fit_parts

    def fit_parts(scheme: Any, weight: torch.Tensor, known: Any, seed: int) -> Any:
        given.append(known.gram.diagonal())
        return fit(scheme, weight, known, seed)

    monkeypatch.setattr(a1q.quant.module, "fit_parts", fit_parts)
    statistics = Artifact("statistics", tmp_path, "s" * 64)
    recover(tmp_path, {**inputs, "statistics": statistics}, steps=1, refit_steps=0, groups=["mlp"])
    names = [name for name, _ in quantized_modules(model) if ".mlp." in name]
    for name, diagonal in zip(names, given, strict=True):
        torch.testing.assert_close(diagonal.double(), square[name], rtol=1e-5, atol=0)


def test_refit_without_latents_starts_from_the_grid(tmp_path: Path) -> None:
    inputs = build(tmp_path, latent=False)
    ctx = recover(tmp_path / "run", inputs, lr=1e-2, steps=4, refit_steps=4)
    assert ctx.metrics["kept"] == "refit"
    assert all(module.latent is None for _, module in quantized_modules(load_model(ctx.out)))


def test_a_merge_that_does_harm_is_said_aloud_and_undone(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from a1q.quant.linear import QuantLinear

    noise = torch.Generator().manual_seed(1)
    monkeypatch.setattr(QuantLinear, "adapter_delta", lambda self: torch.randn(self.shape, generator=noise))
    ctx = recover(tmp_path, inputs, steps=1, refit_steps=1)
    assert ctx.metrics["kept"] == "before" and ctx.metrics["kl_refit"] > ctx.metrics["kl_before"]
    assert any("WARNING: merging the adapters did no good" in line for line in ctx.meta["logs"])
    assert torch.equal(logits(load_model(ctx.out)), logits(load_model(inputs["model"].path)))


def test_gradients_reach_every_adapter(inputs: dict[str, Artifact]) -> None:
    """All B after the first step; all A, whose gradient passes through B, after the second."""
    from a1q.training.adapters import attach_adapters
    from a1q.training.parameters import set_aside_latents

    model = load_model(inputs["model"].path)
    modules = dict(quantized_modules(model))
    set_aside_latents(modules)
    wrapped = attach_adapters(model, modules, rank=2, alpha=2.0, dropout=0.0)
    trained = {name: item for name, item in wrapped.named_parameters() if item.requires_grad}
    assert len(trained) == 2 * len(modules) == 28 and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for part in ("lora_B", "lora_A"):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(TOKENS).logits.flatten(0, 1), TOKENS.flatten()).backward()
        reached = [name for name, item in trained.items() if part in name and item.grad.abs().max() > 0]
        assert len(reached) == len(modules)
        optimizer.step()


def test_kill_9_and_resume_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Killed in its second loop: the first is found finished, the second goes on."""
    inputs = build(tmp_path)
    whole = recover(tmp_path / "whole", inputs, **KILLED["lora_recover"])
    command = [sys.executable, "-m", "tests.training.student", str(tmp_path), "lora_recover", "refit", "3"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    resumed = recover(tmp_path / "killed", inputs, **KILLED["lora_recover"])
    assert sum("resumed at step" in line for line in resumed.meta["logs"]) == 2
    assert (whole.out / "model.safetensors").read_bytes() == (resumed.out / "model.safetensors").read_bytes()


# -- plan ------------------------------------------------------------------------------------------------------------
def plan(
    states: dict[str, str],
    prepared: list[str] | None = None,
    chats: bool | None = None,
    adapter_view: Any = None,
    tune_sequences: int = 4,
    **options: Any,
) -> tuple[Any, list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    config = stage_config("lora_recover", {"objective": {"kd": "teacher"}, **options})
    views = {
        "model": view(**states),
        "teacher": {
            "vocabulary": 320,
            "seq_len": 16,
            "random_negatives": 32,
            "chats": chats,
            "tune_sequences": tune_sequences,
        },
    }
    views |= {} if prepared is None else {"statistics": {"prepared": prepared}}
    views["adapter"] = adapter_view
    ctx = PlanContext("recover", config, views, GROUPS, {}, lambda path, message, *_: problems.append((path, message)))
    return LoraRecoverStage().plan(ctx), problems


def test_statistics_of_another_preparation_are_refused_where_they_are_used() -> None:
    for prepared, merge, refused in (([], "refit", False), (["rotate"], "refit", True), (["rotate"], "adapter", False)):
        _, problems = plan({"gate": "quantized"}, prepared, merge=merge)
        assert [path for path, _ in problems] == ["statistics"] * refused


def test_plan_predicts_the_adapters() -> None:
    states = {"gate": "quantized", "up": "quantized"}
    outcome, problems = plan(states, merge="adapter", rank=3)
    assert problems == [] and {module.adapter for module in outcome.view.modules.values()} == {3}
    merged, _ = plan(states, rank=3)
    assert {module.adapter for module in merged.view.modules.values()} == {0}
    assert outcome.disk_bytes - merged.disk_bytes == 2 * 2 * 4 * 3 * (96 + 64)


def test_plan_refuses_ranks_and_states() -> None:
    assert "rank 100 is more than a side" in plan({"gate": "quantized"}, rank=100)[1][0][1]
    assert "no module of the model here is quantized" in plan({"gate": "dense"})[1][0][1]


def test_plan_refuses_objectives_that_ask_for_nothing_or_for_too_much() -> None:
    for objective, where, reason in (
        ({"kl": 0}, "objective.kl", "every weight is 0"),
        ({"kl": 0, "hard_full": 1, "online": True}, "objective.online", "nothing else asks a teacher"),
        ({"targets": "assistant"}, "objective.targets", "the data of `teacher` are plain text"),
        ({"kl": 0, "hard_full": 1, "temperature": 2}, "objective.temperature", "is about the divergence"),
        ({"kl": 0, "hard_full": 1, "tail": "bucket"}, "objective.tail", "is about the divergence"),
        (
            {"kl": 0, "local": 1, "online": True, "targets": "assistant"},
            "objective.targets",
            "`local` is about hidden states",
        ),
    ):
        chats = False if where == "objective.targets" and "local" not in objective else None
        _, problems = plan({"gate": "quantized"}, chats=chats, objective={"kd": "teacher", **objective})
        assert [path for path, _ in problems] == [where] and reason in problems[0][1]
    for chats, objective in (
        (False, {"kl": 0, "hard_full": 1}),
        (False, {"kl": 0, "local": 1, "online": True}),
        (True, {"kl": 0, "hard_full": 1, "targets": "assistant"}),
        (None, {"targets": "assistant"}),
    ):
        assert plan({"gate": "quantized"}, chats=chats, objective={"kd": "teacher", **objective})[1] == []


def test_plan_refuses_what_would_do_nothing() -> None:
    for options, where, reason in (
        ({"refit_weights": 0.03, "merge": "adapter"}, "refit_weights", "merges nothing"),
        ({"refit_weights": 0.03, "refit_steps": 0}, "refit_weights", "nothing trains after the merge"),
    ):
        _, problems = plan({"gate": "quantized"}, **options)
        assert [path for path, _ in problems] == [where] and reason in problems[0][1]
    _, problems = plan({"gate": "quantized"}, tune_sequences=0)
    assert [path for path, _ in problems] == ["objective.kd"] and "no held-out part" in problems[0][1]


def test_plan_says_by_what_the_best_is_kept() -> None:
    plain = {"kd": "teacher", "kl": 0, "hard_full": 1}
    for options, told in (({}, 0), ({"objective": plain}, 1), ({"objective": plain, "keep": "last"}, 0)):
        outcome, _ = plan({"gate": "quantized"}, **options)
        assert sum("kept by held-out KL" in note for note in outcome.notes) == told


@pytest.mark.parametrize("state", ["quantized", "dense"])
def test_what_quantizing_lost_is_compared_with_a_dense_model(state: str) -> None:
    problems: list[tuple[str, str]] = []
    config = stage_config("lora_recover", {"objective": {"kd": "teacher"}, "start": "error", "rank": 2})
    views = {
        "model": view(gate="quantized"),
        "teacher": {"vocabulary": 320, "seq_len": 16, "random_negatives": 32},
        "teacher_model": view(gate=state),
    }
    ctx = PlanContext("recover", config, views, GROUPS, {}, lambda path, message, *_: problems.append((path, message)))
    LoraRecoverStage().plan(ctx)
    assert [path for path, _ in problems] == ["start"] * (state == "quantized")


def test_supervised_fine_tuning_of_an_adapter(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    """Cross-entropy over what an assistant said lowers it, by torch's own formula; other text is refused by name."""
    sft = {"kd": "teacher", "kl": 0, "hard_full": 1, "targets": "assistant"}
    with pytest.raises(MismatchError) as caught:
        recover(tmp_path, inputs, objective=sft)
    assert caught.value.problems[0].path == "stages.lora_recover.objective.targets"
    known = with_answers(tmp_path / "chats", inputs)
    ctx = recover(tmp_path, known, objective=sft, merge="adapter", lr=1e-2, steps=24, keep="last")
    batch = TeacherCache(known["teacher"].path).batch(range(SEQUENCES))
    counts = batch.said[:, 1:] & ~batch.starts[:, 1:]
    losses = []
    for model in (load_model(inputs["model"].path), load_model(ctx.out)):
        with torch.no_grad():
            chosen = model(batch.tokens).logits[:, :-1][counts]
        losses.append(float(torch.nn.functional.cross_entropy(chosen, batch.tokens[:, 1:][counts])))
    assert losses[1] < losses[0] - 0.05


def with_answers(folder: Path, inputs: dict[str, Artifact]) -> dict[str, Artifact]:
    """The same inputs, with every other half of a sequence said by an assistant."""
    shutil.copytree(inputs["teacher"].path, folder)
    said = np.packbits(np.arange(LENGTH) >= LENGTH // 2, bitorder="little")
    for path in folder.glob("*.safetensors"):
        arrays = load_file(path)
        save_file({**arrays, "said": np.tile(said, (len(arrays["tokens"]), 1))}, path)
    meta = json.loads((folder / "teacher.json").read_text())
    meta["said"] = {part: meta["parts"][part]["sequences"] * LENGTH // 2 for part in ("train", "tune")}
    (folder / "teacher.json").write_text(json.dumps(meta))
    teacher = inputs["teacher"]
    return {**inputs, "teacher": Artifact("teacher", folder, "c" * 64, teacher.meta)}


def peft_folder(folder: Path, inputs: dict[str, Artifact], names: list[str], **changes: Any) -> Path:
    """An adapter as plain PEFT writes it, of random values."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(4)
    config = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"up_proj": 3}, "target_modules": names, **changes}
    base = AutoModelForCausalLM.from_pretrained(inputs["teacher_model"].path)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))
    model.save_pretrained(folder)
    return folder


MLP_NAMES = [f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 1) for part in ("gate", "up", "down")]


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}])
def test_an_adapter_of_peft_goes_on_where_it_was(
    tmp_path: Path, inputs: dict[str, Artifact], changes: dict[str, Any]
) -> None:
    """Before a step it computes what PEFT computes; after some it is nearer to the teacher; and back again."""
    from peft import PeftModel

    folder = peft_folder(tmp_path / "adapter", inputs, MLP_NAMES, **changes)
    known = {**inputs, "adapter": resolve_adapter(str(folder))}
    options = {"merge": "adapter", "groups": ["mlp"], "adapter": {"source": str(folder)}, "alpha": 8}
    here = recover(tmp_path / "here", known, **{**options, "steps": 1, "lr": 1e-12, "keep": "last"})
    with torch.no_grad():
        plain = tiny_model()
        for name, module in quantized_modules(load_model(here.out)):
            plain.get_submodule(name).weight.copy_(module.weight)
    torch.testing.assert_close(
        logits(load_model(here.out)), logits(PeftModel.from_pretrained(plain, folder).eval()), rtol=1e-4, atol=1e-4
    )
    on = recover(tmp_path / "on", known, **options, lr=1e-2)
    assert on.metrics["kl_start"] == here.metrics["kl_start"] != on.metrics["kl_before"]
    assert on.metrics["kl_adapter"] < on.metrics["kl_start"]
    written = read_adapter_view(on.out / "adapter")
    assert set(written) == set(MLP_NAMES) and {view.scale for view in written.values()} == {2.0}


@pytest.mark.parametrize(
    ("gate", "up", "options", "where", "reason"),
    [
        ((4, (96, 64)), None, {}, "adapter.source", r"nothing for 1 modules: model\.layers\.0\.mlp\.up_proj"),
        ((4, (96, 64)), (4, (64, 96)), {}, "adapter.source", r"up_proj has another shape: \(64, 96\)"),
        ((4, (96, 64)), (2, (96, 64)), {}, "rank", r"`rank` is 4, and the adapter has 2 in model\.layers\.0\.mlp\.up"),
        ((4, (96, 64)), (4, (96, 64)), {"start": "error"}, "start", "so does `start`"),
    ],
)
def test_adapters_that_do_not_fit_are_named(
    gate: Any, up: Any, options: dict[str, Any], where: str, reason: str
) -> None:
    given = {"gate": gate, "up": up}
    known = {f"model.layers.0.mlp.{name}_proj": AdapterView(*item, 1.0) for name, item in given.items() if item}
    states = {"gate": "quantized", "up": "quantized"}
    options = {"rank": 4, "adapter": {"source": "somewhere"}, **options}
    _, problems = plan(states, adapter_view=known, **options)
    assert problems[0][0] == where and re.search(reason, problems[0][1])
    _, more = plan(
        {"gate": "quantized"},
        adapter_view={**known, "model.layers.9.mlp.up_proj": AdapterView(4, (96, 64), 1)},
        **options,
    )
    assert any("don't train here" in message for _, message in more)


def test_only_plain_lora_is_read(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    for name, changes, reason in (
        ("dora", {"use_dora": True}, "use_dora"),
        ("head", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        folder = peft_folder(tmp_path / name, inputs, MLP_NAMES, **changes)
        with pytest.raises(MismatchError, match=reason):
            read_adapter_view(folder)
    with pytest.raises(MismatchError, match=r"has no adapter_config\.json and no adapter_model\.safetensors"):
        resolve_adapter(str(tmp_path))


def test_adapters_that_begin_with_what_quantizing_lost(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    """Of full rank they give the dense weights back; of a low one they begin nearer to the teacher."""
    ctx = recover(tmp_path, inputs, start="error", merge="adapter", rank=16, lr=1e-3)
    metrics = ctx.metrics
    assert metrics["kl_adapter"] <= metrics["kl_start"] < metrics["kl_before"]
    whole = recover(
        tmp_path / "whole", inputs, start="error", merge="adapter", rank=64, steps=1, lr=1e-9, groups=["mlp"]
    )
    dense = tiny_model()
    for name, module in quantized_modules(load_model(whole.out)):
        if ".mlp." in name:
            weight = module.weight + module.adapter_delta()
            torch.testing.assert_close(weight, dense.get_submodule(name).weight, rtol=1e-3, atol=1e-3)


def test_a_start_that_does_harm_is_said_aloud_and_undone(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise(modules: Any, dense: Any, statistics: Any, rank: int, progress: Any) -> Any:
        random = torch.Generator().manual_seed(2)
        sizes = {name: module.shape for name, module in modules.items()}
        return {
            name: (torch.randn(rank, columns, generator=random), torch.randn(rows, rank, generator=random))
            for name, (rows, columns) in sizes.items()
        }

    monkeypatch.setattr("a1q.training.adapter_start.error_adapters", noise)
    ctx = recover(tmp_path, inputs, start="error", merge="adapter", steps=1)
    assert ctx.metrics["kl_start"] > ctx.metrics["kl_before"] == ctx.metrics["kl_adapter"]
    assert any("WARNING: adapters that began with" in line for line in ctx.meta["logs"])
    adapters = [module.adapter_delta() for _, module in quantized_modules(load_model(ctx.out))]
    assert len(adapters) == 14 and not any(bool(delta.any()) for delta in adapters)


def test_weights_may_train_after_a_merge(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    from a1q.quant.module import QuantModule

    options = {"lr": 1e-2, "refit_steps": 10}
    still, moving = (
        recover(tmp_path / name, inputs, **options, refit_weights=rate)
        for name, rate in (("still", None), ("on", 0.03))
    )
    assert still.metrics["kl_merged"] == moving.metrics["kl_merged"]
    assert moving.metrics["kl_refit"] < still.metrics["kl_refit"]
    assert all(
        isinstance(module, QuantModule) and module.latent is not None
        for _, module in quantized_modules(load_model(moving.out))
    )
