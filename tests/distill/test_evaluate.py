import math

import pytest
import torch

from a1q.distill.evaluate import evaluate_model
from tests.distill.fakes import random_tokens
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1), tiny_model(seed=2)


def reference(student, teacher, tokens):
    """The same figures, all in float64 and at once."""
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        q = student.double()(input_ids=ids).logits.log_softmax(-1)
        p = teacher.double()(input_ids=ids).logits.log_softmax(-1)
    student.float(), teacher.float()
    target = ids[:, 1:].flatten()
    loss = torch.nn.functional.nll_loss(q[:, :-1].flatten(0, 1), target).item()
    teacher_loss = torch.nn.functional.nll_loss(p[:, :-1].flatten(0, 1), target).item()
    return {
        "loss": loss,
        "ppl": math.exp(loss),
        "teacher_ppl": math.exp(teacher_loss),
        "kl": torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item(),
        "top1": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        "tokens": tokens.size,
    }


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_figures_are_those_of_float64(models, batch_size):
    tokens = random_tokens(7, 12, 320)
    seen = []
    found = evaluate_model(
        *models, tokens, batch_size=batch_size, progress=lambda done, total: seen.append((done, total))
    )
    wanted = reference(*models, tokens)
    assert wanted["kl"] > 0.1
    assert found == pytest.approx(wanted, rel=1e-5)
    assert seen[-1] == (7, 7) and len(seen) == -(-7 // batch_size)


def test_a_model_against_itself(models):
    found = evaluate_model(models[0], models[0], random_tokens(3, 8, 320))
    assert abs(found["kl"]) < 1e-7
    assert found["top1"] == 1
    assert found["ppl"] == found["teacher_ppl"]


def test_without_a_teacher_and_with_its_mode_restored(models):
    model = models[0].train()
    found = evaluate_model(model, None, random_tokens(3, 8, 320))
    assert set(found) == {"loss", "ppl", "tokens"}
    assert model.training
    model.eval()
    evaluate_model(model, None, random_tokens(3, 8, 320))
    assert not model.training
