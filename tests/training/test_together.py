"""Two processes against one that reads the same batches, over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.engine.world import World
from a1q.errors import MismatchError
from a1q.training.together import share_of
from tests.training.several import run
from tests.training.student import build, read_tensors


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    # Where weights train, a rounding error changes an index some steps later: over few held-out tokens that is seen.
    return build(tmp_path_factory.mktemp("together"), tune=100)


def flat(seen: dict[str, Any]) -> torch.Tensor:
    return torch.cat([torch.tensor(gradient) for gradient in seen["gradients"]])


def test_scales_train_as_in_one_process(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    asked: dict[str, Any] = {"trainable": ["scales"], "steps": 10, "batch": {"sequences": 5, "accumulate": 2}}
    (alone,) = run(1, tmp_path / "one", inputs, **asked)
    first, second = run(2, tmp_path / "two", inputs, **asked)
    assert first["losses"] == second["losses"] and first["gradients"] == second["gradients"]
    assert float((flat(first) - flat(alone)).norm()) <= 1e-6 * float(flat(alone).norm())
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert len(alone["losses"]) == 10
    ours, theirs = (read_tensors(tmp_path / name / "out") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2e-3, atol=1e-5)
    assert list((tmp_path / "two" / "out").iterdir()), "the leading process writes"


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "fsdp2"])
def test_weights_end_where_one_process_does(tmp_path: Path, inputs: dict[str, Artifact], shard: bool) -> None:
    asked: dict[str, Any] = {"steps": 100, "batch": {"sequences": 8}, "evaluate_every": 50, "ema": 0.9, "keep": "last"}
    (alone,) = run(1, tmp_path / "one", inputs, **asked)
    first, second = run(2, tmp_path / "two", inputs, shard=shard, **asked)
    assert first["losses"] == second["losses"]
    assert float((flat(first) - flat(alone)).norm()) <= 1e-5 * float(flat(alone).norm())
    assert first["metrics"]["kl_after"] < 0.9 * first["metrics"]["kl_before"]
    assert first["metrics"]["kl_after"] == pytest.approx(alone["metrics"]["kl_after"], rel=0.02)
    ours, theirs = (read_tensors(tmp_path / name / "out") for name in ("two", "one"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}


@pytest.mark.parametrize(
    ("rank", "shard"), [pytest.param(1, False, marks=pytest.mark.slow), (0, True)], ids=["ddp", "fsdp2"]
)
def test_a_killed_process_ends_all_and_the_same_command_goes_on(
    tmp_path: Path, inputs: dict[str, Artifact], rank: int, shard: bool
) -> None:
    asked: dict[str, Any] = {"steps": 8, "batch": {"sequences": 4}, "shard": shard}
    whole = run(2, tmp_path / "whole", inputs, **asked)
    codes = [item["code"] for item in run(2, tmp_path / "cut", inputs, dies=(rank, 5), **asked)]
    assert codes[rank] == -9
    assert codes[1 - rank] == 1
    resumed = run(2, tmp_path / "cut", inputs, **asked)
    assert any("resumed at step 3" in line for line in resumed[0]["logs"])
    assert resumed[0]["losses"] == whole[0]["losses"][3:]
    ours, theirs = (read_tensors(tmp_path / name / "out") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_adapters_train_in_two_processes(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    asked: dict[str, Any] = {"stage": "lora_recover", "rank": 2, "steps": 10, "groups": ["mlp"], "merge": "refit"}
    (alone,) = run(1, tmp_path / "one", inputs, **asked)
    first, _ = run(2, tmp_path / "two", inputs, **asked)
    assert first["metrics"]["kl_adapter"] == pytest.approx(alone["metrics"]["kl_adapter"], rel=1e-3)
    assert first["metrics"]["kl_refit"] == pytest.approx(alone["metrics"]["kl_refit"], rel=1e-2)


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layer_by_layer_as_in_one_process(tmp_path: Path, inputs: dict[str, Artifact], shard: bool) -> None:
    """Each turn has its own hooks on gradients; with `shard` too, which has nothing to split there."""
    asked: dict[str, Any] = {"trainable": ["scales"], "steps": 4, "batch": {"sequences": 5}, "layerwise": {}}
    (alone,) = run(1, tmp_path / "one", inputs, **asked)
    first, second = run(2, tmp_path / "two", inputs, shard=shard, **asked)
    assert first["losses"] == second["losses"] and len(alone["losses"]) == 8
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert first["metrics"]["kl_after"] == pytest.approx(alone["metrics"]["kl_after"], rel=1e-4)
    assert float((flat(first) - flat(alone)).norm()) <= 1e-6 * float(flat(alone).norm())


@pytest.mark.slow
def test_layer_by_layer_a_killed_process_ends_all_and_the_same_command_goes_on(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    asked: dict[str, Any] = {"steps": 4, "batch": {"sequences": 4}, "layerwise": {}}
    whole = run(2, tmp_path / "whole", inputs, **asked)
    codes = [item["code"] for item in run(2, tmp_path / "cut", inputs, dies=(1, 8), **asked)]
    assert codes == [1, -9]
    resumed = run(2, tmp_path / "cut", inputs, **asked)
    assert resumed[0]["losses"] == whole[0]["losses"][7:]
    ours, theirs = (read_tensors(tmp_path / name / "out") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_shares_are_whole_and_even() -> None:
    for size in (2, 3, 5):
        shares = [share_of(range(7), World(rank, size)) for rank in range(size)]
        assert sorted(row for share in shares for row in share) == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_smaller_than_the_processes_is_refused(inputs: dict[str, Artifact]) -> None:
    from a1q.distill.cache import TeacherCache
    from a1q.engine.stage import Runtime
    from a1q.models.checkpoint import load_model
    from a1q.training.distillation import BatchConfig, Distillation, Objective

    objective = Objective("teacher", 1.0, 0.0, 0.0, "negatives", False, 0.0, 1.0, "all")
    subject = Distillation(
        load_model(inputs["model"].path),
        TeacherCache(inputs["teacher"].path),
        objective,
        BatchConfig(2, 1),
        Runtime(),
        0,
        4,
    )
    with pytest.raises(MismatchError, match=r"`batch\.sequences` is 2, and 3 processes share"):
        subject.over(World(0, 3))
