"""Fitting in model order: what later layers see, what reconstruction wins, and that a killed run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from a1q.engine.stage import StageContext
from a1q.errors import Interrupted, MismatchError
from a1q.quant.calibration import measure_statistics
from a1q.quant.fitter import DenseFitter
from a1q.quant.importance import Inputs
from a1q.quant.module import quantized_modules
from a1q.quant.statistics import Statistics
from a1q.training.blockwise import fit_in_order
from a1q.training.reconstruction import ReconstructConfig, ReconstructRates
from tests.tiny import tiny_model

TOKENS = numpy.random.default_rng(0).integers(0, 320, (24, 32)).astype("int32")
SPEC = {"scheme": "lut_lowrank", "bits": 2, "rounds": 2, "sweeps": 1, "passes": 1}
RATES = ReconstructRates(weights=0.02, scales=0.002, lut=0.002, norms=0.001)


@dataclass(frozen=True)
class Options:
    reconstruct: ReconstructConfig | None = None
    sequential: bool = True


class Recorder(DenseFitter):
    """Keeps the inputs that each module was fitted with."""

    def __init__(self, model: Any, specs: Mapping[str, Any], keep_latent: set[str] | None = None):
        super().__init__(model, specs, set(specs) if keep_latent is None else keep_latent, seed=0)
        self.seen: dict[str, Inputs | None] = {}

    def fit(self, name: str, inputs: Inputs | None) -> None:
        self.seen[name] = inputs
        super().fit(name, inputs)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    folder = tmp_path_factory.mktemp("statistics")
    measure_statistics(tiny_model(), TOKENS, folder, batch_size=8, gradient_sequences=24)
    return Statistics(folder)


def linears(model: Any) -> dict[str, dict[str, Any]]:
    return {
        name: SPEC
        for name, module in model.named_modules()
        if ".layers." in name and hasattr(module, "weight") and module.weight.ndim == 2
    }


def context(folder: Path, **more: Any) -> StageContext:
    return StageContext("q", None, 5, {}, out=folder / "out", scratch=folder / "scratch", **more)


def fitted(folder: Path, statistics: Statistics | None, options: Options, **more: Any) -> tuple[Any, Recorder, Any]:
    model = tiny_model()
    specs = linears(model)
    fitter = Recorder(model, specs)
    found = fit_in_order(context(folder, **more), model, list(specs), fitter, statistics, options, {"model": "m"})
    return model, fitter, found


def parts_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def kl_to_dense(model: Any) -> float:
    ids = torch.from_numpy(TOKENS.astype("int64"))
    with torch.no_grad():
        teacher = tiny_model()(input_ids=ids).logits.double().log_softmax(-1)
        student = model(input_ids=ids).logits.double().log_softmax(-1)
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


def test_without_statistics_every_module_is_fitted_by_itself(tmp_path: Path) -> None:
    _, fitter, found = fitted(tmp_path, None, Options())
    assert found == {}
    assert len(fitter.seen) == 14
    assert set(fitter.seen.values()) == {None}


def test_the_first_layer_sees_what_calibration_measured_and_the_second_does_not(
    tmp_path: Path, statistics: Statistics
) -> None:
    _, fitter, _ = fitted(tmp_path, statistics, Options())
    for name, inputs in fitter.seen.items():
        measured = statistics.inputs(name)
        assert inputs is not None and inputs.gram is not None and measured is not None and measured.gram is not None
        same = torch.allclose(inputs.gram, measured.gram, rtol=1e-4, atol=1e-6)
        assert same == (".layers.0." in name)


def test_the_second_layer_is_fitted_with_the_inputs_it_will_have(tmp_path: Path, statistics: Statistics) -> None:
    model, fitter, _ = fitted(tmp_path, statistics, Options())
    seen: list[torch.Tensor] = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(TOKENS.astype("int64")))
    hook.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1]).double()
    inputs = fitter.seen["model.layers.1.self_attn.q_proj"]
    assert inputs is not None and inputs.gram is not None
    torch.testing.assert_close(inputs.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_not_sequential_takes_the_statistics_as_they_are(tmp_path: Path, statistics: Statistics) -> None:
    _, fitter, _ = fitted(tmp_path, statistics, Options(sequential=False))
    for name, inputs in fitter.seen.items():
        assert inputs is not None and torch.equal(inputs.square, statistics.square[name])


def test_a_quantized_embedding_is_what_the_layers_see(tmp_path: Path, statistics: Statistics) -> None:
    model = tiny_model()
    specs = {"model.embed_tokens": SPEC, **linears(model)}
    fitter = Recorder(model, specs)
    fit_in_order(context(tmp_path), model, list(specs), fitter, statistics, Options(), {})
    first = fitter.seen["model.layers.0.self_attn.q_proj"]
    assert first is not None
    assert not torch.allclose(first.square, statistics.square["model.layers.0.self_attn.q_proj"], rtol=1e-3)


def test_reconstruction_brings_layers_and_the_model_nearer(tmp_path: Path, statistics: Statistics) -> None:
    plain, _, _ = fitted(tmp_path / "plain", statistics, Options())
    options = Options(ReconstructConfig(60, ("weights", "scales", "lut"), RATES))
    trained, _, found = fitted(tmp_path / "trained", statistics, options)
    losses = found["reconstruction"]
    assert losses["last"] < 0.9 * losses["first"]
    assert kl_to_dense(trained) < 0.9 * kl_to_dense(plain)
    assert all(parameter.requires_grad for name, parameter in trained.named_parameters() if "norm" in name)
    again, _, _ = fitted(tmp_path / "again", statistics, options)
    assert equal(parts_of(trained), parts_of(again))


def test_gradients_decide_what_counts(tmp_path: Path, statistics: Statistics) -> None:
    options = Options(ReconstructConfig(3, ("scales",), RATES))
    with_metric, _, _ = fitted(tmp_path / "with", statistics, options)
    without = Statistics(statistics.folder)
    without.sensitivity = lambda name: None  # type: ignore[method-assign]
    plain, _, _ = fitted(tmp_path / "without", without, options)
    assert not equal(parts_of(with_metric), parts_of(plain))


def test_scales_alone_leave_indices_and_restart_latents_on_the_grid(tmp_path: Path, statistics: Statistics) -> None:
    plain, _, _ = fitted(tmp_path / "plain", statistics, Options())
    trained, _, _ = fitted(tmp_path / "trained", statistics, Options(ReconstructConfig(5, ("scales", "lut"), RATES)))
    name = "model.layers.0.mlp.up_proj"
    before, after = plain.get_submodule(name), trained.get_submodule(name)
    assert torch.equal(before.parts()["indices"], after.parts()["indices"])
    assert not torch.equal(before.a, after.a)
    assert torch.equal(after.latent, after.dequantize())


def test_modules_without_latents_have_none_afterwards(tmp_path: Path, statistics: Statistics) -> None:
    model = tiny_model()
    specs = linears(model)
    fitter = Recorder(model, specs, keep_latent=set())
    options = Options(ReconstructConfig(5, ("weights",), RATES))
    fit_in_order(context(tmp_path), model, list(specs), fitter, statistics, options, {})
    assert all(module.latent is None for _, module in quantized_modules(model))


def test_a_stopped_run_goes_on_with_the_layer_it_was_at(tmp_path: Path, statistics: Statistics) -> None:
    options = Options(ReconstructConfig(6, ("weights", "scales", "lut"), RATES))
    whole, _, found = fitted(tmp_path / "whole", statistics, options)
    steps = 0

    def stop_in_the_second_layer() -> int:
        nonlocal steps
        steps += 1
        return 15 if steps > 18 else 0

    with pytest.raises(Interrupted):
        fitted(tmp_path / "killed", statistics, options, should_stop=stop_in_the_second_layer)
    said: list[str] = []
    resumed, fitter, again = fitted(
        tmp_path / "killed", statistics, options, emit=lambda kind, values: said.append(str(values.get("message", "")))
    )
    assert any("model.layers.0 is there from the run before" in line for line in said)
    assert all(".layers.1." in name for name in fitter.seen)
    assert equal(parts_of(whole), parts_of(resumed))
    assert again == found


def test_layers_of_another_model_are_refused(tmp_path: Path, statistics: Statistics) -> None:
    fitted(tmp_path, statistics, Options())
    model = tiny_model()
    specs = linears(model)
    with pytest.raises(MismatchError, match="model was 'm' and is 'other'"):
        fit_in_order(
            context(tmp_path), model, list(specs), Recorder(model, specs), statistics, Options(), {"model": "other"}
        )
