from dataclasses import replace
from typing import Any

import pytest
import torch

from a1q.distill.cache import TeacherBatch, TeacherCache
from a1q.engine.artifact import Artifact
from a1q.engine.stage import Runtime
from a1q.errors import MismatchError, StageError
from a1q.models.checkpoint import load_model
from a1q.training.batches import batch_rows
from a1q.training.distillation import BatchConfig, Distillation, Objective, require_said
from tests.tiny import tiny_model
from tests.training.student import TUNE, build


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return build(tmp_path_factory.mktemp("distillation"))


def distillation(inputs: dict[str, Artifact], **changes: Any) -> Distillation:
    objective = Objective("t", 1.0, 0.0, 0.0, "negatives", False, 0.0, 1.0, "all")
    options = {"objective": objective, "batch": BatchConfig(5, 2), "evaluate_sequences": 100, **changes}
    options = {"runtime": Runtime(), **options}
    return Distillation(load_model(inputs["model"].path), TeacherCache(inputs["teacher"].path), seed=3, **options)


def test_held_out_loss_is_near_the_full_kl_whatever_the_objective(inputs: dict[str, Artifact]) -> None:
    """In batches of 5 over 12 sequences, the last one smaller; the tail is estimated, so near."""
    found = distillation(inputs, objective=Objective("t", 2.0, 0.5, 0.5, "bucket", False, 0.0, 1.0, "all"))
    tokens = found.cache.batch(range(TUNE), "tune").tokens
    with torch.no_grad():
        teacher, student = (model(tokens).logits.double().log_softmax(-1) for model in (tiny_model(), found.model))
    exact = float((teacher.exp() * (teacher - student)).sum(-1).mean())
    assert found.evaluate() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_tile_by_tile_it_is_the_same(inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, amp: str) -> None:
    """Loss, figures and gradients of a model whose logits are too many."""
    objective = Objective("t", 2.0, 0.5, 0.5, "negatives", False, 0.0, 1.0, "all")
    runtime = Runtime(amp=amp)
    found = {}
    for name, wide in (("whole", 1 << 28), ("tiles", 0)):
        monkeypatch.setattr("a1q.training.width.WIDE", wide)
        subject = distillation(inputs, objective=objective, runtime=runtime)
        assert (subject.loss.heads() is not None) == (name == "tiles")
        loss, figures = subject.loss_of(0, 1)
        loss.backward()
        gradients = {name: part.grad for name, part in subject.model.named_parameters() if part.grad is not None}
        found[name] = loss.item(), figures, subject.evaluate(), gradients
    (loss, figures, held_out, gradients), (same, also, equal, others) = found["whole"], found["tiles"]
    near = {"no": 1e-5, "bf16": 0.02}[amp]
    assert (same, equal) == (pytest.approx(loss, rel=near), pytest.approx(held_out, rel=near))
    assert also == pytest.approx(figures, rel=near)
    assert gradients.keys() == others.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm()) <= 10 * near * float(gradient.norm()) + 1e-7, name


@pytest.mark.parametrize("targets", ["all", "assistant"])
def test_hard_labels_mean_the_same_however_a_step_is_cut(inputs: dict[str, Artifact], targets: str) -> None:
    """A target weighs the same in a micro-batch with many of them and in one with few; the divergence likewise."""
    objective = Objective("t", 1.0, 0.3, 0.7, "bucket", False, 0.0, 1.0, targets)
    found = {}
    for name, batch in (("whole", BatchConfig(6, 1)), ("cut", BatchConfig(2, 3))):
        subject = distillation(inputs, batch=batch)
        subject.loss.terms = objective.terms
        subject.cache = ManyDocuments(subject.cache)
        steps = [subject.loss_of(1, micro) for micro in range(batch.accumulate)]
        (sum(loss for loss, _ in steps) / len(steps)).backward()
        hard = [figures["hard_full"] + figures["hard_top1"] + figures["kl"] for _, figures in steps]
        gradients = [part.grad.flatten() for part in subject.model.parameters() if part.grad is not None]
        found[name] = sum(hard) / len(hard), torch.cat(gradients)
    (whole, gradient), (cut, other) = found["whole"], found["cut"]
    assert cut == pytest.approx(whole, rel=1e-6)
    assert float((other - gradient).norm()) <= 1e-5 * float(gradient.norm())


def test_without_a_divergence_it_is_cross_entropy_of_the_text(inputs: dict[str, Artifact]) -> None:
    """As torch has it, also tile by tile; what is held out is the KL all the same."""
    objective = Objective("t", 1.0, 0.0, 1.0, "negatives", False, 0.0, 0.0, "all")
    found = distillation(inputs, batch=BatchConfig(5, 1), objective=objective)
    loss, figures = found.loss_of(0, 0)
    batch = found.cache.batch(batch_rows(3, 0, 5, found.cache.size()))
    labels = batch.tokens.roll(-1, 1).where(batch.continues, -100)
    exact = torch.nn.functional.cross_entropy(
        found.model(batch.tokens).logits.double().flatten(0, 1), labels.flatten(), ignore_index=-100
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6) and set(figures) == {"tokens", "hard_full"}
    assert found.evaluate() == distillation(inputs).evaluate()


def test_a_cache_that_does_not_know_who_speaks_is_refused(inputs: dict[str, Artifact]) -> None:
    objective = Objective("t", 1.0, 0.0, 1.0, "negatives", False, 0.0, 0.0, "assistant")
    with pytest.raises(MismatchError, match="its text is not of conversations"):
        distillation(inputs, objective=objective)
    cache = TeacherCache(inputs["teacher"].path)
    for meta, reason in (
        ({"said": None, "said_problem": "an answer begins inside a token"}, "an answer begins inside a token"),
        ({"said": {"train": 0, "tune": 3}}, "no assistant speaks in its training part"),
    ):
        cache.meta, cache.knows_who = {**cache.meta, **meta}, meta["said"] is not None
        with pytest.raises(MismatchError, match=reason) as caught:
            require_said(cache, "stages.sft.objective.targets")
        assert caught.value.problems[0].path == "stages.sft.objective.targets"


class ManyDocuments:
    """A cache, as if documents began here and there: in some sequences nowhere, in others at every other token."""

    def __init__(self, cache: TeacherCache):
        self.cache = cache

    def size(self, part: str) -> int:
        return self.cache.size(part)

    def starts(self, rows: list[int]) -> torch.Tensor:
        found = torch.zeros(len(rows), self.cache.seq_len, dtype=torch.bool)
        for place, row in enumerate(rows):
            if row % 4:
                found[place, :: 1 + row % 4] = True
        return found

    def batch(self, rows: list[int], part: str, device: Any) -> TeacherBatch:
        return replace(self.cache.batch(rows, part, device), starts=self.starts(rows), said=self.said(rows))

    def said(self, rows: list[int]) -> torch.Tensor:
        """Of every third sequence nothing, of others the second half, third or quarter."""
        places = torch.arange(self.cache.seq_len)
        return torch.stack([(places * (row % 3) > places.numel() * (row % 5) / 4) for row in rows])

    def target_share(self, rows: list[int], part: str = "train", said: bool = False) -> float:
        batch = self.batch(rows, part, "cpu")
        return float((batch.continues & batch.says if said else batch.continues).double().mean())


def test_a_head_that_gets_an_adapter_is_looked_at_again(
    inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from a1q.training.adapters import attach_adapters

    monkeypatch.setattr("a1q.training.width.WIDE", 0)
    found = distillation(inputs)
    assert found.loss.heads() is not None
    attach_adapters(found.model, [name for name, _ in found.model.named_modules() if name == "lm_head"], 2, 2.0, 0.0)
    assert found.loss.heads() is None


def test_micro_batches_walk_on(inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    found = distillation(inputs)
    seen: list[list[int]] = []
    monkeypatch.setattr(found, "_loss", lambda rows, part, share: seen.append(rows))
    for step in range(9):
        for micro in range(2):
            found.loss_of(step, micro)
    assert len({row for rows in seen for row in rows}) == 90


def test_a_cache_that_cannot_serve_is_refused(inputs: dict[str, Artifact]) -> None:
    cache = TeacherCache(inputs["teacher"].path)
    cache.meta = {**cache.meta, "random_negatives": 0}
    objective = Objective("t", 2.0, 0.0, 0.0, "bucket", False, 0.0, 1.0, "all")
    with pytest.raises(StageError, match="or random negatives to estimate"):
        Distillation(tiny_model(), cache, objective, BatchConfig(1, 1), Runtime(), 0, 1)
