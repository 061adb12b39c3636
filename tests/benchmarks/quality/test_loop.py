from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.quality.loop import distill
from tests.tiny import tiny_model

STEPS, BATCH = 12, 4


def sequences():
    return torch.randint(320, (BATCH, 16), generator=torch.Generator().manual_seed(2))


def run(lr: float = 1e-2):
    teacher = tiny_model()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.mlp.down_proj.weight.add_(0.2 * torch.randn(64, 96, generator=torch.Generator().manual_seed(1)))
    weights = [layer.mlp.down_proj.weight for layer in student.model.layers]
    tokens = sequences().repeat(STEPS, 1)
    found = distill(student, teacher, tokens, [{"params": weights, "lr": lr}], STEPS, BATCH, 2)
    return found, student, teacher


def test_the_loss_falls_and_only_what_was_named_moves():
    found, student, teacher = run()
    assert len(found["losses"]) == STEPS and found["seconds"] > 0
    assert found["losses"][-1] < 0.6 * found["losses"][0]
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight)
    assert not student.training and not teacher.training


def test_the_same_seed_gives_the_same_bits():
    (first, one, _), (second, two, _) = run(), run()
    assert first["losses"] == second["losses"]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_first_loss_is_the_divergence_of_teacher_to_student():
    found, _, teacher = run(lr=0.0)
    tokens = sequences()
    _, student, _ = run(lr=0.0)
    with torch.no_grad():
        p, q = (model.double()(input_ids=tokens).logits.log_softmax(-1) for model in (teacher, student))
    assert found["losses"][0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_adam_takes_its_first_step_at_the_warmup_rate():
    """A first step of Adam moves every parameter by the learning rate, which is a third of its peak then."""
    teacher = tiny_model()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.model.norm.weight.mul_(1.5)
    before = student.model.norm.weight.detach().clone()
    tokens = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(2))
    distill(student, teacher, tokens, [{"params": [student.model.norm.weight], "lr": 3e-3}], 1, 2, warmup=2)
    assert torch.allclose((student.model.norm.weight - before).abs(), torch.full((64,), 1e-3), rtol=1e-2)


def test_too_few_tokens_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="12 steps of 4 sequences need 48, there are 10"):
        distill(model, model, torch.zeros(10, 8, dtype=torch.int64), [], 12, 4)
