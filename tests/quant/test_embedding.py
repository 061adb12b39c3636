"""Quantized embeddings: look-ups, scaling, padding, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import embedding

from a1q.errors import StageError
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.module import QuantModule, quantized_modules
from a1q.quant.tied import swap_module
from tests.tiny import tiny_family

VOCABULARY, HIDDEN = 40, 24
SPECS = [
    {"scheme": "lut", "bits": 4},
    {"scheme": "lut", "bits": 4, "granularity": "group", "channels": 8},
    {"scheme": "lut", "bits": 3, "granularity": "channel"},
    {"scheme": "lut_lowrank", "bits": 4},
    {"scheme": "lut_lowrank", "bits": 2, "rank": 3},
    {"scheme": "vector_lut", "bits": 3},
    {"scheme": "balanced", "bits": 4},
    {"scheme": "affine", "bits": 4, "granularity": "channel"},
    {"scheme": "affine", "bits": 4, "granularity": "group", "group_size": 8, "symmetric": False},
]
over_schemes = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))


def dense(seed: int = 0, padding: int | None = None) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(VOCABULARY, HIDDEN, padding)


@over_schemes
@given(ids=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60), keep=st.booleans(), fp16=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_look_up_gives_the_rows_of_the_weight(spec, ids: list[int], keep: bool, fp16: bool) -> None:
    module = QuantEmbedding.quantize(dense(), spec, keep_latent=keep)
    module.straight_through_fp16 = fp16
    tokens = torch.tensor(ids)
    torch.testing.assert_close(module(tokens), module.weight[tokens], rtol=1e-6, atol=1e-7)
    module.snap()
    torch.testing.assert_close(module(tokens), module.dequantize()[tokens], rtol=1e-6, atol=1e-7)
    assert module(tokens[None]).shape == (1, len(ids), HIDDEN)


@over_schemes
@pytest.mark.parametrize("keep", [True, False])
def test_gradients_are_those_of_a_look_up_in_the_whole_weight(spec, keep: bool) -> None:
    tokens = torch.randint(VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
    tokens[0] = 5  # the padding id among them, and many times
    upstream = torch.randn(4, 9, HIDDEN, generator=torch.Generator().manual_seed(1))
    module = QuantEmbedding.quantize(dense(padding=5), spec, keep_latent=keep)
    trained = {name: part for name, part in module.named_parameters() if part.requires_grad}
    assert trained
    (module(tokens) * upstream).sum().backward()
    found = {name: part.grad.clone() for name, part in trained.items()}
    module.zero_grad()
    (embedding(tokens, module.weight, padding_idx=5) * upstream).sum().backward()
    for name, part in trained.items():
        torch.testing.assert_close(found[name], part.grad, rtol=1e-4, atol=1e-5)
        assert bool(part.grad.abs().sum() > 0), name


@over_schemes
def test_a_look_up_makes_no_whole_weight(spec, monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantEmbedding.quantize(dense(), spec, keep_latent=False)

    def whole(self: QuantModule) -> torch.Tensor:
        raise AssertionError("the whole weight was made")

    monkeypatch.setattr(QuantModule, "weight", property(whole))
    monkeypatch.setattr(QuantModule, "parts", whole)
    module(torch.tensor([[3, 1, 3]])).sum().backward()


def test_a_scheme_that_knows_no_rows_looks_up_in_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantEmbedding.quantize(dense(), SPECS[3])
    tokens = torch.tensor([[3, 1, 3]])
    expected = module(tokens)
    monkeypatch.setattr(type(module.scheme), "select_rows", lambda self, parts, rows: None)
    assert torch.equal(module(tokens), expected)


def test_a_scaled_embedding_stays_scaled_and_its_head_does_not() -> None:
    model = tiny_family("gemma3_text")
    table = model.model.embed_tokens
    tokens = torch.tensor([[1, 7, 300]])
    with torch.no_grad():
        rows = table(tokens)
        quantized = QuantEmbedding.quantize(table, {"scheme": "lut", "bits": 8, "granularity": "channel"})
        swap_module(model, "model.embed_tokens", quantized)
        torch.testing.assert_close(quantized(tokens), rows, rtol=0.05, atol=0.05)
        torch.testing.assert_close(quantized(tokens), quantized.weight[tokens] * 8)  # the root of hidden 64
        x = torch.randn(1, 3, 64)
        torch.testing.assert_close(model.lm_head(x), x @ quantized.weight.T)
    assert [name for name, _ in quantized_modules(model)] == ["model.embed_tokens"]


def test_an_embedding_of_its_own_kind_an_adapter_and_a_wrong_id_are_refused() -> None:
    class Shifted(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input + 2)

    with pytest.raises(StageError, match="type Shifted computes more than a look-up"):
        QuantEmbedding.quantize(Shifted(VOCABULARY, HIDDEN), SPECS[0])
    module = QuantEmbedding.quantize(dense(), SPECS[0])
    with pytest.raises(StageError, match="takes no adapter"):
        module.set_adapter(torch.ones(2, HIDDEN), torch.ones(VOCABULARY, 2), 1.0)
    with pytest.raises(IndexError):
        module(torch.tensor([VOCABULARY]))


def test_it_has_what_transformers_reads_of_an_embedding() -> None:
    module = QuantEmbedding.quantize(dense(padding=2), SPECS[0])
    assert isinstance(module, nn.Embedding)
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (VOCABULARY, HIDDEN, 2)
    assert module.kind == "embedding" and module.shape == (VOCABULARY, HIDDEN)
    half = QuantEmbedding.quantize(dense().bfloat16(), SPECS[0])
    assert half(torch.tensor([1])).dtype == torch.bfloat16


def test_the_inputs_of_a_tied_head_count_half_in_the_fit() -> None:
    from a1q.quant.build import make_scheme
    from a1q.quant.importance import Inputs

    table, heard = dense(), torch.rand(HIDDEN, generator=torch.Generator().manual_seed(0)) ** 3
    expected = make_scheme(SPECS[3]).fit(table.weight, Inputs(heard + heard.mean()), 0)
    module = QuantEmbedding.quantize(table, SPECS[3], Inputs(heard))
    other = QuantEmbedding.quantize(table, SPECS[0])
    other.refit(SPECS[3], table.weight, Inputs(heard))
    for each in (module, other):
        assert all(torch.equal(part, expected[name]) for name, part in each.parts().items())
    assert not torch.equal(module.dequantize(), QuantEmbedding.quantize(table, SPECS[3]).dequantize())
