import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from a1q.engine.stage import Runtime
from a1q.errors import Interrupted, MismatchError, StageError
from a1q.training.device import prepare_torch
from a1q.training.loop import LoopSpec, run_loop, step_seed
from tests.training.toy import Toy, make_context


def weights(toy: Toy) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in toy.state.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_same_numbers_as_adamw_written_by_hand_in_float64(tmp_path: Path) -> None:
    """Decoupled weight decay, bias correction, clipping and cosine, from their definitions."""
    toy = Toy(dropout=0.0)
    toy.model.double()
    toy.target = toy.target.double()
    toy.batch = lambda seed, size=8: (  # type: ignore[method-assign]
        inputs := torch.randn(size, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        inputs @ toy.target,
    )
    reference = weights(toy)
    steps, clip, final = 12, 0.5, 0.1
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in reference.items()}
    for step in range(steps):
        leaves = {name: w.clone().requires_grad_() for name, w in reference.items()}
        inputs, wanted = toy.batch(step_seed(5, step))
        hidden = torch.tanh(inputs @ leaves["0.weight"].T + leaves["0.bias"])
        loss = ((hidden @ leaves["3.weight"].T + leaves["3.bias"] - wanted) ** 2).mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        factor = (step + 1) / 3 if step < 2 else final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - 2) / 9))
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, clip / (norm + 1e-6))
            lr, decay = (0.01, 0.1) if name.endswith("weight") else (0.005, 0.02)
            mean, square = moments[name]
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.95).add_(0.05 * gradient**2)
            reference[name] *= 1 - lr * factor * decay
            corrected = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            reference[name] -= lr * factor * corrected
    result = toy.train(make_context(tmp_path), steps=steps, warmup=2, clip=clip, weight_decay=0.02, keep="last")
    assert result.steps == steps and result.kept_step == steps
    for name, expected in reference.items():
        torch.testing.assert_close(toy.state[name].detach(), expected, rtol=1e-10, atol=1e-12)


def test_accumulated_micro_batches_of_unequal_size_equal_one_large_batch(tmp_path: Path) -> None:
    sizes = (3, 8, 5)

    def run(folder: Path, accumulate: int) -> tuple[Toy, list[float]]:
        toy = Toy(dropout=0.0)
        inputs, wanted = toy.batch(9, sum(sizes))
        parts = list(zip(inputs.split(list(sizes)), wanted.split(list(sizes)), strict=True))

        def loss_of(step: int, micro: int) -> tuple[torch.Tensor, dict[str, float]]:
            x, y = parts[micro] if accumulate > 1 else (inputs, wanted)
            return torch.nn.functional.mse_loss(toy.model(x), y), {"tokens": len(x)}

        ctx = make_context(folder)
        spec = LoopSpec(steps=4, seed=1, accumulate=accumulate, clip=0.3)
        result = run_loop(
            ctx,
            parameter_groups=toy.groups(),
            loss_of=loss_of,
            evaluate=None,
            spec=spec,
            state=toy.state,
            identity={},
        )
        assert result.steps == 4 and len(ctx.meta["progress"]) == 4
        return toy, [entry["loss"] for entry in ctx.meta["progress"]]

    one, one_losses = run(tmp_path / "one", 1)
    many, many_losses = run(tmp_path / "many", 3)
    assert many_losses == pytest.approx(one_losses, rel=1e-5)
    for name, tensor in one.state.items():
        torch.testing.assert_close(many.state[name], tensor, rtol=1e-4, atol=1e-6)


def test_best_is_kept_and_a_worse_end_is_said_aloud(tmp_path: Path) -> None:
    toy, ctx = Toy(), make_context(tmp_path)
    losses = iter([3.0, 1.0, 2.0, 4.0])
    at_step_5: dict[str, torch.Tensor] = {}

    def evaluate() -> float:
        loss = next(losses)
        if loss == 1.0:
            at_step_5.update(weights(toy))
        return loss

    toy.evaluate = evaluate  # type: ignore[method-assign]
    result = toy.train(ctx, steps=15, evaluate_every=5)
    assert (result.start_tune, result.best_tune, result.last_tune) == (3.0, 1.0, 4.0)
    assert result.kept_step == result.best_step == 5
    assert_same(weights(toy), at_step_5)
    assert any("WARNING" in line and "3 at the start, 4 at the end" in line for line in ctx.meta["logs"])


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_moving_average_is_what_is_evaluated_and_kept(tmp_path: Path, keep: str) -> None:
    """Against its definition over the parameters of every step, in float64."""
    toy, seen = Toy(dropout=0.0), []
    plain = toy.loss_of

    def loss_of(step: int, micro: int) -> tuple[torch.Tensor, dict[str, float]]:
        seen.append({name: tensor.double() for name, tensor in weights(toy).items()})
        return plain(step, micro)

    toy.loss_of = loss_of  # type: ignore[method-assign]
    evaluated: list[dict[str, torch.Tensor]] = []
    judge = toy.evaluate

    def evaluate() -> float:
        evaluated.append(weights(toy))
        return judge()

    toy.evaluate = evaluate  # type: ignore[method-assign]
    result = toy.train(make_context(tmp_path), steps=10, ema=0.6, keep=keep, evaluate_every=5)
    average = {name: tensor.clone() for name, tensor in seen[0].items()}
    averages = [average]
    for step, state in enumerate(seen[1:]):  # what a step left is what the next one saw
        decay = min(0.6, (1 + step) / (10 + step))
        average = {name: decay * old + (1 - decay) * state[name] for name, old in average.items()}
        averages.append(average)
    for at, found in zip((0, 5), evaluated, strict=False):
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), averages[at][name], rtol=1e-5, atol=1e-6)
    assert len(evaluated) == 3 and result.kept_step == (result.best_step if keep == "best" else 10)
    assert_same(weights(toy), evaluated[{0: 0, 5: 1, 10: 2}[result.kept_step]])


def test_a_killed_average_goes_on_bit_for_bit(tmp_path: Path) -> None:
    expected = Toy()
    expected.train(make_context(tmp_path / "whole"), ema=0.9)
    asked = iter([0] * 7 + [signal.SIGTERM])
    with pytest.raises(Interrupted):
        Toy().train(make_context(tmp_path / "stopped", should_stop=lambda: next(asked)), ema=0.9)
    resumed = Toy()
    assert resumed.train(make_context(tmp_path / "stopped"), ema=0.9).resumed_from == 8
    assert_same(weights(resumed), weights(expected))
    with pytest.raises(MismatchError, match=r"ema was 0\.9 and is None"):
        Toy().train(make_context(tmp_path / "stopped"))


def test_patience_ends_training_early(tmp_path: Path) -> None:
    toy, ctx = Toy(), make_context(tmp_path)
    losses = iter([3.0, 1.0, 2.0, 0.5, 0.6, float("nan"), 9.0])
    toy.evaluate = lambda: next(losses)  # type: ignore[method-assign]
    result = toy.train(ctx, steps=1000, evaluate_every=5, patience=2)
    assert (result.steps, result.best_step, result.best_tune) == (25, 15, 0.5)
    assert any("ended after step 25: 2 evaluations in a row" in line for line in ctx.meta["logs"])
    again = Toy()
    again.evaluate = lambda: pytest.fail("there is nothing left to do")  # type: ignore[method-assign]
    assert again.train(make_context(tmp_path), steps=1000, evaluate_every=5, patience=2).steps == 25


def test_no_warning_when_training_helps(tmp_path: Path) -> None:
    toy, ctx = Toy(), make_context(tmp_path)
    result = toy.train(ctx, steps=40, warmup=0)
    assert result.best_tune is not None and result.start_tune is not None and result.best_tune < result.start_tune
    assert ctx.meta["logs"] == []
    assert result.metrics()["tokens_per_second"] > 0 and "resumed_from" not in result.metrics()


def test_steps_that_are_not_finite_are_skipped_and_too_many_fail(tmp_path: Path) -> None:
    toy, ctx = Toy(), make_context(tmp_path / "a")
    plain = toy.loss_of

    def broken(until: int) -> Any:
        def loss_of(step: int, micro: int) -> tuple[torch.Tensor, dict[str, float]]:
            loss, figures = plain(step, micro)
            return (loss * float("nan") if 2 <= step < until else loss), figures

        return loss_of

    toy.loss_of = broken(4)  # type: ignore[method-assign]
    result = toy.train(ctx)
    assert result.skipped == 2 and result.steps == 20
    assert all(torch.isfinite(tensor).all() for tensor in toy.state.values())
    assert "step 3 skipped" in ctx.meta["logs"][0]
    toy.loss_of = broken(20)  # type: ignore[method-assign]
    with pytest.raises(StageError, match="5 steps in a row, up to step 7"):
        toy.train(make_context(tmp_path / "b"), skip_limit=5)


@pytest.mark.parametrize("last_step", [3, 13])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, last_step: int) -> None:
    expected = Toy()
    expected.train(make_context(tmp_path / "whole"))
    command = [sys.executable, "-m", "tests.training.toy", str(tmp_path / "killed"), str(last_step)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    resumed = Toy()
    result = resumed.train(make_context(tmp_path / "killed"))
    assert result.resumed_from == (last_step // 4 * 4 or None)
    assert_same(weights(resumed), weights(expected))


def test_sigterm_checkpoints_and_the_same_command_goes_on(tmp_path: Path) -> None:
    expected = Toy()
    expected.train(make_context(tmp_path / "whole"), checkpoint_steps=None)
    asked = iter([0] * 7 + [signal.SIGTERM])
    ctx = make_context(tmp_path / "stopped", should_stop=lambda: next(asked))
    with pytest.raises(Interrupted) as caught:
        Toy().train(ctx, checkpoint_steps=None)
    assert caught.value.exit_code == 143
    resumed, again = Toy(), make_context(tmp_path / "stopped")
    result = resumed.train(again, checkpoint_steps=None)
    assert result.resumed_from == ctx.meta["progress"][-1]["step"] == 8
    assert_same(weights(resumed), weights(expected))


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(tmp_path: Path) -> None:
    expected = Toy()
    expected.train(make_context(tmp_path))
    newest = max((tmp_path / "scratch" / "train").glob("*.safetensors"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    resumed, ctx = Toy(), make_context(tmp_path)
    assert resumed.train(ctx).resumed_from == 16
    assert f"{newest.stem} is damaged" in ctx.meta["logs"][0]
    assert_same(weights(resumed), weights(expected))


def test_another_thread_count_is_refused_by_name(tmp_path: Path) -> None:
    Toy().train(make_context(tmp_path))
    try:
        with pytest.raises(MismatchError, match="threads was 1 and is 2"):
            Toy().train(make_context(tmp_path, runtime=Runtime(threads=2)))
    finally:
        prepare_torch(Runtime(threads=1), 1)


def test_another_spec_or_shape_is_refused_by_name(tmp_path: Path) -> None:
    Toy().train(make_context(tmp_path))
    with pytest.raises(MismatchError, match="steps was 20 and is 21"):
        Toy().train(make_context(tmp_path), steps=21)
    other = Toy()
    other.model[3] = torch.nn.Linear(16, 3, bias=False)
    with pytest.raises(MismatchError, match="shapes was"):
        other.train(make_context(tmp_path))


def test_state_must_name_what_trains(tmp_path: Path) -> None:
    toy = Toy()
    spec = LoopSpec(steps=1, seed=1)
    with pytest.raises(ValueError, match="exactly the parameters"):
        run_loop(
            make_context(tmp_path),
            parameter_groups=toy.groups()[:1],
            loss_of=toy.loss_of,
            evaluate=None,
            spec=spec,
            state=toy.state,
            identity={},
        )


def test_checkpoint_cadence_is_no_part_of_the_result(tmp_path: Path) -> None:
    spec = LoopSpec(steps=3, seed=1)
    often = dataclasses.replace(spec, checkpoint_steps=1)
    toys = [Toy(), Toy()]
    for toy, each in zip(toys, (spec, often), strict=True):
        ctx = make_context(tmp_path / str(each.checkpoint_steps))
        run_loop(
            ctx,
            parameter_groups=toy.groups(),
            loss_of=toy.loss_of,
            evaluate=None,
            spec=each,
            state=toy.state,
            identity={},
        )
    assert not (tmp_path / "None" / "scratch" / "train").exists()
    assert_same(weights(toys[0]), weights(toys[1]))


def test_loss_scaling_changes_nothing_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler is a power of two, so unscaled gradients are exact; its growth stands in the checkpoint."""
    plain = Toy()
    plain.train(make_context(tmp_path / "plain"))
    monkeypatch.setattr(
        "a1q.training.loop.grad_scaler", lambda _: torch.amp.GradScaler("cpu", 1024.0, growth_interval=5)
    )
    scaled = Toy()
    scaled.train(make_context(tmp_path / "scaled"))
    assert_same(weights(scaled), weights(plain))
    asked = iter([0] * 9 + [signal.SIGTERM])
    with pytest.raises(Interrupted):
        Toy().train(make_context(tmp_path / "stopped", should_stop=lambda: next(asked)))
    resumed = Toy()
    assert resumed.train(make_context(tmp_path / "stopped")).resumed_from == 10
    assert_same(weights(resumed), weights(plain))
    notes = [max((tmp_path / name / "scratch" / "train").glob("*.json")) for name in ("scaled", "stopped")]
    scales = [json.loads(note.read_text())["body"]["values"]["scaler"]["scale"] for note in notes]
    assert scales == [1024.0 * 2**4] * 2
