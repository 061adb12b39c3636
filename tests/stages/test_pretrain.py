"""`pretrain` on a small text: end to end, and killed at a step and run again."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from a1q.engine.config import build_config
from a1q.engine.stage import DataEntry, PlanContext, Runtime, StageContext
from a1q.errors import StageError
from a1q.stages.pretrain import Batches, PretrainStage, unigram_entropy
from tests.data.text import sentence

OPTIONS = {
    "data": "text",
    "architecture": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    },
    "tokenizer": {"vocab": 400},
    "steps": 12,
    "batch": {"sequences": 8, "accumulate": 1},
    "lr": 1e-2,
    "warmup": 2,
    "schedule": "cosine",
    "final_lr": 0.0,
    "betas": [0.9, 0.95],
    "weight_decay": 0.1,
    "clip": 1.0,
    "evaluate_every": 4,
    "evaluate_sequences": 8,
    "keep": "last",
}


def context(folder: Path, kill_at: int = 0, **changes) -> StageContext:
    """A context for the stage on 400 sentences; with `kill_at`, the process kills itself after that step."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(400)))

    def emit(kind: str, values) -> None:
        if kind == "progress" and values["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return StageContext(
        id="pico",
        config=build_config(PretrainStage.Config, {**OPTIONS, **changes}),
        seed=3,
        inputs={},
        out=folder / "out",
        scratch=folder / "scratch",
        runtime=Runtime(threads=1),
        data={"text": DataEntry("text", {"source": str(path), "seq_len": 32, "holdout": 0.2}, "0" * 64)},
        emit=emit,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    ctx = context(tmp_path_factory.mktemp("trained"))
    PretrainStage().run(ctx)
    return ctx


def test_the_result_is_a_model_that_transformers_loads(trained: StageContext):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained.out)
    tokenizer = AutoTokenizer.from_pretrained(trained.out)
    assert model.config.vocab_size == len(tokenizer) == 400
    assert model.generation_config.eos_token_id == [0, 2]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_figures(trained: StageContext):
    figures = trained.metrics
    assert figures["last_loss"] < figures["first_loss"] - 1
    assert figures["test_loss"] < math.log(400)
    assert figures["test_ppl"] == pytest.approx(math.exp(figures["test_loss"]))
    assert 0 < figures["bits_per_byte"] < 8
    json.dumps(figures, allow_nan=False)


def test_the_plan_predicts_what_comes_out(trained: StageContext):
    from a1q.models.view import read_view

    planned = PretrainStage().plan(plan_context(trained))
    found = read_view(trained.out)
    assert {name: (m.shape, m.kind) for name, m in planned.view.modules.items()} == {
        name: (m.shape, m.kind) for name, m in found.modules.items()
    }
    assert planned.view.parameters == found.parameters and planned.view.tied
    assert {name: found.config[name] for name in planned.view.config} == planned.view.config
    assert planned.disk_bytes > (trained.out / "model.safetensors").stat().st_size


def plan_context(ctx: StageContext, problems: list | None = None) -> PlanContext:
    found = [] if problems is None else problems
    return PlanContext("pico", ctx.config, {}, {}, ctx.data, lambda *problem: found.append(problem))


def test_heads_that_do_not_divide_are_a_problem(tmp_path: Path):
    ctx = context(tmp_path, architecture={**OPTIONS["architecture"], "num_key_value_heads": 3})
    problems: list = []
    PretrainStage().plan(plan_context(ctx, problems))
    assert [(path, mismatch) for path, _, _, mismatch in problems] == [("architecture.num_key_value_heads", False)]


def test_killed_and_run_again_gives_the_same_bits(tmp_path: Path, trained: StageContext):
    code = (
        "import sys; from pathlib import Path; from tests.stages.test_pretrain import context, PretrainStage;"
        "from a1q.training.loop import LoopSpec; plain = LoopSpec.of;"
        "LoopSpec.of = lambda config, seed: plain(config, seed, checkpoint_steps=3);"
        "PretrainStage().run(context(Path(sys.argv[1]), kill_at=7))"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path)]
    killed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list((tmp_path / "out").iterdir())
    ctx = context(tmp_path)
    PretrainStage().run(ctx)
    assert ctx.metrics["resumed_from"] == 6
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (trained.out / name).read_bytes()


def test_documents_by_themselves_are_refused_at_the_entry(trained: StageContext):
    entry = trained.data["text"]
    asked = dataclasses.replace(entry, config={**entry.config, "attention": "document"})
    told: list[tuple[str, str, str, bool]] = []
    ctx = dataclasses.replace(plan_context(trained), data={"text": asked}, report=lambda *problem: told.append(problem))
    PretrainStage().plan(ctx)
    ((path, message, _, misfit),) = told
    assert path == "data" and "data.text says `attention: document`" in message and not misfit


def test_a_step_larger_than_the_text_is_refused(tmp_path: Path):
    with pytest.raises(StageError, match=r"a step reads 100 x 9 sequences, and the text has \d+ of 32 tokens"):
        PretrainStage().run(context(tmp_path, batch={"sequences": 100, "accumulate": 9}))


def test_out_of_memory_names_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("a1q.training.step_loss.NextTokenLoss.forward", full)
    with pytest.raises(StageError, match=r"`batch\.sequences` from 8 to 4 .*hidden_size` from 32 to 16"):
        PretrainStage().run(context(tmp_path))


def test_batches_read_every_row_once_an_epoch_and_depend_on_the_number_alone():
    sequences = numpy.arange(21 * 4, dtype=numpy.int32).reshape(21, 4)
    batches = Batches(sequences, 5, seed=1)
    epoch = numpy.concatenate([batches(number) for number in range(4)])
    assert epoch.shape == (20, 4) and len(set(epoch[:, 0] // 4)) == 20
    assert (numpy.diff(epoch, axis=1) == 1).all()
    again = Batches(sequences, 5, seed=1)
    for number in (9, 3, 0, 4):
        assert (again(number) == batches(number)).all()
    assert (Batches(sequences, 5, seed=2)(0) != batches(0)).any()
    assert (batches(4) != batches(0)).any()


def test_a_single_sequence_is_enough_for_a_batch():
    assert Batches(numpy.array([[1, 2, 3]], dtype=numpy.int32), 4, seed=0)(3).tolist() == [[1, 2, 3]] * 4


def test_unigram_entropy_of_a_fair_coin():
    train = numpy.array([[0, 1] * 50])
    assert unigram_entropy(train, numpy.array([[0, 1, 0, 1, 1]]), 2) == pytest.approx(math.log(2))
