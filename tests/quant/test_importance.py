import pytest
import torch

from a1q.quant.importance import LEAST, Inputs, gram_of, importance_of, row_importance_of

WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def test_what_is_not_known_counts_evenly() -> None:
    assert torch.equal(importance_of(WEIGHT, None), torch.ones(4))
    assert torch.equal(row_importance_of(WEIGHT, Inputs(torch.ones(4))), torch.ones(6))
    assert torch.equal(importance_of(WEIGHT, Inputs(torch.zeros(4))), torch.ones(4))
    assert gram_of(WEIGHT, None) is None and gram_of(WEIGHT, Inputs(torch.ones(4))) is None


def test_importance_has_mean_one_and_a_floor() -> None:
    inputs = Inputs(torch.tensor([0.0, 1, 2, 5]), rows=torch.tensor([0.0, 0, 0, 6, 6, 12]))
    assert importance_of(WEIGHT, inputs).tolist() == pytest.approx([LEAST, 0.5, 1, 2.5])
    assert row_importance_of(WEIGHT, inputs).tolist() == pytest.approx([LEAST, LEAST, LEAST, 1.5, 1.5, 3])
    assert importance_of(WEIGHT.double(), inputs).dtype == torch.float64


@pytest.mark.parametrize("bad", [torch.ones(3), torch.full((4,), torch.nan), -torch.ones(4)])
def test_bad_values_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="4 finite values"):
        importance_of(WEIGHT, Inputs(bad))
    with pytest.raises(ValueError, match="6 finite values"):
        row_importance_of(WEIGHT, Inputs(torch.ones(4), rows=bad))
    with pytest.raises(ValueError, match="4x4 finite values"):
        gram_of(WEIGHT, Inputs(torch.ones(4), gram=bad[:, None].repeat(1, 3)))
