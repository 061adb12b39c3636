from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from a1q.coreml.repalettize import advice, chosen, planned, problems, repalettize
from a1q.engine.registry import active_registry
from a1q.models.checkpoint import load_model, save_model
from a1q.models.view import read_view
from a1q.quant.linear import QuantLinear
from a1q.quant.tied import TiedHead, swap_module
from a1q.recipe.schema import Checker
from tests.tiny import tiny_family

TOKENS = np.random.default_rng(3).integers(0, 320, (2, 20)).astype(np.int32)
EMBEDDING = {"match": r"model\.embed_tokens", "scheme": "lut", "bits": 4, "granularity": "group", "channels": 16}
MLP = {"match": r"model\.layers\.\d+\.mlp\.\w+_proj", "scheme": "lut", "bits": 2, "granularity": "tensor"}
FOREIGN = {"scheme": "affine", "bits": 3, "granularity": "group", "group_size": 16}


def saved(model: Any, folder: Path) -> Path:
    folder.mkdir()
    save_model(model, folder)
    return folder


def some_quantized(scheme: dict[str, Any], adapter: bool = False) -> Any:
    """A tiny model with one snapped linear, `model.layers.0.mlp.up_proj`."""
    model = tiny_family("qwen3")
    name = "model.layers.0.mlp.up_proj"
    module = QuantLinear.quantize(model.get_submodule(name), scheme, keep_latent=False)
    if adapter:
        module.set_adapter(torch.randn(2, 64), 0.1 * torch.randn(96, 2), 4.0)
    module.snap()
    swap_module(model, name, module)
    return model


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.double()


@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "gemma3_text"])
def test_modules_are_replaced_and_the_loss_is_what_logits_say(model_type: str, tmp_path: Path):
    model = load_model(saved(tiny_family(model_type), tmp_path / "model"))
    view = read_view(tmp_path / "model")
    rules = {"embedding": EMBEDDING, "mlp": MLP}
    assert problems(rules, view) == []
    before = logits(model)
    weights = {name: model.get_submodule(name).weight.detach().double() for name in chosen(rules, view)}
    ticks = []
    loss = repalettize(model, rules, view, TOKENS, tick=lambda done, total: ticks.append((done, total)))
    after = logits(model)

    assert list(weights) == [module.name for module in loss.modules]
    assert ticks[-1] == (len(weights), len(weights))
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    assert loss.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-5)
    assert loss.kl > 1e-4
    assert loss.max_error == pytest.approx((before - after).abs().max().item(), rel=1e-5)
    assert loss.agreement == pytest.approx((before.argmax(-1) == after.argmax(-1)).double().mean().item())
    assert loss.positions == TOKENS.size
    for module in loss.modules:
        now = model.get_submodule(module.name)
        old = weights[module.name]
        assert now.state == "snapped"
        expected = ((now.dequantize().double() - old).square().sum() / old.square().sum()).item()
        assert module.error == pytest.approx(expected, rel=1e-6) and 0 < module.error < 0.2
    if model_type == "mistral":
        assert type(model.lm_head) is torch.nn.Linear
    else:
        assert isinstance(model.lm_head, TiedHead)


def test_sizes_are_those_of_the_schemes(tmp_path: Path):
    model = load_model(saved(tiny_family("qwen3"), tmp_path / "model"))
    loss = repalettize(model, {"embedding": EMBEDDING}, read_view(tmp_path / "model"), TOKENS)
    (module,) = loss.modules
    assert module.before == "dense" and module.after == "lut 4 bit a table per 16 channels"
    assert module.bytes_before == 2 * 320 * 64
    assert module.bytes_after == 320 * 64 // 2 + (320 // 16) * 16 * 2
    found = json.loads(json.dumps(loss.as_json()))
    assert found["bytes_after"] == module.bytes_after and found["modules"][0]["name"] == "model.embed_tokens"


def test_what_is_planned_is_what_comes_out(tmp_path: Path):
    """The replaced model, saved and read back, has the view that was foretold."""
    view = read_view(saved(tiny_family("gemma3_text"), tmp_path / "model"))
    model = load_model(tmp_path / "model")
    rules = {"embedding": EMBEDDING, "mlp": MLP}
    repalettize(model, rules, view, TOKENS)
    found = read_view(saved(model, tmp_path / "again"))
    expected = planned(rules, view)
    assert {name: (m.state, m.scheme, m.kind, m.shape) for name, m in found.modules.items()} == {
        name: (m.state, m.scheme, m.kind, m.shape) for name, m in expected.modules.items()
    }


def test_a_foreign_scheme_gives_way_and_its_adapter_and_bias_stay(tmp_path: Path):
    saved(some_quantized({"scheme": "lut", "bits": 8}, adapter=True), tmp_path / "model")
    model, view = load_model(tmp_path / "model"), read_view(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj"
    old = model.get_submodule(name)
    delta, weight = old.adapter_delta(), old.dequantize()
    rule = {"match": name.replace(".", r"\."), "scheme": "lut_lowrank", "bits": 4}
    (module,) = repalettize(model, {"again": rule}, view, TOKENS).modules
    new = model.get_submodule(name)
    assert torch.equal(new.adapter_delta(), delta)
    assert module.before.startswith("lut 8 bit") and module.after.startswith("lut_lowrank 4 bit")
    error = (new.dequantize() - weight).double().square().sum() / weight.double().square().sum()
    assert module.error == pytest.approx(error.item(), rel=1e-6)


def test_an_exact_fit_loses_nothing(tmp_path: Path):
    """A weight that has 4 values already goes into 2 bits without loss."""
    model = tiny_family("llama")
    target = model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        target.weight.copy_(torch.tensor([-0.5, -0.125, 0.125, 0.5])[torch.randint(4, target.weight.shape)])
    saved(model, tmp_path / "model")
    rule = {"match": r"model\.layers\.1\.self_attn\.o_proj", "scheme": "lut", "bits": 2}
    loss = repalettize(model, {"o": rule}, read_view(tmp_path / "model"), TOKENS)
    assert loss.modules[0].error < 1e-12
    assert loss.kl < 1e-9 and loss.agreement == 1


def test_the_same_model_is_fitted_the_same(tmp_path: Path):
    view = read_view(saved(tiny_family("qwen2"), tmp_path / "model"))
    models = [load_model(tmp_path / "model") for _ in range(2)]
    losses = [repalettize(model, {"mlp": MLP}, view, TOKENS) for model in models]
    assert losses[0] == losses[1]
    assert torch.equal(logits(models[0]), logits(models[1]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"x": {**MLP, "match": r".*\.mpl\.\w+_proj"}}, "repalettize.x matches no module: .*; names nearby: .*mlp"),
        ({"x": {**MLP, "match": "lm_head"}}, "this model's head is tied to its embedding"),
        ({"x": {**MLP, "match": "("}}, "repalettize.x.match: not a regular expression"),
        ({"x": MLP, "y": {**MLP, "match": r".*up_proj"}}, r"up_proj in both x and y; each may be in one rule"),
        ({"x": {**EMBEDDING, "channels": 7}}, "repalettize.x: 320 output channels are no multiple of `channels: 7`"),
        ({"x": {"match": r".*up_proj", **FOREIGN}}, "repalettize.x: Core ML can't hold .*affine.* either"),
        ({"x": {"match": r".*up_proj", "scheme": "lutt", "bits": 4}}, "repalettize.x: unknown scheme 'lutt'"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_are_told(rules: Any, message: str, tmp_path: Path):
    found = problems(rules, read_view(saved(tiny_family("qwen3"), tmp_path / "model")))
    assert len(found) == 1 and re.search(message, found[0]), found


def test_the_advice_can_be_followed(tmp_path: Path):
    """The option it names is valid, matches the modules, and Core ML can hold what comes out."""
    import yaml

    view = read_view(saved(tiny_family("qwen3"), tmp_path / "model"))
    modules = [module for name, module in view.modules.items() if "mlp" in name]
    text = advice(modules)
    option = yaml.safe_load(text[text.index("`repalettize: ") :].strip("`"))["repalettize"]
    assert problems(option, view) == []
    assert set(chosen(option, view)) == {module.name for module in modules}


def test_the_option_is_checked_by_the_schemas_of_schemes():
    """What schemas/exporters/coreml.json says of it: a name, then `match` beside a scheme and its options."""
    schema = active_registry().schema("exporters", "coreml")["properties"]["repalettize"]
    checker, uses = Checker(active_registry()), set()
    assert checker.check(schema, {"e": EMBEDDING}) == []
    assert checker.fill(schema, {"e": {"match": "x", "scheme": "lut", "bits": 4}}, uses)["e"]["granularity"] == "tensor"
    assert uses == {("schemes", "lut")}
    (finding,) = checker.check(schema, {"e": {**EMBEDDING, "bit": 4}})
    assert finding.path == ("e", "bit") and "bits" in finding.hint
    (finding,) = checker.check(schema, {"e": {"scheme": "lut", "bits": 4}})
    assert "match" in finding.message
