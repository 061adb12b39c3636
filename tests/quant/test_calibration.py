from pathlib import Path

import numpy as np
import pytest
import torch

from a1q.errors import StageError
from a1q.quant.calibration import measure_statistics
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.statistics import Statistics
from a1q.quant.tied import swap_module
from tests.tiny import FAMILIES, tiny_family, tiny_model

TOKENS = np.random.default_rng(0).integers(320, size=(5, 12)).astype(np.int32)


def listen(model, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """Name -> all inputs [tokens, in] of every linear, in float64 from an ordinary forward pass."""
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if "proj" in name or name == "lm_head":

            def keep(_, inputs, name=name) -> None:
                seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1]).double()

            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(torch.from_numpy(tokens).long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_against_float64(tmp_path: Path, family: str) -> None:
    model = tiny_family(family)
    seen = listen(model, TOKENS)
    if model.config.tie_word_embeddings:
        seen["model.embed_tokens"] = seen.pop("lm_head")
    square = measure_statistics(model, TOKENS, tmp_path, batch_size=2)
    found = Statistics(tmp_path)
    assert set(square) == set(found.square) == set(seen)
    for name, x in seen.items():
        inputs = found.inputs(name)
        assert inputs is not None and inputs.gram is not None and inputs.gram.dtype == torch.float32
        gram = x.T @ x / len(x)
        scale = gram.diagonal().sqrt()
        assert bool(((inputs.gram - gram).abs() <= 3e-6 * scale * scale[:, None]).all())
        torch.testing.assert_close(square[name], gram.diagonal(), rtol=1e-5, atol=0)
        assert torch.equal(inputs.square, square[name].float())


def test_exactly_in_float64_whatever_the_batch(tmp_path: Path) -> None:
    model = tiny_model().double()
    seen = listen(model, TOKENS)
    for batch_size in (2, 5):
        square = measure_statistics(model, TOKENS, tmp_path, batch_size=batch_size)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            torch.testing.assert_close(square[name], seen[name].square().mean(0), rtol=1e-9, atol=0)


def test_one_input_is_stored_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    measure_statistics(tiny_model(), TOKENS, tmp_path, batch_size=2)
    layer = "model.layers.1"
    stored = {f"{layer}.{leaf}" for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")}
    assert set(load_file(tmp_path / "gram-00001.safetensors")) == stored
    found = Statistics(tmp_path)
    q, k, up = (found.inputs(f"{layer}.{leaf}") for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
    assert torch.equal(q.gram, k.gram) and not torch.equal(q.gram, up.gram)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_inputs_of_a_head_stand_under_the_weight_that_they_meet(
    tmp_path: Path, quantized: bool, tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    if quantized:
        module = QuantEmbedding.quantize(model.model.embed_tokens, {"scheme": "lut", "bits": 8})
        swap_module(model, "model.embed_tokens", module)
    heard = listen(model, TOKENS)["lm_head"]
    square = measure_statistics(model, TOKENS, tmp_path, batch_size=5, gram=False)
    assert len(square) == 15
    found = square["model.embed_tokens" if tied else "lm_head"]
    torch.testing.assert_close(found, heard.square().mean(0), rtol=1e-6, atol=0)
    assert Statistics(tmp_path).inputs("lm_head" if not tied else "model.embed_tokens").gram is None


def test_hooks_are_gone_also_after_a_failure_and_bad_activations_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = 3e38  # finite, and its products are not
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.down_proj are not finite"):
        measure_statistics(model, TOKENS, tmp_path, batch_size=5)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not (tmp_path / "statistics.safetensors").exists()


def test_a_bad_weight_is_named_before_anything_runs(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 3] = torch.nan
    with pytest.raises(StageError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite$"):
        measure_statistics(model, TOKENS, tmp_path, batch_size=5)


def test_progress_counts_every_batch_of_every_layer_and_the_head(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    measure_statistics(
        tiny_model(), TOKENS, tmp_path, batch_size=2, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(done, 9) for done in range(1, 10)]
