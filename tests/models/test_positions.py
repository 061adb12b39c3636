"""A packed document is given what it would be given alone: by models, streams, teachers, losses and measurements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a1q.distill.evaluate import evaluate_model
from a1q.distill.sensitivity import Divergences, replaced
from a1q.models.blocks import BlockStream
from a1q.models.positions import document_positions, passed
from a1q.quant.calibration import measure_statistics
from a1q.quant.statistics import Statistics
from tests.tiny import FAMILIES, tiny_family, tiny_model

generator = np.random.default_rng(0)
TOKENS = generator.integers(320, size=(5, 40)).astype(np.int32)
BORDERS = generator.random((5, 40)) < 0.1
BORDERS[0] = False  # one sequence is the middle of a long document
BORDERS[1, 0] = True


def pieces(borders: np.ndarray) -> list[slice]:
    """Of a row of borders, the documents."""
    cuts = [0, *(np.flatnonzero(borders[1:]) + 1).tolist(), len(borders)]
    return [slice(first, last) for first, last in itertools.pairwise(cuts)]


def alone(model, tokens: np.ndarray = TOKENS, borders: np.ndarray = BORDERS) -> torch.Tensor:
    """Logits [n, L, V] of every document by itself, in a forward pass of its own."""
    rows = []
    with torch.no_grad():
        for row, starts in zip(tokens, borders, strict=True):
            ids = torch.from_numpy(row).long()[None]
            rows.append(torch.cat([model(input_ids=ids[:, piece]).logits[0] for piece in pieces(starts)]))
    return torch.stack(rows)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_positions_count_from_the_last_border(borders: list[list[bool]]) -> None:
    found = document_positions(torch.tensor(borders)).tolist()
    for row, places in zip(borders, found, strict=True):
        count = -1
        for begins, place in zip(row, places, strict=True):
            count = 0 if begins else count + 1
            assert place == count


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_every_document_alone(family: str) -> None:
    model = tiny_family(family)
    wanted = alone(model)
    arguments = passed(torch.from_numpy(TOKENS).long(), torch.from_numpy(BORDERS))
    with torch.no_grad():
        torch.testing.assert_close(model(**arguments).logits, wanted, atol=2e-4, rtol=1e-4)
        across = model(**passed(torch.from_numpy(TOKENS).long())).logits
    assert (across - wanted).abs().max() > 0.1
    for batch_size in (2, 5):
        stream = BlockStream(model, TOKENS, batch_size, BORDERS)
        for index in range(len(stream.names)):
            stream.advance(index)
        with torch.no_grad():
            found = [stream.logits(hidden, number) for number, hidden in enumerate(stream.hidden)]
        torch.testing.assert_close(torch.cat(found), wanted, atol=2e-4, rtol=1e-4)


def test_a_stream_in_any_order_takes_each_batch_by_its_own_borders() -> None:
    model = tiny_model()
    stream = BlockStream(model, TOKENS, 2, BORDERS)
    first = [stream.run(0, stream.hidden[number], number) for number in (0, 1, 2)]
    for number in (2, 0, 1, 0):
        assert torch.equal(stream.run(0, stream.hidden[number], number), first[number])


def test_evaluation_reads_every_document_alone_and_predicts_within_it() -> None:
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    found = evaluate_model(student, teacher, TOKENS, borders=BORDERS, batch_size=2)
    q, p = (alone(model).double().log_softmax(-1) for model in (student, teacher))
    ids = torch.from_numpy(TOKENS).long()
    inside = torch.from_numpy(~BORDERS[:, 1:])
    losses = -q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert found["loss"] == pytest.approx(losses[inside].mean().item(), rel=1e-5)
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found["kl"] != pytest.approx(evaluate_model(student, teacher, TOKENS)["kl"], rel=1e-3)


def test_statistics_are_those_of_documents_alone_and_keep_the_borders(tmp_path) -> None:
    model = tiny_model()
    measured = measure_statistics(model, TOKENS, tmp_path, batch_size=2, borders=BORDERS, gradient_sequences=4)
    seen: list[torch.Tensor] = []
    name = "model.layers.1.mlp.gate_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double()))
    alone(model)
    hook.remove()
    torch.testing.assert_close(measured[name], torch.cat(seen).square().mean(0), rtol=1e-4, atol=1e-6)
    statistics = Statistics(tmp_path)
    assert statistics.borders is not None and (statistics.borders == BORDERS).all()
    whole = tmp_path / "whole"
    whole.mkdir()
    measure_statistics(model, TOKENS, whole, batch_size=2, gradient_sequences=4)
    assert Statistics(whole).borders is None
    layer = "model.layers.0"
    assert not torch.allclose(statistics.sensitivity(layer), Statistics(whole).sensitivity(layer), rtol=1e-2)


def test_changes_are_measured_on_documents_alone() -> None:
    model = tiny_model()
    meter = Divergences(model, TOKENS, 2, BORDERS)
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach() * 0.5
    before = alone(model).double().log_softmax(-1)
    with replaced(model, {name: weight}):
        after = alone(model).double().log_softmax(-1)
    wanted = (before.exp() * (before - after)).sum(-1).mean().item()
    assert meter.of(name, [weight], lambda: None) == pytest.approx([wanted], rel=1e-4)
    assert meter.together({name: weight}, lambda: None) == pytest.approx(wanted, rel=1e-4)
