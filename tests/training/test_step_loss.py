"""Forward and loss in one module: beside a teacher that runs along, whole and tile by tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from a1q.distill.cache import TeacherCache
from a1q.engine.artifact import Artifact
from a1q.engine.stage import Runtime
from a1q.errors import MismatchError
from a1q.models.checkpoint import load_model
from a1q.training.device import recompute_layers
from a1q.training.distillation import BatchConfig, Distillation, Objective, stream_problem
from a1q.training.step_loss import NextTokenLoss
from tests.tiny import tiny_family, tiny_model
from tests.training.student import LENGTH, TUNE, build
from tests.watch import Largest

ONLINE = Objective("t", 1.0, 0.0, 0.0, "negatives", True, 0.0, 1.0, "all")
VOCABULARY = 320


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The cache holds all of the vocabulary, in fp16."""
    return build(tmp_path_factory.mktemp("step"), top_k=VOCABULARY, random_negatives=0)


def distillation(inputs: dict[str, Artifact], objective: Objective = ONLINE, amp: str = "no") -> Distillation:
    model, cache = load_model(inputs["model"].path), TeacherCache(inputs["teacher"].path)
    teacher = tiny_model() if objective.online else None
    return Distillation(model, cache, objective, BatchConfig(5, 2), Runtime(amp=amp), 3, 100, teacher)


def gradients(subject: Distillation) -> dict[str, torch.Tensor]:
    return {name: part.grad for name, part in subject.model.named_parameters() if part.grad is not None}


def stepped(subject: Distillation) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, figures and gradients of a training step."""
    loss, figures = subject.loss_of(0, 1)
    loss.backward()
    return loss.item(), figures, gradients(subject)


def near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], share: float, noise: float = 1e-7) -> None:
    assert found.keys() == wanted.keys() and len(found) >= 20
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= share * float(gradient.norm()) + noise, name


@pytest.fixture(params=["whole", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("a1q.training.width.WIDE", 0 if request.param == "tiles" else 1 << 28)
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_of_the_whole_vocabulary_says_the_same(
    inputs: dict[str, Artifact], way: str, temperature: float
) -> None:
    """Up to the cache's rounding to fp16: loss, figures, gradients and the held-out loss."""
    objective = Objective("t", temperature, 0.5, 0.5, "bucket", False, 0.0, 1.0, "all")
    cached, online = (
        distillation(inputs, item)
        for item in (objective, dataclasses.replace(objective, tail="negatives", online=True))
    )
    assert (online.loss.heads() is not None) == (way == "tiles")
    (loss, figures, grads), (same, also, others) = stepped(cached), stepped(online)
    assert same == pytest.approx(loss, rel=1e-3)
    assert also == pytest.approx(figures, rel=1e-3)
    near(others, grads, 0.01)
    assert online.evaluate() == pytest.approx(cached.evaluate(), rel=2e-3)


def test_the_held_out_loss_is_the_exact_kl_whatever_the_objective(inputs: dict[str, Artifact], way: str) -> None:
    found = distillation(inputs, dataclasses.replace(ONLINE, temperature=2.0, hard_full=0.5, local=1.0))
    tokens = found.cache.batch(range(TUNE), "tune").tokens
    with torch.no_grad():
        p, q = (model(tokens).logits.double().log_softmax(-1) for model in (tiny_model(), found.model))
    assert found.evaluate() == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_tile_by_tile_it_is_the_same(inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, amp: str) -> None:
    found = []
    for wide in (1 << 28, 0):
        monkeypatch.setattr("a1q.training.width.WIDE", wide)
        found.append(stepped(distillation(inputs, dataclasses.replace(ONLINE, temperature=2.0, hard_top1=0.3), amp)))
    (loss, figures, grads), (same, also, others) = found
    share = {"no": 1e-5, "bf16": 0.02}[amp]
    assert same == pytest.approx(loss, rel=share)
    assert also == pytest.approx(figures, rel=share)
    # magnitudes are sums of rows' gradients that cancel out: of bf16's rounding errors they keep what all others lose
    largest = max(float(gradient.norm()) for gradient in grads.values())
    near(others, grads, 10 * share, noise=1e-7 if amp == "no" else 1e-3 * largest)


def test_a_teacher_gets_no_gradient_and_stays_as_it_is(inputs: dict[str, Artifact], way: str) -> None:
    teacher = tiny_model().train()
    cache = TeacherCache(inputs["teacher"].path)
    before = {name: part.clone() for name, part in teacher.state_dict().items()}
    model = load_model(inputs["model"].path)
    objective = dataclasses.replace(ONLINE, local=1.0)
    subject = Distillation(model, cache, objective, BatchConfig(2, 1), Runtime(), 3, 100, teacher)
    subject.model.train()
    subject.loss_of(0, 0)[0].backward()
    assert not teacher.training and subject.model.training
    assert all(part.grad is None for part in teacher.parameters())
    assert all(torch.equal(part, before[name]) for name, part in teacher.state_dict().items())
    own = {id(part) for part in subject.loss.parameters()}
    assert own == {id(part) for part in model.parameters()}, "the loss's parameters are the student's alone"


def test_local_errors_against_float64(inputs: dict[str, Artifact], way: str) -> None:
    """The difference that the term makes, in loss and gradients, is that of its formula by autograd in float64."""
    plain, local = (distillation(inputs, dataclasses.replace(ONLINE, local=weight)) for weight in (0.0, 3.0))
    (loss, _, grads), (more, figures, others) = stepped(plain), stepped(local)
    tokens = local.cache.batch(rows_of(local), "train").tokens
    student, teacher = load_model(inputs["model"].path).double(), tiny_model().double()
    pairs = zip(layer_states(student, tokens), layer_states(teacher, tokens), strict=True)
    pairs = [(ours, other.detach()) for ours, other in pairs]
    errors = [(ours - other).square().sum(-1) / other.square().sum(-1) for ours, other in pairs]
    expected = torch.stack(errors).mean()
    assert figures["local"] == pytest.approx(expected.item(), rel=1e-5)
    assert more - loss == pytest.approx(3 * expected.item(), rel=1e-4)
    expected.backward()
    for name, part in student.named_parameters():
        if part.grad is not None:
            found = (others[name] - grads[name]).double()
            assert float((found - 3 * part.grad).norm()) <= 1e-3 * float(3 * part.grad.norm()) + 1e-6, name


def test_local_errors_alone_ask_no_head_of_the_teacher(
    inputs: dict[str, Artifact], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the divergence the loss is the cached hard label's and the layers'; the teacher's logits are not made."""
    objective = dataclasses.replace(ONLINE, kl=0.0, hard_full=1.0)
    both, local = (distillation(inputs, dataclasses.replace(objective, local=weight)) for weight in (3.0, 1.0))
    plain = distillation(inputs, dataclasses.replace(objective, online=False))
    assert all((subject.loss.heads() is not None) == (way == "tiles") for subject in (both, local))
    monkeypatch.setattr(type(tiny_model()), "forward", without_teacher(type(tiny_model()).forward, local, both))
    (loss, figures, grads), (more, _, others) = stepped(local), stepped(both)
    alone, hard, bare = stepped(plain)
    assert figures.keys() == {"tokens", "hard_full", "local"} and hard.keys() == {"tokens", "hard_full"}
    assert loss == pytest.approx(alone + figures["local"], rel=1e-6)
    assert more == pytest.approx(alone + 3 * figures["local"], rel=1e-6)
    for name, gradient in grads.items():
        expected = bare[name] + 3 * (gradient - bare[name])
        assert float((others[name] - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-6, name


def without_teacher(forward: Any, *subjects: Distillation) -> Any:
    """`forward` that no teacher may call."""
    teachers = {id(subject.loss._teachers[0]) for subject in subjects}

    def checked(self: Any, *arguments: Any, **named: Any) -> Any:
        assert id(self) not in teachers
        return forward(self, *arguments, **named)

    return checked


def rows_of(subject: Distillation) -> list[int]:
    """Those that `stepped` reads."""
    from a1q.training.batches import batch_rows

    return batch_rows(subject.seed, 5, 5, subject.cache.size("train"))


def layer_states(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What transformers says lies behind every layer, the last one's as the final norm takes it."""
    taken: list[torch.Tensor] = []
    hook = model.base_model.norm.register_forward_pre_hook(lambda _module, arguments: taken.append(arguments[0]))
    states = model.base_model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    return [*states[1:-1], *taken]


def test_layers_computed_again_give_the_same_bits(inputs: dict[str, Artifact], way: str) -> None:
    found = []
    for recompute in (False, True):
        subject = distillation(inputs, dataclasses.replace(ONLINE, local=0.5))
        subject.model.train()
        if recompute:
            recompute_layers(subject.model)
        found.append(stepped(subject))
    (loss, figures, grads), (same, also, others) = found
    assert (same, also) == (loss, figures)
    assert all(torch.equal(gradient, others[name]) for name, gradient in grads.items())


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of training online, of training on text alone, and their evaluations."""
    vocabulary, rows = 4096, 64
    student, teacher = (tiny_model(seed, vocab_size=vocabulary, hidden_size=16, head_dim=4) for seed in (0, 1))
    tokens = torch.randint(vocabulary, (rows, LENGTH))
    monkeypatch.setattr("a1q.training.width.WIDE", 0)
    monkeypatch.setattr("a1q.distill.tiles.TILE", 1)
    every = torch.ones_like(tokens, dtype=torch.bool)
    batch = type("Batch", (), {"tokens": tokens, "continues": every, "targets": None, "borders": None})()
    from a1q.distill.losses import Terms
    from a1q.training.step_loss import DistillationLoss

    online = DistillationLoss(student, teacher, Terms(2.0, 0.1, 0.1), Terms(), 0.0, True, Runtime())
    text = NextTokenLoss(student)
    with Largest() as seen:
        online(batch)[0].backward()
        text(tokens).backward()
        with torch.no_grad():
            online(batch, held_out=True)
            text(tokens)
    assert all(part.grad is not None for part in student.parameters())
    assert seen.numbers < rows * LENGTH * vocabulary / 8


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("masked", [False, True])
def test_next_token_loss(way: str, family: str, masked: bool) -> None:
    model = tiny_family(family)
    tokens = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    counts = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    loss = NextTokenLoss(model)(tokens, counts)
    loss.backward()
    found = {name: part.grad.clone() for name, part in model.named_parameters()}
    model.double().zero_grad()
    labels = tokens[:, 1:] if counts is None else tokens[:, 1:].masked_fill(~counts[:, :-1], -100)
    expected = torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), labels.flatten())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    near(found, {name: part.grad for name, part in model.named_parameters()}, 1e-4)


def test_a_head_that_does_more_than_a_product_takes_all_logits(way: str) -> None:
    capped = tiny_family("gemma3_text", final_logit_softcapping=2.0)
    tokens = torch.arange(24).reshape(2, 12)
    expected = torch.nn.functional.cross_entropy(capped(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert NextTokenLoss(capped)(tokens).item() == pytest.approx(expected.item(), rel=1e-5)


def test_layers_that_cannot_be_compared_are_refused(inputs: dict[str, Artifact]) -> None:
    cache = TeacherCache(inputs["teacher"].path)
    objective = dataclasses.replace(ONLINE, local=1.0)
    with pytest.raises(MismatchError, match="the student has 2 layers of width 64, the teacher 3 of 64"):
        teacher = tiny_model(num_hidden_layers=3)
        Distillation(tiny_model(), cache, objective, BatchConfig(1, 1), Runtime(), 0, 1, teacher)
    config = {"num_hidden_layers": 2, "hidden_size": 8}
    rotated = {**config, "a1q_prepared": ["rotate_residual"]}
    assert "another basis" in stream_problem(config, rotated) and "another basis" in stream_problem(rotated, config)
    assert stream_problem(config, {**config, "a1q_prepared": ["scale"]}) == stream_problem(rotated, rotated) == ""
