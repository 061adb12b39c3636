"""Checkpoints in their base: whole models, and every way in which one can be of another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from a1q.errors import MismatchError, UsageError
from a1q.importing.adapters import write_adapters
from a1q.importing.checkpoint import read_checkpoint
from a1q.importing.model import Report, import_model, new_folder, write_model
from a1q.importing.settings import read_settings
from a1q.models.adapter_source import read_adapter
from a1q.models.checkpoint import load_model
from a1q.models.view import read_view
from a1q.quant.module import quantized_modules
from tests.importing.formats import Written, apple, v1, v2
from tests.tiny import tiny_folder, tiny_model

NAME = "model.layers.0.mlp.up_proj"


def imported(written: Written, folder: Path, base: Path, **options):
    checkpoint = read_checkpoint(written.save(folder))
    return import_model(checkpoint, read_settings(checkpoint), base, **options)


def logits_of(written: Written, dense: torch.nn.Module) -> torch.Tensor:
    """What a dense model says with these weights, in float64: `dense` is filled with the checkpoint's tensors."""
    state = {key: value for key, value in written.state.items() if key in dense.state_dict()}
    state |= {f"{name}.weight": torch.from_numpy(weight) for name, weight in written.weights.items()}
    dense.load_state_dict(state)
    for name in written.weights:
        a, b = (written.state.get(f"{name}.lora_{letter}") for letter in "AB")
        if a is not None:
            scale = written.config["lora_alpha"] / len(a)
            dense.get_submodule(name).weight.data += scale * b @ a
    with torch.inference_mode():
        return dense.double()(TOKENS).logits


TOKENS = torch.arange(40)[None] * 7 % 320


@pytest.mark.parametrize(
    "written",
    [v1(), v1(attention=None), v1(snapped="lut"), v2(), v2(adapter=3), apple(2), apple(4)],
    ids=["v1", "v1-mlp", "v1-snapped", "v2", "v2-lora", "apple2", "apple4"],
)
def test_the_model_says_what_the_checkpoint_says(written, tmp_path, base):
    if "model.norm.weight" in written.state:  # dense tensors train too
        written.state["model.norm.weight"] = written.state["model.norm.weight"] * 1.25
    model, report = imported(written, tmp_path / "from", base)
    with torch.inference_mode():
        found = model(TOKENS).logits.double()
    expected = logits_of(written, tiny_model())
    assert (found - expected).abs().max() < 2e-5 * expected.std()
    assert report.modules.keys() == written.weights.keys() and report.from_base == []
    with new_folder(tmp_path / "out") as folder:
        checkpoint = read_checkpoint(tmp_path / "from")
        write_model(model, folder, checkpoint, read_settings(checkpoint), report, base)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "out")(TOKENS).logits.double(), found)
    record = json.loads((tmp_path / "out" / "imported.json").read_text())
    assert len(record["checkpoint"]["sha256"]) == 64 and (tmp_path / "out" / "tokenizer.json").is_file()


def test_equal_checkpoints_give_equal_bytes(tmp_path, base):
    for name in ("one", "two"):
        written = v2()
        model, report = imported(written, tmp_path / f"from-{name}", base)
        checkpoint = read_checkpoint(tmp_path / f"from-{name}")
        with new_folder(tmp_path / name) as folder:
            write_model(model, folder, checkpoint, read_settings(checkpoint), report, base)
    for file in ("model.safetensors", "config.json", "imported.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_latents_can_be_left_out(tmp_path, base):
    written = v1()
    model, report = imported(written, tmp_path, base, keep_latents=False)
    assert report.latents == 0 and all(module.latent is None for _, module in quantized_modules(model))
    assert imported(written, tmp_path, base)[1].latents == 14


def test_modules_alone_take_the_rest_from_the_base(tmp_path, base):
    """As `convert_v1_to_v2.py` of theirs writes them."""
    written = v2(frozen=(), baked=False)
    names = tuple(f"{name}." for name in written.weights)
    whole = written.state
    written.state = {key: value for key, value in whole.items() if key.startswith(names)}
    model, report = imported(written, tmp_path, base)
    assert "model.norm.weight" in report.from_base and len(report.from_base) == 10
    assert torch.equal(model.model.norm.weight, tiny_model().model.norm.weight)
    with torch.inference_mode():
        expected = logits_of(Written(whole, written.weights), tiny_model())
        assert (model(TOKENS).logits.double() - expected).abs().max() < 2e-5 * expected.std()


def test_a_head_that_went_its_own_way_is_untied(tmp_path, base):
    written = v1()
    written.state["lm_head.weight"] = written.state["lm_head.weight"] * 1.5
    model, report = imported(written, tmp_path / "from", base)
    assert report.untied
    with new_folder(tmp_path / "out") as folder:
        checkpoint = read_checkpoint(tmp_path / "from")
        write_model(model, folder, checkpoint, read_settings(checkpoint), report, base)
    again = load_model(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, written.state["lm_head.weight"])
    assert torch.equal(again.model.embed_tokens.weight, written.state["model.embed_tokens.weight"])


def test_a_quantized_head_is_untied(tmp_path, base):
    written = apple()
    weight = written.state["lm_head.weight"]
    written.state |= {"lm_head._f_param": torch.tensor(0.1), "lm_head._qat_nbits": torch.tensor(4)}
    written.state["lm_head.weight"] = weight.clone()
    model, report = imported(written, tmp_path, base)
    assert report.untied and report.modules["lm_head"] == "balanced" and report.schemes["lm_head"]["bits"] == 4
    assert len(model.lm_head.dequantize().unique()) <= 16
    assert torch.equal(model.model.embed_tokens.weight, weight)


def test_biases_come_along(tmp_path):
    changes = {"attention_bias": True}
    folder = tiny_folder(tmp_path / "tiny", **changes)
    written = v1(**changes)
    name = "model.layers.0.self_attn.q_proj"
    written.state[f"{name}.bias"] = torch.linspace(-1, 1, 64)
    model, _ = imported(written, tmp_path / "from", folder)
    assert torch.equal(model.get_submodule(name).bias, written.state[f"{name}.bias"])
    del written.state[f"{name}.bias"]
    with pytest.raises(MismatchError, match=rf"lacks {name}\.bias"):
        imported(written, tmp_path / "from", folder)
    with pytest.raises(MismatchError, match=r"the base has no model\.layers\.\{0\.\.1\}\.self_attn\.q_proj\.bias"):
        imported(v1(**changes), tmp_path / "from", tiny_folder(tmp_path / "plain"))


# -- of another model --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 3}, "the base has no model.layers.2.self_attn.q_proj"),
        ({"num_hidden_layers": 1}, "nothing of model.layers.1.mlp.down_proj"),
        ({"hidden_size": 32}, "other shapes than the base's"),
        ({"intermediate_size": 64}, "model.layers.0.mlp.gate_proj is [64, 64] here and [96, 64] in the base"),
    ],
)
def test_another_architecture_is_refused_with_what_differs(tmp_path, base, changes, message):
    written = v1(**changes)
    with pytest.raises(MismatchError) as caught:
        imported(written, tmp_path, base)
    assert message in str(caught.value)
    assert "is the base (qwen3, 2 layers, hidden size 64) the model that was trained?" in str(caught.value)


def test_another_vocabulary_is_refused(tmp_path, base):
    with pytest.raises(MismatchError, match=r"model\.embed_tokens\.weight is \[256, 64\], in the base \[320, 64\]"):
        imported(v1(vocab_size=256), tmp_path, base)


def test_tensors_that_the_base_lacks_are_named(tmp_path, base):
    written = v1()
    written.state["model.extra.weight"] = torch.ones(3)
    with pytest.raises(MismatchError, match=r"the base has no model\.extra\.weight"):
        imported(written, tmp_path, base)


@pytest.mark.parametrize("gone", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens"])
def test_a_whole_checkpoint_has_to_be_whole(tmp_path, base, gone):
    written = v1()
    for key in [key for key in written.state if key.startswith(gone) or (gone.endswith("tokens") and "lm_head" in key)]:
        del written.state[key]
    with pytest.raises(MismatchError, match=f"lacks {gone}"):
        imported(written, tmp_path, base)


def test_a_module_that_is_missing_is_named(tmp_path, base):
    written = v2()
    for key in [key for key in written.state if key.startswith(f"{NAME}.")]:
        del written.state[key]
    with pytest.raises(MismatchError, match=rf"nothing of {NAME}, which are quantized in other layers"):
        imported(written, tmp_path, base)


def test_a_quantized_base_is_refused(tmp_path, base):
    written = v2()
    model, report = imported(written, tmp_path / "from", base)
    checkpoint = read_checkpoint(tmp_path / "from")
    with new_folder(tmp_path / "out") as folder:
        write_model(model, folder, checkpoint, read_settings(checkpoint), report, base)
    with pytest.raises(MismatchError, match=r"the base is quantized already: model\.layers"):
        imported(written, tmp_path / "from", tmp_path / "out")


# -- adapters ----------------------------------------------------------------------------------------------------
def only_adapters(written: Written) -> Written:
    written.state = {key: value for key, value in written.state.items() if "lora_" in key}
    return written


def test_adapters_alone_become_a_folder_that_is_read_back(tmp_path, base):
    written = only_adapters(v2(adapter=3))
    checkpoint = read_checkpoint(written.save(tmp_path))
    with new_folder(tmp_path / "out") as folder:
        ranks = write_adapters(checkpoint, read_settings(checkpoint), read_view(base), folder)
    assert set(ranks.values()) == {3}
    found = read_adapter(tmp_path / "out")
    for name, (a, b) in found.items():
        stored = written.state[f"{name}.lora_A"], written.state[f"{name}.lora_B"]
        assert np.allclose((b @ a).numpy(), 2 * (stored[1] @ stored[0]).numpy(), atol=1e-7)
    assert len(found) == 14


def test_an_alpha_that_nothing_says_has_to_be_said(tmp_path, base):
    for number, written in enumerate((v2(adapter=3), only_adapters(v2(adapter=3)))):
        written.config = {}
        checkpoint = read_checkpoint(written.save(tmp_path / str(number)))
        with pytest.raises(MismatchError, match=r"nothing says their alpha.*\n.*--alpha 3"):
            if checkpoint.adapters_only:
                write_adapters(checkpoint, read_settings(checkpoint), read_view(base), tmp_path)
            else:
                import_model(checkpoint, read_settings(checkpoint), base)


@pytest.mark.parametrize("name, shape", [("lora_A", (3, 60)), ("lora_B", (96, 2)), ("lora_B", (90, 3))])
def test_adapters_of_other_shapes_are_refused(tmp_path, base, name, shape):
    written = v2(adapter=3)
    written.state[f"{NAME}.{name}"] = torch.ones(shape)
    with pytest.raises(MismatchError, match=rf"{NAME}: lora_A \[.*\] and lora_B \[.*\] don't make \[96, 64\]"):
        imported(written, tmp_path, base)
    with pytest.raises(MismatchError):
        imported(only_adapters(written), tmp_path, base)


# -- the folder --------------------------------------------------------------------------------------------------
def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "x").read_text() == "1"
    with pytest.raises(RuntimeError), new_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("1")
        raise RuntimeError
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "x").write_text("1")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "empty"]
    with pytest.raises(UsageError, match="is there already"), new_folder(tmp_path / "a"):
        pass
    with pytest.raises(UsageError, match="is no folder"), new_folder(tmp_path / "a" / "x" / "d"):
        pass
    with pytest.raises(RuntimeError), new_folder(tmp_path / "c" / "d"):
        raise RuntimeError
    assert not (tmp_path / "c").exists()
    with new_folder(tmp_path / "c" / "d") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "c" / "d" / "x").is_file() and len(list((tmp_path / "c").iterdir())) == 1


def test_kinds_are_counted_in_words():
    assert Report(modules={"a": "v1", "b": "v2", "c": "v1"}).kinds() == {"V1": 2, "V2": 1}
