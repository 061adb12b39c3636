"""The loss against float64 references that know the teacher's whole distribution."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.distill.cache import TeacherBatch
from a1q.distill.losses import TAILS, kd_loss, tail_problem
from a1q.distill.negatives import draw_offsets, offsets_to_ids

B, L, V = 2, 7, 60


def make_batch(teacher, kept, count, seed=0, tokens=None, starts=None, temperatures=()):
    """What a cache would say about `teacher`, logits [B, L, V] in float64, without the rounding to fp16."""
    vocabulary = teacher.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    top, ids = teacher.topk(kept, dim=-1)
    offsets = draw_offsets((*teacher.shape[:-1], count), vocabulary - kept, generator)
    negatives = offsets_to_ids(offsets, ids, vocabulary)
    if tokens is None:
        tokens = torch.randint(vocabulary, teacher.shape[:-1], generator=generator)
    values = teacher.gather(-1, negatives) if count else None
    if starts is None:
        starts = torch.zeros_like(tokens, dtype=torch.bool)
    partitions = {number: (teacher / number).logsumexp(-1) for number in temperatures}
    return TeacherBatch(tokens, ids, top, negatives, values, teacher.logsumexp(-1), vocabulary, starts, partitions)


def pair(seed=0, distance=0.7, vocabulary=V):
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(B, L, vocabulary, dtype=torch.float64, generator=generator)
    student = teacher + distance * torch.randn(B, L, vocabulary, dtype=torch.float64, generator=generator)
    return teacher, student.requires_grad_()


def full_kl(teacher, student, temperature):
    p, q = (torch.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_all_of_the_vocabulary_is_the_exact_kl(tail, temperature):
    teacher, student = pair()
    loss, _ = kd_loss(student, make_batch(teacher, V, 0), temperature=temperature, tail=tail)
    exact = full_kl(teacher, student, temperature)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(exact, student))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_negatives_that_cover_the_rest_are_the_exact_kl(temperature):
    teacher, student = pair()
    loss, _ = kd_loss(student, make_batch(teacher, 9, V - 9), temperature=temperature, tail="negatives")
    exact = full_kl(teacher, student, temperature)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(exact, student))


def test_bucket_is_the_kl_of_the_grouped_distributions():
    teacher, student = pair()
    kept = 6
    ids = teacher.topk(kept).indices

    def grouped(logits):
        chosen = torch.softmax(logits, -1).gather(-1, ids)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)

    p, q = grouped(teacher), grouped(student)
    exact = (p * (p / q).log()).sum(-1).mean()
    loss, _ = kd_loss(student, make_batch(teacher, kept, 0), tail="bucket")
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(exact, student))
    assert loss < full_kl(teacher, student, 1.0)


@pytest.mark.parametrize("known", [False, True], ids=["every negative", "partition"])
def test_bucket_at_a_temperature_with_every_negative_or_the_partition_is_exact(known):
    teacher, student = pair()
    kept, temperature = 6, 2.0
    ids = teacher.topk(kept).indices

    def grouped(logits):
        chosen = torch.softmax(logits / temperature, -1).gather(-1, ids)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)

    p, q = grouped(teacher), grouped(student)
    exact = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    batch = make_batch(teacher, kept, 0, temperatures=(2.0,)) if known else make_batch(teacher, kept, V - kept)
    loss, _ = kd_loss(student, batch, temperature=temperature, tail="bucket")
    torch.testing.assert_close(loss, exact)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_candidates_are_softmaxes_over_the_top_alone(temperature):
    teacher, student = pair()
    top, ids = teacher.topk(8)
    p = torch.log_softmax(top / temperature, -1)
    q = torch.log_softmax(student.gather(-1, ids) / temperature, -1)
    exact = temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    loss, _ = kd_loss(student, make_batch(teacher, 8, 5), temperature=temperature, tail="candidates")
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(exact, student))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_estimate_by_negatives_has_no_bias_in_value_and_gradient(temperature):
    """Where the teacher's partition is known."""
    teacher, student = pair(distance=1.0)
    exact = full_kl(teacher, student, temperature)
    (wanted,) = torch.autograd.grad(exact, student)
    values, gradients = [], []
    for seed in range(400):
        batch = make_batch(teacher, 8, 10, seed, temperatures=(2.0,))
        loss, _ = kd_loss(student, batch, temperature=temperature, tail="negatives")
        values.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, student)[0])
    found = torch.stack(values)
    error = found.std() / len(values) ** 0.5
    assert (found.mean() - exact).abs() < 4 * error
    assert error < 0.02 * exact  # the test would see a bias of some per cent
    # The same for the gradient along its own direction; a loss that forgot the weight would give a part of it.
    along = torch.stack([(gradient * wanted).sum() for gradient in gradients])
    assert (along.mean() - wanted.square().sum()).abs() < 4 * along.std() / len(gradients) ** 0.5
    assert along.std() / len(gradients) ** 0.5 < 0.05 * wanted.square().sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_perfect_student_has_no_loss_and_no_gradient(temperature):
    teacher, _ = pair()
    student = teacher.clone().requires_grad_()
    for tail in TAILS:
        loss, _ = kd_loss(student, make_batch(teacher, 8, 10), temperature=temperature, tail=tail)
        assert abs(loss.item()) < 1e-9
        assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-9


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(TAILS),
    st.sampled_from([1.0, 1.7]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.2]),
    st.integers(0, 1000),
)
def test_gradients_agree_with_finite_differences(tail, temperature, hard_top1, hard_full, seed):
    teacher, student = pair(seed)
    batch = make_batch(teacher, 6, V - 6, seed)  # every negative: the detached estimate is then a constant

    def loss_of(logits):
        return kd_loss(logits, batch, temperature=temperature, hard_top1=hard_top1, hard_full=hard_full, tail=tail)[0]

    direction = torch.randn(student.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad(loss_of(student), student)
    step = 1e-5
    with torch.no_grad():
        slope = (loss_of(student + step * direction) - loss_of(student - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hard_terms_are_cross_entropies(temperature):
    teacher, student = pair()
    batch = make_batch(teacher, 6, 12)
    soft, _ = kd_loss(student, batch, temperature=temperature)
    loss, terms = kd_loss(student, batch, temperature=temperature, hard_top1=0.3, hard_full=0.2)
    top1 = torch.nn.functional.cross_entropy(student.flatten(0, 1), teacher.argmax(-1).flatten())
    full = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten())
    torch.testing.assert_close(terms["hard_top1"], top1.detach())
    torch.testing.assert_close(terms["hard_full"], full.detach())
    torch.testing.assert_close(terms["kl"], soft.detach())
    torch.testing.assert_close(loss, soft + 0.3 * top1 + 0.2 * full)


def test_the_first_token_of_another_document_is_no_target():
    """Value and gradient against cross-entropy that is told which targets to ignore."""
    teacher, student = pair()
    starts = torch.zeros(B, L, dtype=torch.bool)
    starts[0, 0] = starts[0, 3] = starts[1, 1] = starts[1, L - 1] = True
    batch = make_batch(teacher, 6, 12, starts=starts)
    _, terms = kd_loss(student, batch, hard_full=1.0)
    targets = batch.tokens[:, 1:].masked_fill(starts[:, 1:], -100)
    exact = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(terms["hard_full"], exact.detach())
    soft, full = (kd_loss(student, batch, hard_full=weight)[0] for weight in (0.0, 1.0))
    wanted = torch.autograd.grad(exact, student)
    torch.testing.assert_close(torch.autograd.grad(full - soft, student), wanted)
    assert (wanted[0][0, 2] == 0).all() and (wanted[0][0, 1] != 0).any()


def test_documents_of_one_token_leave_no_target():
    teacher, student = pair()
    batch = make_batch(teacher, 6, 12, starts=torch.ones(B, L, dtype=torch.bool))
    soft, _ = kd_loss(student, batch)
    loss, terms = kd_loss(student, batch, hard_full=1.0)
    assert terms["hard_full"] == 0 and loss == soft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_are_computed_on_in_float32(dtype):
    teacher, student = pair()
    batch = make_batch(teacher, 6, 12)
    batch = dataclasses.replace(
        batch, logits=batch.logits.float(), negative_logits=batch.negative_logits.float(), lse=batch.lse.float()
    )
    rounded = student.detach().to(dtype).requires_grad_()
    loss, _ = kd_loss(rounded, batch)
    wanted, _ = kd_loss(rounded.detach().double(), make_batch(teacher, 6, 12))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    loss.backward()
    assert rounded.grad.dtype == dtype


def test_what_the_cache_cannot_serve_is_refused():
    teacher, student = pair()
    bare = make_batch(teacher, 6, 0)
    assert "random negatives" in tail_problem("negatives", 1.0, 0, 5)
    assert "random negatives" in tail_problem("bucket", 2.0, 0, 5)
    assert "partition" in tail_problem("bucket", 2.0, 0, 5, (3.0,))
    assert not tail_problem("bucket", 2, 0, 5, (3.0, 2.0))
    assert not tail_problem("bucket", 1.0, 0, 5)
    assert not tail_problem("candidates", 2.0, 0, 5)
    assert not tail_problem("negatives", 2.0, 0, 0)
    with pytest.raises(ValueError, match="random negatives"):
        kd_loss(student, bare, tail="negatives")
    with pytest.raises(ValueError, match="not 'whole'"):
        kd_loss(student, bare, tail="whole")
    with pytest.raises(ValueError, match="vocabulary is 59, the teacher's 60"):
        kd_loss(student[..., :-1], bare, tail="bucket")


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_only_what_an_assistant_said_counts(tail, temperature):
    """Every term is the mean over the positions before such a token, in value and gradient."""
    teacher, student = pair()
    random = torch.Generator().manual_seed(5)
    said, starts = (torch.rand(B, L, generator=random) < share for share in (0.6, 0.2))
    batch = dataclasses.replace(make_batch(teacher, V, 0, starts=starts), said=said)
    loss, terms = kd_loss(
        student, batch, temperature=temperature, hard_top1=0.3, hard_full=0.2, kl=0.7, tail=tail, targets="assistant"
    )
    places = [(b, t) for b in range(B) for t in range(L - 1) if said[b, t + 1] and not starts[b, t + 1]]
    assert 2 < len(places) < B * L / 2
    exact = {"kl": [], "hard_top1": [], "hard_full": []}
    for b, t in places:
        q = student[b, t].log_softmax(-1)
        exact["kl"].append(full_kl(teacher[b, t], student[b, t], temperature))
        exact["hard_top1"].append(-q[teacher[b, t].argmax()])
        exact["hard_full"].append(-q[batch.tokens[b, t + 1]])
    means = {name: torch.stack(values).mean() for name, values in exact.items()}
    total = 0.7 * means["kl"] + 0.3 * means["hard_top1"] + 0.2 * means["hard_full"]
    torch.testing.assert_close(loss, total)
    for name, mean in means.items():
        torch.testing.assert_close(terms[name], mean.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(total, student))


def test_without_weight_the_divergence_is_not_computed():
    """Nor are the teacher's answers looked at: they may be anything."""
    teacher, student = pair()
    batch = make_batch(teacher, 6, 12)
    odd = dataclasses.replace(batch, logits=batch.logits * torch.nan, lse=batch.lse * torch.nan, negatives=batch.ids)
    loss, terms = kd_loss(student, odd, kl=0.0, hard_top1=0.5, hard_full=1.0, temperature=3.0, tail="bucket")
    exact = kd_loss(student, batch, kl=1.0, hard_top1=0.5, hard_full=1.0)[1]
    assert terms.keys() == {"hard_top1", "hard_full"}
    torch.testing.assert_close(loss, 0.5 * exact["hard_top1"] + exact["hard_full"])


def test_who_speaks_has_to_be_known():
    teacher, student = pair()
    with pytest.raises(ValueError, match="which tokens an assistant said"):
        kd_loss(student, make_batch(teacher, V, 0), targets="assistant")
