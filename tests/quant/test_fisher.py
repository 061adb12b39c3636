from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from a1q.errors import StageError
from a1q.models.blocks import BlockStream
from a1q.quant import fisher
from a1q.quant.calibration import measure_statistics
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.fisher import fisher_information, sample_labels
from a1q.quant.linear import QuantLinear
from a1q.quant.statistics import Statistics
from a1q.quant.tied import swap_module
from tests.tiny import FAMILIES, tiny_family, tiny_model

TOKENS = np.random.default_rng(0).integers(320, size=(5, 24)).astype(np.int32)


def by_autograd(model, tokens: np.ndarray, seed: int) -> dict[str, torch.Tensor]:
    """F of every layer from one graph of the whole model; labels by the inverse of the distribution function."""
    outputs: dict[str, torch.Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):

        def keep(_, inputs, output, name=f"model.layers.{index}") -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output
            outputs[name].retain_grad()

        hooks.append(layer.register_forward_hook(keep))
    logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits
    draws = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
    labels = (logits.detach().softmax(-1).cumsum(-1) <= draws[..., None]).sum(-1)
    cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: output.grad.flatten(0, 1) for name, output in outputs.items()}
    return {name: g.T @ g / tokens.size for name, g in gradients.items()}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    assert list(found) == list(expected)
    for name, matrix in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - matrix).norm() <= relative * matrix.norm()


def quantize(model, names: list[str]) -> None:
    for name in names:
        cls = QuantEmbedding if "embed" in name else QuantLinear
        swap_module(model, name, cls.quantize(model.get_submodule(name), {"scheme": "lut", "bits": 4}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_against_autograd_of_the_whole_model_in_float64(family: str, tied: bool) -> None:
    model = tiny_family(family, tie_word_embeddings=tied).double()
    found = fisher_information(model, TOKENS, batch_size=2, seed=3)
    assert_near(found, by_autograd(model, TOKENS, 3), 1e-6)


def test_soft_capped_logits() -> None:
    model = tiny_family("gemma3_text", final_logit_softcapping=2.0).double()
    found = fisher_information(model, TOKENS, batch_size=3, seed=0)
    assert_near(found, by_autograd(model, TOKENS, 0), 1e-6)


def test_with_quantized_modules_inside() -> None:
    model = tiny_model()
    quantize(model, ["model.embed_tokens", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"])
    found = fisher_information(model, TOKENS, batch_size=2, seed=1)
    assert_near(found, by_autograd(model, TOKENS, 1), 1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_neither_batches_nor_pieces_of_logits_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family("gemma3_text").double()
    expected = fisher_information(model, TOKENS, batch_size=2, seed=0)
    assert_near(fisher_information(model, TOKENS, batch_size=5, seed=0), expected, 1e-6)
    sizes: list[int] = []
    logits = BlockStream.logits

    def listen(self, *args):
        found = logits(self, *args)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(BlockStream, "logits", listen)
    monkeypatch.setattr(fisher, "LOGITS", 320 * 5 * 7)
    assert_near(fisher_information(model, TOKENS, batch_size=5, seed=0), expected, 1e-6)
    assert sizes == [320 * 5 * positions for positions in (7, 7, 7, 3)]


def test_the_same_bits_from_the_same_seed_and_only_from_it() -> None:
    model = tiny_model()
    first, again, other = (fisher_information(model, TOKENS, batch_size=2, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_labels_are_drawn_as_often_as_they_are_probable() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    labels = sample_labels(probabilities.expand(len(draws), -1), draws)
    share = torch.bincount(labels, minlength=6) / len(draws)
    assert share[probabilities == 0].sum() == 0
    assert (share - probabilities).abs().max() < 4 * (0.25 / len(draws)) ** 0.5
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert sample_labels(probabilities.expand(2, -1), ends).tolist() == [1, 4]


def divergence_of(model, ids: torch.Tensor, index: int, change: torch.Tensor) -> float:
    """KL(model || model with `change` [n, L, hidden] added behind layer `index`), nats per token."""

    def add(_, inputs, output):
        return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

    with torch.no_grad():
        before = log_softmax(model(ids, use_cache=False).logits, -1)
        hook = model.model.layers[index].register_forward_hook(add)
        after = log_softmax(model(ids, use_cache=False).logits, -1)
        hook.remove()
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_it_says_the_kl_of_small_changes(family: str) -> None:
    model = tiny_family(family).double()
    tokens = np.random.default_rng(1).integers(320, size=(64, 32))
    ids = torch.from_numpy(tokens)
    information = fisher_information(model, tokens, batch_size=64, seed=0)
    independent = fisher_information(model, tokens, batch_size=64, seed=1)
    generator = torch.Generator().manual_seed(2)
    for index, (name, matrix) in enumerate(information.items()):
        f = matrix.double()
        _, directions = torch.linalg.eigh(independent[name].double())
        signs = torch.randint(2, (*tokens.shape, 1), generator=generator) * 2.0 - 1
        changes = [signs * directions[:, -1], signs * directions[:, 0]]
        changes.append(torch.randn((*tokens.shape, 64), generator=generator, dtype=torch.float64))
        for change in changes:
            predicted = 0.5 * float(torch.einsum("nli,ij,nlj->nl", change, f, change).mean())
            change = change * (1e-4 / predicted) ** 0.5
            assert divergence_of(model, ids, index, change) == pytest.approx(1e-4, rel=0.15)


def test_gradients_that_are_not_finite_are_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(StageError, match=r"gradients at the output of model\.layers\.1 are not finite"):
        fisher_information(model, TOKENS, batch_size=2, seed=0)
    model = tiny_model()
    down = model.model.layers[1].mlp.down_proj
    down.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * torch.inf,))
    with pytest.raises(StageError, match=r"gradients at the output of model\.layers\.0 are not finite"):
        fisher_information(model, TOKENS, batch_size=2, seed=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_measured_beside_the_other_statistics(tmp_path: Path) -> None:
    model, steps = tiny_model(), []
    measure_statistics(
        model,
        TOKENS,
        tmp_path,
        batch_size=2,
        gradient_sequences=3,
        seed=7,
        progress=lambda done, total: steps.append((done, total)),
    )
    expected = fisher_information(model, TOKENS[:3], batch_size=2, seed=7)
    found = Statistics(tmp_path)
    assert all(torch.equal(found.sensitivity(name), matrix) for name, matrix in expected.items())
    assert steps == [(done, 13) for done in range(1, 14)]
