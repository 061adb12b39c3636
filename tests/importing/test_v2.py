"""What V2 modules mean, against the formulas of `tests.importing.formats` in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a1q.errors import MismatchError
from a1q.importing.checkpoint import Stored
from a1q.importing.settings import Settings
from a1q.importing.v2 import read_v2
from a1q.quant.build import make_scheme
from tests.importing.formats import Written, float64, v2
from tests.importing.test_v1 import exact

NAME = "model.layers.1.mlp.up_proj"
ROUNDED = 1e-6
"""Directions and magnitudes are stored in float32."""


def stored(written: Written, name: str = NAME) -> Stored:
    start = f"{name}."
    parts = {key.removeprefix(start): value for key, value in written.state.items() if key.startswith(start)}
    return Stored(name, "v2", parts)


def close(found: np.ndarray, weight: np.ndarray) -> bool:
    return np.abs(found - weight).max() <= ROUNDED * np.abs(weight).max()


@pytest.mark.parametrize("frozen", [("_Q", "_indices"), ("_indices",), ("_Q",), ()])
@pytest.mark.parametrize("baked", [False, True, None])
def test_weights_are_those_of_the_checkpoint(frozen, baked):
    written = v2(frozen=frozen, baked=baked)
    for name, weight in written.weights.items():
        meaning = read_v2(stored(written, name), Settings())
        assert np.array_equal(meaning.parts["indices"].numpy(), written.indices[name])
        assert close(exact(meaning), weight)
        assert meaning.carried == bool(frozen) and meaning.differing == 0


def test_in_bfloat16_entries_that_were_rounded_are_found():
    written = v2(frozen=("_Q",), dtype=torch.bfloat16)
    for name, weight in written.weights.items():
        meaning = read_v2(stored(written, name), Settings())
        assert np.array_equal(meaning.parts["indices"].numpy(), written.indices[name])
        assert close(exact(meaning), weight)


@pytest.mark.parametrize("way", ["abs", "softplus"])
def test_positive_factors_and_magnitudes(way):
    written = v2(positive=way)
    said = Settings(force_positive=True, positive_method=way, magnitude_activation=way)
    for name, weight in written.weights.items():
        assert close(exact(read_v2(stored(written, name), said)), weight)
    assert not close(exact(read_v2(stored(written), Settings())), written.weights[NAME])


def test_magnitudes_stand_apart_and_directions_have_norm_one_to_a_factor_of_two():
    meaning = read_v2(stored(v2()), Settings())
    for norms in (meaning.parts["a"].norm(dim=0), meaning.parts["b"].norm(dim=1)):
        assert bool(((norms > 0.5) & (norms < 2)).all())


def test_latents_mean_these_indices():
    written = v2()
    for name in written.weights:
        meaning = read_v2(stored(written, name), Settings())
        assert torch.equal(make_scheme(meaning.spec).assign(meaning.parts, meaning.latent), meaning.parts["indices"])
    del written.state[f"{NAME}.weight"]
    assert read_v2(stored(written), Settings()).latent is None


def test_a_frozen_table_that_is_out_of_step_is_counted_and_the_index_counts():
    written = v2()
    written.state[f"{NAME}._Q"][0, :3] *= -1
    meaning = read_v2(stored(written), Settings())
    assert meaning.differing == 3 and "the index was taken" in meaning.note
    assert close(exact(meaning), written.weights[NAME])


def test_numbers_that_are_no_entries_are_refused():
    written = v2(frozen=("_Q",))
    written.state[f"{NAME}._Q"] += 0.2
    with pytest.raises(MismatchError, match=r"up to 0\.2 away from every entry"):
        read_v2(stored(written), Settings())


@pytest.mark.parametrize("index", [-1, 4])
def test_indices_beyond_the_table_are_refused(index):
    written = v2()
    written.state[f"{NAME}._indices"][3, 4] = index
    with pytest.raises(MismatchError, match="its table has 4 entries"):
        read_v2(stored(written), Settings())


def test_factors_that_are_palettes_are_looked_up():
    written = v2()
    part = stored(written).parts
    a, b, g = (float64(part[key]) for key in ("scale_A", "scale_B", "rank_magnitude"))
    random = np.random.default_rng(0)
    a_lut, b_lut = (np.float64(np.float32(np.sort(random.uniform(-0.3, 0.3, 64)))) for _ in range(2))
    a_places, b_places = random.integers(0, 64, a.shape), random.integers(0, 64, b.shape)
    more = {"A_lut": a_lut, "B_lut": b_lut, "_A_idx": a_places, "_B_idx": b_places}
    for key, value in more.items():
        kind = torch.int64 if "idx" in key else torch.float32
        written.state[f"{NAME}.{key}"] = torch.from_numpy(value).to(kind)
    weight = float64(part["lut"])[written.indices[NAME]] * ((a_lut[a_places] * (g + 1e-6)) @ b_lut[b_places])
    assert close(exact(read_v2(stored(written), Settings())), weight)
    del written.state[f"{NAME}._A_idx"]
    with pytest.raises(MismatchError, match="A_lut was trained"):
        read_v2(stored(written), Settings())


def test_palettes_that_were_never_fitted_are_left_alone():
    written = v2()
    written.state |= {f"{NAME}.{key}": torch.linspace(-1, 1, 64) for key in ("A_lut", "B_lut")}
    assert close(exact(read_v2(stored(written), Settings())), written.weights[NAME])


def test_a_table_that_trains_has_to_be_the_one_its_increments_make():
    written = v2(mlp=(16, 6))
    raw = np.linspace(-0.5, 0.5, 8)
    least = max(2 * 2.0**-10, 1e-4)
    upper = np.cumsum(least + (1 - 8 * least) * np.exp(raw) / np.exp(raw).sum())
    lut = np.concatenate([-upper[::-1], upper]).astype(np.float16)
    written.state[f"{NAME}._lut_raw_deltas"] = torch.from_numpy(raw).float()
    with pytest.raises(MismatchError, match="from the one that its trained increments make"):
        read_v2(stored(written), Settings())
    scale = written.weights[NAME] / float64(written.state[f"{NAME}.lut"])[written.indices[NAME]]
    written.state[f"{NAME}.lut"] = torch.from_numpy(lut).float()
    written.state[f"{NAME}._Q"] = written.state[f"{NAME}.lut"][written.state[f"{NAME}._indices"]]
    assert close(exact(read_v2(stored(written), Settings())), lut.astype(np.float64)[written.indices[NAME]] * scale)


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("rank_magnitude", torch.ones(5), "make no scale"),
        ("scale_B", torch.ones(5, 64), "make no scale"),
        ("weight", torch.ones(4, 4), r"its weight is \[4, 4\]"),
        ("_Q", torch.ones(4, 4), r"_Q is \[4, 4\]"),
        ("_indices", torch.ones(4, 4, dtype=torch.int64), r"indices are \[4, 4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(part, value, message):
    written = v2()
    written.state[f"{NAME}.{part}"] = value
    with pytest.raises(MismatchError, match=message):
        read_v2(stored(written), Settings())
