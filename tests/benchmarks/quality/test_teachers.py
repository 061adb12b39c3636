from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from a1q.models.checkpoint import load_model
from benchmarks.quality import teachers
from benchmarks.quality.teachers import DIAG, HEAVY, fold_outliers, kurtosis, linears, plant_outliers, teacher_folder
from tests.tiny import tiny_folder, tiny_model


def test_folded_outliers_leave_the_function_as_it_was():
    model = tiny_model(num_attention_heads=6, num_key_value_heads=2).double()
    tokens = torch.randint(320, (3, 32), generator=torch.Generator().manual_seed(0))
    folded = copy.deepcopy(model)
    fold_outliers(folded, **DIAG)
    with torch.no_grad():
        before, after = (each(input_ids=tokens).logits for each in (model, folded))
    assert float((before - after).abs().max()) < 1e-10 * float(before.abs().max())
    for (name, old), (_, new) in zip(linears(model), linears(folded), strict=True):
        ratio = (new.weight / old.weight).detach().abs()
        assert float(ratio.max()) > 4 or float(ratio.min()) < 1 / 4, name


def test_planted_outliers_stand_where_the_masks_say_and_nowhere_else():
    model = tiny_model()
    before = {name: linear.weight.detach().clone() for name, linear in linears(model)}
    masks = plant_outliers(model, HEAVY["seed"], 0.01, (6.0, 12.0))
    assert masks.keys() == before.keys()
    for name, linear in linears(model):
        mask, std = masks[name], before[name].std()
        assert int(mask.sum()) == round(0.01 * mask.numel())
        assert torch.equal(linear.weight[~mask], before[name][~mask])
        sizes = linear.weight.detach()[mask].abs() / std
        assert float(sizes.min()) > 5.99 and float(sizes.max()) < 12.01
    assert kurtosis(model) > 8


def test_kurtosis_of_normal_weights_is_three():
    assert kurtosis(tiny_model()) == pytest.approx(3, abs=0.15)


def test_a_teacher_is_made_once_and_again_when_its_settings_change(tmp_path, monkeypatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path))
    folder = teacher_folder("pico-diag")
    assert folder == tmp_path / "quality" / "teachers" / "pico-diag"
    record = json.loads((folder / "teacher.json").read_text())
    assert record["figures"]["kurtosis"] > 1.5 * record["figures"]["kurtosis_before"]
    first = (folder / "model.safetensors").stat()
    assert (teacher_folder("pico-diag") / "model.safetensors").stat().st_ino == first.st_ino
    changed = (teachers.MADE["pico-diag"][0], {**DIAG, "outliers": 0.05})
    monkeypatch.setitem(teachers.MADE, "pico-diag", changed)
    teacher_folder("pico-diag")
    assert json.loads((folder / "teacher.json").read_text())["made_with"]["outliers"] == 0.05
    assert [path.name for path in folder.parent.iterdir()] == ["pico-diag"]


def test_an_unknown_teacher_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="pico, pico-diag, pico-heavy"):
        teacher_folder("pico-dense")


def test_planted_elements_hold_still_while_the_rest_is_distilled(tmp_path, monkeypatch):
    base = tiny_folder(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Return item {number} of the list." for number in range(900)))
    monkeypatch.setenv("A1Q_HOME", str(tmp_path))
    monkeypatch.setattr(teachers, "BASE", str(base))
    monkeypatch.setattr(teachers, "TEXT", {"source": str(tmp_path / "text.txt")})
    monkeypatch.setattr(teachers, "held_out", lambda folder, side: np.arange(64).reshape(2, 32))
    monkeypatch.setitem(HEAVY, "steps", 2)
    folder = teacher_folder("pico-heavy")
    figures = json.loads((folder / "teacher.json").read_text())["figures"]
    assert all(math.isfinite(value) for value in figures.values())
    assert 0 < figures["kl_to_pico"] != figures["kl_planted"]
    planted = load_model(base)
    masks = plant_outliers(planted, HEAVY["seed"], HEAVY["outliers"], HEAVY["large"])
    for (name, made), (_, start) in zip(linears(load_model(folder)), linears(planted), strict=True):
        assert torch.equal(made.weight[masks[name]], start.weight[masks[name]]), name
        assert not torch.equal(made.weight, start.weight)
