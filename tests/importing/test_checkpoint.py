"""Finding the file, and sorting its tensors into modules."""

from __future__ import annotations

import json

import pytest
import torch

from a1q.errors import MismatchError, UsageError
from a1q.importing.checkpoint import read_checkpoint
from tests.importing.formats import apple, v1, v2

NAME = "model.layers.0.mlp.up_proj"


def test_modules_and_dense_tensors_are_told_apart(tmp_path):
    for written, kind in ((v1(), "v1"), (v2(), "v2"), (apple(), "balanced")):
        found = read_checkpoint(written.save(tmp_path / kind))
        assert {module.kind for module in found.modules.values()} == {kind}
        assert found.modules.keys() == written.weights.keys()
        assert "model.norm.weight" in found.dense and "lm_head.weight" in found.dense
        assert len(found.dense) + sum(len(module.parts) for module in found.modules.values()) == len(written.state)
        assert not found.adapters_only


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict"])
def test_nested_states_are_found_with_their_config(tmp_path, key):
    written = v2()
    torch.save({key: written.state, "opt_step": 3, "config": {"lut_bits": 2}}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert found.modules.keys() == written.weights.keys()
    assert found.config == {"lut_bits": 2} and "entry `config`" in found.config_from


def test_a_checkpoint_of_a_training_loop_is_read_beside_its_optimizer(tmp_path):
    import random

    written = apple()
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    loop = {"format": "qat_lora_train_ckpt", "opt_step": 1, "cfg": {"lr": 1e-4, "dir": "x"}, "model": written.state}
    loop |= {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "scaler": None, "ema": None}
    loop["rng"] = {"torch": torch.get_rng_state(), "cuda": None, "python": random.getstate()}
    torch.save(loop, tmp_path / "checkpoint_last.pt")
    assert read_checkpoint(tmp_path).modules.keys() == written.weights.keys()


def test_of_a_folder_the_final_state_counts_and_others_are_told(tmp_path):
    v1().save(tmp_path)
    v1(seed=3).save(tmp_path, "best_state_dict.pt")
    found = read_checkpoint(tmp_path)
    assert found.path.name == "model_state_dict.pt" and found.unread == ("best_state_dict.pt",)
    (tmp_path / "model_state_dict.pt").unlink()
    assert read_checkpoint(tmp_path).path.name == "best_state_dict.pt"


def test_indices_belong_to_the_file_they_were_written_with(tmp_path):
    written = v1()
    indices = {name: torch.from_numpy(item).to(torch.uint8) for name, item in written.indices.items()}
    written.save(tmp_path)
    written.save(tmp_path, "best_state_dict.pt")
    written.save(tmp_path, "snapped.pt")
    torch.save(indices, tmp_path / "indices.pt")
    torch.save(indices, tmp_path / "snapped.indices.pt")
    for name, there in (("model_state_dict.pt", True), ("best_state_dict.pt", False), ("snapped.pt", True)):
        modules = read_checkpoint(tmp_path / name).modules
        assert all((module.indices is not None) == there for module in modules.values())
    torch.save({**indices, "model.layers.9.mlp.up_proj": torch.ones(2, 2)}, tmp_path / "indices.pt")
    with pytest.raises(MismatchError, match=r"names modules that model_state_dict\.pt lacks: model\.layers\.9"):
        read_checkpoint(tmp_path)
    torch.save([1], tmp_path / "indices.pt")
    with pytest.raises(MismatchError, match="holds no indices by module"):
        read_checkpoint(tmp_path)


def test_which_config_counts(tmp_path):
    path = v1().save(tmp_path)
    assert read_checkpoint(path).config["lut_size"] == 4
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (tmp_path / "quant_config.json").write_text(json.dumps({"mlp": {"lut_size": 8}}))
    assert read_checkpoint(path).config == {"mlp": {"lut_size": 8}}
    (tmp_path / "mine.json").write_text("{}")
    assert read_checkpoint(path, tmp_path / "mine.json").config == {}
    with pytest.raises(UsageError, match="there is no file"):
        read_checkpoint(path, tmp_path / "nothing.json")
    for text, message in (("[1]", "holds no JSON object"), ("{", "can't be read")):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(MismatchError, match=message):
            read_checkpoint(path, tmp_path / "mine.json")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(UsageError, match=r"holds no \.pt file"):
        read_checkpoint(tmp_path)
    (tmp_path / "a.pt").touch()
    (tmp_path / "b.pt").touch()
    with pytest.raises(UsageError, match=r"several checkpoints; name one of them: a\.pt, b\.pt"):
        read_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"there is no checkpoint .*c\.pt; in .* there are a\.pt, b\.pt"):
        read_checkpoint(tmp_path / "c.pt")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    with pytest.raises(UsageError, match="which recipes and commands take as it is"):
        read_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("part", ["scale_A", "scale_B", "lut", "weight"])
def test_a_v1_module_without_one_of_its_parts_is_named(tmp_path, part):
    written = v1()
    del written.state[f"{NAME}.{part}"]
    with pytest.raises(MismatchError, match=rf"{NAME}, V1, lacks {part}; it has"):
        read_checkpoint(written.save(tmp_path))


@pytest.mark.parametrize("part", ["scale_A", "rank_magnitude", "lut"])
def test_a_v2_module_without_one_of_its_parts_is_named(tmp_path, part):
    written = v2()
    del written.state[f"{NAME}.{part}"]
    with pytest.raises(MismatchError, match=rf"{NAME}, V2, lacks {part}; it has"):
        read_checkpoint(written.save(tmp_path))


@pytest.mark.parametrize("key", [f"{NAME}.scale_A", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named_and_counted(tmp_path, key, value):
    written = v1()
    written.state[key].view(-1)[:2] = value
    with pytest.raises(MismatchError, match=rf"{key} holds 2 numbers that are not finite"):
        read_checkpoint(written.save(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{NAME}.scale_A": torch.ones(3)}, r"scale_A has the shape \[3\], expected 2 dimensions"),
        ({f"{NAME}._scales_baked_flag": torch.ones(3)}, "expected a single number"),
        ({f"{NAME}.full_scales": torch.ones(3, 3)}, "a number of its own for every weight"),
        ({f"{NAME}.lora_A": torch.ones(3, 3)}, "lacks lora_B"),
        ({"model.embed_tokens.lora_A": torch.ones(3, 3)}, "a dense module with an adapter"),
    ],
)
def test_what_a1q_has_nothing_for_is_refused(tmp_path, change, message):
    written = v2()
    written.state |= change
    with pytest.raises(MismatchError, match=message):
        read_checkpoint(written.save(tmp_path))


@pytest.mark.parametrize(
    "value, message",
    [
        ([torch.ones(2)], "holds a list, expected the tensors"),
        ({}, "holds a dict, expected the tensors"),
        ({"a": 1}, "'a' is no tensor"),
        ({"a.weight": torch.ones(2, 2)}, "holds no quantized module and no adapter"),
    ],
)
def test_other_files_of_torch_are_told_from_checkpoints(tmp_path, value, message):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(MismatchError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_cached_weights_are_not_read(tmp_path):
    written = v2()
    written.state[f"{NAME}._cached_weight_q"] = torch.full((2, 2), float("nan"))
    assert "_cached_weight_q" not in read_checkpoint(written.save(tmp_path)).modules[NAME].parts


def test_adapters_alone_are_known(tmp_path):
    written = v2(adapter=2)
    torch.save({key: item for key, item in written.state.items() if "lora_" in key}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").adapters_only
    assert not read_checkpoint(written.save(tmp_path / "whole")).adapters_only
