import pytest
import torch

from a1q.distill.local import layer_outputs, local_loss, relative_error
from tests.tiny import tiny_family


def states(seed=0, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_relative_error_and_its_gradient():
    found, wanted, root = states(0, 2, 5, 6).requires_grad_(), states(1, 2, 5, 6), states(2, 6, 6)
    matrix = root @ root.T
    difference = found - wanted
    expected = torch.einsum("bli,ij,blj->bl", difference, matrix, difference).mean() / 0.3
    torch.testing.assert_close(relative_error(found, wanted, 0.3, root), expected)
    own = torch.einsum("bli,ij,blj->bl", wanted, matrix, wanted)
    each = torch.einsum("bli,ij,blj->bl", difference, matrix, difference)
    ours, theirs = relative_error(found, wanted, root=root), (each / own).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, found)[0] for loss in (ours, theirs)))


def test_it_is_free_of_scale_and_one_for_a_student_that_says_nothing():
    found, wanted = states(0, 2, 5, 6), states(1, 2, 5, 6)
    torch.testing.assert_close(relative_error(7 * found, 7 * wanted), relative_error(found, wanted))
    assert relative_error(torch.zeros_like(wanted), wanted).item() == pytest.approx(1)
    assert relative_error(wanted, wanted).item() == 0
    assert torch.isfinite(relative_error(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))


def test_parts_of_a_batch_have_the_mean_of_the_whole():
    found, wanted = states(0, 5, 4, 6), 10 ** states(2, 5, 1, 1) * states(1, 5, 4, 6)
    parts = [relative_error(found[rows], wanted[rows]) * len(found[rows]) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(parts) / 5, relative_error(found, wanted))


def test_low_precision_is_computed_on_in_float32():
    found, wanted = (states(seed, 2, 5, 6).bfloat16() for seed in (0, 1))
    error = relative_error(found, wanted)
    assert error.dtype == torch.float32
    assert error.item() == pytest.approx(relative_error(found.double(), wanted.double()).item(), rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_states_are_those_behind_every_layer_before_the_final_norm(family):
    model = tiny_family(family)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad(), layer_outputs(model) as found:
        out = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
    assert len(found) == model.config.num_hidden_layers
    for ours, theirs in zip(found[:-1], out.hidden_states[1:-1], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(model.base_model.norm(found[-1]), out.last_hidden_state)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert len(found) == model.config.num_hidden_layers, "the hooks are gone"
    with layer_outputs(model, False) as none:
        model(input_ids=ids, use_cache=False)
    assert none == []


def test_the_loss_is_the_mean_over_layers():
    ours, theirs = ([states(seed, 1, 4, 6) for seed in seeds] for seeds in ((0, 1, 2), (3, 4, 5)))
    pairs = zip(ours, theirs, strict=True)
    errors = [((a - b).square().sum(-1) / b.square().sum(-1)).mean().item() for a, b in pairs]
    assert local_loss(ours, theirs).item() == pytest.approx(sum(errors) / 3)
    with pytest.raises(ValueError, match="zip"):
        local_loss(ours, theirs[:2])
