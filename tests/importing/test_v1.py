"""What V1 modules mean, against the formulas of `tests.importing.formats` in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.errors import MismatchError
from a1q.importing.checkpoint import Stored
from a1q.importing.settings import Settings
from a1q.importing.v1 import FLOOR, read_v1, v1_indices
from a1q.quant.build import make_scheme
from tests.importing.formats import Written, float64, v1

NOTHING_SAID = Settings()


def stored(written: Written, name: str, indices: torch.Tensor | None = None) -> Stored:
    start = f"{name}."
    parts = {key.removeprefix(start): value for key, value in written.state.items() if key.startswith(start)}
    return Stored(name, "v1", parts, indices)


def exact(meaning) -> np.ndarray:
    """The weight that the parts say, in float64."""
    parts = {key: part.double() if part.is_floating_point() else part for key, part in meaning.parts.items()}
    return make_scheme(meaning.spec).dequantize(parts).numpy()


@pytest.mark.parametrize("options", [{}, {"group": 40}, {"mlp": (2, 1)}, {"mlp": (256, 16), "snapped": "lut"}])
def test_weights_are_those_of_the_checkpoint_to_the_bit(options):
    written = v1(**options)
    for name, weight in written.weights.items():
        meaning = read_v1(stored(written, name), NOTHING_SAID)
        assert np.array_equal(meaning.parts["indices"].numpy(), written.indices[name])
        assert np.abs(exact(meaning) - weight).max() <= 1e-14
        assert meaning.floored == 0


def test_padding_columns_are_left_out():
    written = v1(group=40)
    name = "model.layers.0.mlp.down_proj"
    assert written.state[f"{name}.scale_B"].shape[1] == 120
    assert read_v1(stored(written, name), NOTHING_SAID).parts["b"].shape == (6, 96)


def test_tables_with_a_zero_are_even_on_either_side():
    written = v1(mlp=(4, 6), attention=None)
    name = "model.layers.0.mlp.up_proj"
    lut = np.array([-1, -0.5, 0, 1])
    written.state[f"{name}.lut"] = torch.from_numpy(lut).float()
    scale = float64(written.state[f"{name}.scale_A"]) @ float64(written.state[f"{name}.scale_B"])
    value = np.clip(float64(written.state[f"{name}.weight"]) / scale.clip(FLOOR), -1, 1)
    nearest = lut[np.abs(value[..., None] - lut).argmin(-1)]
    for said in (NOTHING_SAID, Settings(include_zero=True)):
        assert np.abs(exact(read_v1(stored(written, name), said)) - nearest * scale).max() <= 1e-14
    assert np.abs(exact(read_v1(stored(written, name), Settings(include_zero=False))) - nearest * scale).max() > 0.01


@pytest.mark.parametrize("snapped", ["lut", "baked"])
def test_snapped_weights_say_the_same_indices(snapped):
    written = v1(snapped=snapped)
    for name, weight in written.weights.items():
        for said in (Settings(snapped=snapped), NOTHING_SAID):
            meaning = read_v1(stored(written, name), said)
            assert np.abs(exact(meaning) - weight).max() <= 1e-14
            assert (meaning.latent is None) == (snapped == "lut")


def test_floored_entries_are_counted_and_come_as_near_to_the_floor_as_the_table_can():
    written = v1(negative=0.2)
    some = 0
    for name, weight in written.weights.items():
        meaning = read_v1(stored(written, name), NOTHING_SAID)
        scale = float64(written.state[f"{name}.scale_A"]) @ float64(written.state[f"{name}.scale_B"])
        floored = scale[:, : weight.shape[1]] < FLOOR
        assert meaning.floored == floored.sum()
        found = exact(meaning)
        assert np.abs((found - weight)[~floored]).max() <= 1e-14
        if floored.any():
            some += 1
            nearest = np.abs(float64(written.state[f"{name}.lut"])).min()
            far = np.abs((found - weight)[floored])
            assert np.all(far <= nearest * np.abs(scale[:, : weight.shape[1]][floored]) + 2 * FLOOR)
            assert meaning.floored_error == pytest.approx(far.max() / np.sqrt((weight**2).mean()), rel=1e-6)
    assert some > 5


def test_latents_mean_these_indices_and_are_the_weights_wherever_those_do():
    written = v1(negative=0.1)
    for name in written.weights:
        meaning = read_v1(stored(written, name), NOTHING_SAID)
        scheme = make_scheme(meaning.spec)
        assert torch.equal(scheme.assign(meaning.parts, meaning.latent), meaning.parts["indices"])
        same = meaning.latent == written.state[f"{name}.weight"]
        assert same.float().mean() > (0.75 if meaning.floored else 0.995)


def test_stored_indices_are_carried_even_where_the_weight_says_another():
    written = v1()
    name = "model.layers.1.mlp.up_proj"
    given = torch.from_numpy(written.indices[name]).to(torch.uint8)
    given[0, :5] = (given[0, :5] + 1) % 4
    meaning = read_v1(stored(written, name, given), NOTHING_SAID)
    assert torch.equal(meaning.parts["indices"], given)
    assert meaning.carried and meaning.differing == 5 and "stored index was taken" in meaning.note
    assert torch.equal(make_scheme(meaning.spec).assign(meaning.parts, meaning.latent), given)


def test_indices_of_another_checkpoint_are_refused():
    written, other = v1(), v1(seed=5)
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(MismatchError, match=r"6\d% of the stored indices differ.*another checkpoint|% of the stored"):
        read_v1(stored(written, name, torch.from_numpy(other.indices[name])), NOTHING_SAID)


def test_indices_written_after_snapping_are_not_believed():
    """Their programs divide snapped weights, entries by then, by the scale once more."""
    written = v1(snapped="lut")
    name = "model.layers.1.mlp.up_proj"
    wrong = torch.where(written.state[f"{name}.weight"] > 0, 3, 0).to(torch.uint8)
    meaning = read_v1(stored(written, name, wrong), NOTHING_SAID)
    assert np.array_equal(meaning.parts["indices"].numpy(), written.indices[name])
    assert meaning.differing and "snapped weight" in meaning.note


@pytest.mark.parametrize(
    "said, snapped, message",
    [("lut", None, "they are not"), ("", "lut", "not snapped"), ("baked", "lut", "multiplied by their scales")],
)
def test_a_config_that_says_otherwise_is_refused(said, snapped, message):
    written = v1(snapped=snapped)
    with pytest.raises(MismatchError, match=message):
        read_v1(stored(written, "model.layers.0.mlp.up_proj"), Settings(snapped=said))


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("scale_A", torch.ones(5, 6), "make no scale"),
        ("scale_B", torch.ones(6, 3), "make no scale"),
        ("lut", torch.linspace(-1, 1, 5), "has 5 entries; a1q has tables of 2, 4, 8, 16, 64, 256"),
    ],
)
def test_shapes_that_do_not_fit_are_named(part, value, message):
    written = v1()
    written.state[f"model.layers.0.mlp.up_proj.{part}"] = value
    with pytest.raises(MismatchError, match=message):
        read_v1(stored(written, "model.layers.0.mlp.up_proj"), NOTHING_SAID)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=1, max_size=40),
    bits=st.sampled_from([1, 2, 3, 4]),
    include_zero=st.booleans(),
)
def test_indices_are_those_of_the_nearest_level(values, bits, include_zero):
    entries = 2**bits
    if include_zero:
        lut = np.concatenate([np.linspace(-1, 0, entries // 2 + 1)[:-1], np.linspace(0, 1, entries // 2)])
        if entries == 2:
            lut = np.array([-1.0, 0.0])
    else:
        lut = np.linspace(-1, 1, entries)
    value = np.array(values)[None]
    found = v1_indices(torch.from_numpy(value), torch.ones(1, 1, dtype=torch.float64), entries, include_zero).numpy()
    distances = np.abs(np.clip(value, -1, 1)[..., None] - lut)
    if include_zero and entries == 2:
        return  # from 0 up there is one level, and every number there is its own
    assert np.all(np.take_along_axis(distances, found[..., None], -1)[..., 0] <= distances.min(-1) + 1e-12)
