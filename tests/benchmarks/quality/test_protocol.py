from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.quality import protocol
from benchmarks.quality.protocol import digest_of, held_out, seed_tokens, write_tokens
from tests.tiny import tiny_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    text = "\n\n".join(f"Item {number} of the list is returned, sorted by its key." for number in range(4000))
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(protocol, "TEXT", {"source": str(tmp_path / "text.txt"), "holdout": 0.2})
    monkeypatch.setattr(protocol, "CALIBRATION", 6)
    monkeypatch.setattr(protocol, "STEPS", 2)
    return tiny_folder(tmp_path / "model")


def test_a_seed_decides_calibration_and_the_order_of_training(folder):
    first, again, other = (seed_tokens(folder, seed) for seed in (0, 0, 1))
    assert first.calibration.shape == (6, 128) and first.training.shape == (32, 128)
    assert first.digest == again.digest != other.digest
    assert len(np.unique(first.training, axis=0)) == 32


def test_held_out_text_is_not_trained_on(folder):
    rows = {row.tobytes() for side in ("tune", "test") for row in held_out(folder, side).astype("int64")}
    tokens = seed_tokens(folder, 0)
    assert rows and not rows & {row.tobytes() for row in np.concatenate([tokens.calibration, tokens.training])}
    with pytest.raises(ValueError, match="train"):
        held_out(folder, "train")


def test_the_file_for_peers_holds_both(folder, tmp_path):
    tokens = seed_tokens(folder, 0)
    write_tokens(tmp_path / "tokens.safetensors", tokens)
    found = load_file(tmp_path / "tokens.safetensors")
    assert set(found) == {"calibration", "training"} and found["training"].dtype == np.int64
    assert np.array_equal(found["calibration"], tokens.calibration)


def test_a_digest_tells_order_type_and_shape_apart():
    array = np.arange(6)
    variants = [array, array[::-1].copy(), array.astype("int32"), array.reshape(2, 3)]
    assert len({digest_of(item) for item in variants}) == 4
