"""What the peers' programs share. None of the peers is needed."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.quality.peers.common import (
    JobError,
    Quantized,
    group_bits,
    layer_bits,
    load_model,
    merge_options,
    on_grid,
    quantized_linears,
    read_job,
    run,
    table_bits,
)

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]


def test_a_group_of_64_at_2_bits_costs_2_281_bits_per_weight():
    assert group_bits((32, 256), 2, 64) / (32 * 256) == 2 + 18 / 64
    assert group_bits((32, 256), 4, 64) / (32 * 256) == 4 + 20 / 64
    assert table_bits(2) == 64


def test_groups_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(JobError, match=r"groups of 64 don't divide rows of 96"):
        group_bits((32, 96), 2, 64)


def test_bits_from_one_number_or_from_patterns():
    assert layer_bits(3, NAMES) == dict.fromkeys(NAMES, 3)
    assert layer_bits({"*.mlp.*": 2, "*.self_attn.*": 4}, NAMES) == dict(zip(NAMES, (4, 2, 2), strict=True))


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"*.mlp.*": 2}, "q_proj matches no pattern"),
        ({"*": 2, "*.mlp.*": 4}, r"up_proj matches \* and \*\.mlp\.\*"),
        ({"*": 2, "*.expert": 4}, r"\*\.expert in bits matches nothing"),
    ],
)
def test_patterns_must_cover_every_linear_once(bits, message):
    with pytest.raises(JobError, match=message):
        layer_bits(bits, NAMES)


def test_an_unknown_option_is_told_with_the_nearest_one():
    assert merge_options({"iters": 200, "lr": None}, {"iters": 1000}) == {"iters": 1000, "lr": None}
    with pytest.raises(JobError, match=r"no option iter; did you mean iters\?"):
        merge_options({"iters": 200}, {"iter": 5})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": "0"}, "seed must be of type int"), ({"seed": True}, "seed must be"), ({"more": 1}, "must be an object")],
)
def test_a_job_of_another_form_is_refused(tmp_path, change, message):
    job = {"model": "m", "tokens": "t", "out": "o", "seed": 0, "threads": 1, "options": {}}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    assert read_job(path) == job
    path.write_text(json.dumps(job | change))
    with pytest.raises(JobError, match=message):
        read_job(path)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), bits=st.integers(2, 4), magnitude=st.floats(1e-3, 10))
def test_weights_on_a_grid_come_back_with_scales_in_fp16(seed, bits, magnitude):
    weight, scale, zero, index = grid(seed, bits, magnitude)
    found = on_grid(weight, scale, zero, bits, 8)
    expected = (scale.half().float()[..., None] * (index - zero[..., None])).flatten(1)
    assert torch.equal(found, expected)
    assert (found - weight).abs().max() <= weight.abs().max() * 2**-10


@pytest.mark.parametrize("wrong", ["between two levels", "a level too many", "a zero point too large"])
def test_weights_off_the_grid_or_of_more_bits_are_refused(wrong):
    weight, scale, zero, _ = grid(0, 2, 1.0)
    if wrong == "between two levels":
        weight[0, 0] += 0.3 * scale[0, 0]
    elif wrong == "a level too many":
        weight[0, 0] = (4 - zero[0, 0]) * scale[0, 0]
    else:
        weight[:, :8] += (zero[:, :1] - 4) * scale[:, :1]
        zero[:, 0] = 4
    with pytest.raises(RuntimeError, match="not on the grid" if wrong.startswith("between") else "doesn't fit 2 bits"):
        on_grid(weight, scale, zero, 2, 8)


def test_a_program_writes_weights_and_facts(tmp_path):
    job = tiny_job(tmp_path)
    run(job, halved, {"bits": 2}, ("safetensors",))
    facts = json.loads((tmp_path / "out" / "result.json").read_text())
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    linears = quantized_linears(load_model(tmp_path / "model"))
    assert set(weights) == {f"{name}.weight" for name in linears} and len(weights) == 7
    assert all(torch.equal(weights[f"{name}.weight"], module.weight / 2) for name, module in linears.items())
    assert facts["bits"] == 12 and facts["weights"] == sum(module.weight.numel() for module in linears.values())
    assert facts["options"] == {"bits": 3} and facts["seconds"] > 0 and facts["peak_rss_bytes"] > 2**20
    assert set(facts["versions"]) == {"torch", "transformers", "safetensors"} and facts["note"] == "kept"


@pytest.mark.parametrize("wrong", ["weights that the library's model hasn't", "a linear left out"])
def test_weights_that_are_not_the_librarys_are_never_written(tmp_path, wrong):
    def bad(model, job):
        result = halved(model, job)
        if wrong == "a linear left out":
            result.exact.popitem()
        for weight in result.exact.values():
            weight *= 1.5
        return result

    with pytest.raises(RuntimeError, match="not those" if wrong == "a linear left out" else "don't compute"):
        run(tiny_job(tmp_path), bad, {"bits": 2}, ())
    assert not (tmp_path / "out" / "result.json").exists()


def grid(seed, bits, magnitude):
    """A weight [4, 16] in groups of 8, and what it is made of; every index occurs in every group."""
    random = torch.Generator().manual_seed(seed)
    scale = magnitude * (0.5 + torch.rand(4, 2, generator=random))
    zero = torch.randint(0, 2**bits, (4, 2), generator=random).float()
    index = torch.randint(0, 2**bits, (4, 2, 8), generator=random).float()
    index[..., :4] = torch.tensor([0.0, 1.0, 2.0, 2**bits - 1])
    return (scale[..., None] * (index - zero[..., None])).flatten(1), scale, zero, index


def halved(model, job):
    """A method: every weight divided by two."""
    assert job.options == {"bits": 3} and job.calibration.shape == (4, 8)
    weights = {}
    with torch.no_grad():
        for name, module in quantized_linears(model).items():
            module.weight.div_(2)
            weights[f"{name}.weight"] = module.weight.detach().clone()
    return Quantized(weights, 12, model, {name: weight.clone() for name, weight in weights.items()}, {"note": "kept"})


def tiny_job(folder):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    ids = torch.randint(0, 64, (4, 8))
    save_file({"calibration": ids, "training": ids.clone()}, folder / "tokens.safetensors")
    path = folder / "job.json"
    job = {
        "model": str(folder / "model"), "tokens": str(folder / "tokens.safetensors"), "out": str(folder / "out"),
        "seed": 0, "threads": torch.get_num_threads(), "options": {"bits": 3},
    }  # fmt: skip
    path.write_text(json.dumps(job))
    return path
