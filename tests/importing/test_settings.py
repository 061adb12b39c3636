"""What a config says against what the tensors say."""

from __future__ import annotations

import json

import pytest
import torch

from a1q.errors import MismatchError
from a1q.importing.checkpoint import read_checkpoint
from a1q.importing.settings import Settings, read_settings
from tests.importing.formats import apple, v1, v2


def settings_of(written, folder, config=None):
    if config is not None:
        written.config = config
    return read_settings(read_checkpoint(written.save(folder)))


def test_configs_as_their_programs_write_them_agree(tmp_path):
    assert settings_of(v1(), tmp_path / "v1") == Settings(snapped="", group_size=32, model_id="tiny")
    assert settings_of(v1(snapped="baked"), tmp_path / "v1s").snapped == "baked"
    assert settings_of(v1(mlp=(16, 4), attention=None), tmp_path / "mlp").snapped == ""
    found = settings_of(v2(adapter=4, positive="softplus"), tmp_path / "v2")
    assert found.force_positive and found.magnitude_activation == "softplus" and found.alpha == 8.0
    assert settings_of(apple(), tmp_path / "apple", {"quant_bits": 2, "lora_alpha": 32.0}).alpha == 32.0


def test_the_older_forms_of_a_config(tmp_path):
    same = v1(attention=(4, 6))
    assert settings_of(same, tmp_path / "1", {"lut_size": 4, "scale_rank": 6, "group_size": 32, "quantize_attn": True})
    old = {"snapped": True, "snap_bake_scales": True}
    assert settings_of(v1(snapped="baked"), tmp_path / "2", old).snapped == "baked"
    assert settings_of(v1(snapped="lut"), tmp_path / "3", old | {"snap_bake_scales": False}).snapped == "lut"
    nested = {"mlp": {"lut_size": 4, "group_size": 32, "scale_rank": 6, "lut_include_zero": False}}
    nested["attn"] = {"lut_size": 16, "group_size": 32, "scale_rank": 3}
    assert settings_of(v1(), tmp_path / "4", nested).group_size == 32


def test_zero_and_less_mean_as_the_mlps_or_none(tmp_path):
    said = {"lut_size": 4, "scale_rank": 6, "attn_lut_size": 0, "attn_scale_rank": -1, "group_size": 0}
    assert settings_of(v1(), tmp_path, said)
    assert settings_of(v2(attention=None), tmp_path / "2", {"lut_bits": 2, "attn_lut_bits": 0, "attn_scale_rank": 0})


def test_ranks_are_cut_to_the_smaller_side(tmp_path):
    assert settings_of(v1(mlp=(4, 64), attention=None), tmp_path, {"scale_rank": 400})


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("lut_size", 16, "lut_size is 16, and model.layers.{0..1}.mlp.gate_proj"),
        ("attn_lut_size", 4, "attn_lut_size is 4, and model.layers.{0..1}.self_attn.q_proj"),
        ("scale_rank", 8, "have scales of rank 6"),
        ("attn_scale_rank", 8, "have scales of rank 3"),
        ("group_size", 40, "have scales of 64 columns for 64 inputs"),
        ("lut_bits", 3, "lut_bits is 3, and"),
        ("mlp_lut_bits", 4, "have 2 bits"),
        ("version", "v2", "version is 'v2', and model.layers.{0..1}.self_attn.q_proj"),
        ("quantize_attn", False, "quantize_attn is false, and 8 modules of attention are quantized"),
        ("lora_r", 8, "lora_r is 8, and there is no adapter"),
        ("lut_size", "four", "lut_size is 'four', expected a whole number"),
        ("attn_scale_rank", 2.5, "attn_scale_rank is 2.5, expected a whole number"),
        ("snapped_mode", "lute", "snapped_mode is 'lute', expected one of lut, baked"),
        ("magnitude_activation", "relu", "expected one of identity, abs, softplus"),
        ("norm_eps", -1, "expected a number of at least 0"),
        ("magnitude_eps", "small", "expected a number of at least 0"),
    ],
)
def test_contradictions_name_both_values_and_the_remedy(tmp_path, key, value, message):
    written = v1()
    with pytest.raises(MismatchError) as caught:
        settings_of(written, tmp_path, {**written.config, key: value})
    assert message in str(caught.value) and "config.json" in str(caught.value) and "--config FILE" in str(caught.value)


def test_every_contradiction_is_told_at_once(tmp_path):
    with pytest.raises(MismatchError) as caught:
        settings_of(v1(), tmp_path, {"lut_size": 8, "scale_rank": 9, "attn_lut_size": 8})
    assert len(caught.value.problems) == 4  # the rank of the MLPs is that of attention too, where nothing else is said


def test_attention_that_should_be_quantized_and_is_not(tmp_path):
    with pytest.raises(MismatchError, match="quantize_attn is true, and no module of attention is"):
        settings_of(v1(attention=None), tmp_path, {"quantize_attn": True})


def test_ranks_of_adapters(tmp_path):
    with pytest.raises(MismatchError, match=r"lora_r is 0, and model\.layers\.0\S+ has an adapter of rank 4"):
        settings_of(v2(adapter=4), tmp_path, {"lora_r": 0, "lora_alpha": 0})


def test_bits_of_the_apple_style(tmp_path):
    with pytest.raises(MismatchError, match=r"quant_bits is 2, and .* have 4 bits"):
        settings_of(apple(4), tmp_path, {"quant_bits": 2})


def test_adapters_alone_say_nothing_of_tables(tmp_path):
    written = v2(adapter=2)
    written.state = {key: item for key, item in written.state.items() if "lora_" in key}
    found = settings_of(written, tmp_path)
    assert found.alpha == 4.0 and json.loads((tmp_path / "config.json").read_text())["version"] == "v2"
    assert isinstance(next(iter(written.state.values())), torch.Tensor)
