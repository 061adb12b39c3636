from pathlib import Path

import pytest
import torch

from a1q.errors import MismatchError, StageError
from a1q.training.checkpoint import load_checkpoint, save_checkpoint

IDENTITY = {"threads": 2, "shapes": {"w": [3]}}


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step, {"w": torch.full((3,), float(step))}, {"loss": float("nan")}, IDENTITY)


def test_newest_comes_back_and_two_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 10)
    logs: list[str] = []
    found = load_checkpoint(tmp_path, IDENTITY, logs.append)
    assert found is not None and found.step == 10 and logs == []
    assert torch.equal(found.tensors["w"], torch.full((3,), 10.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-000000{step}.{suffix}" for step in ("02", "10") for suffix in ("json", "safetensors")
    ]


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_one_is_named_and_the_earlier_used(tmp_path: Path, suffix: str, damage: str) -> None:
    save(tmp_path, 4, 8)
    path = tmp_path / f"step-00000008.{suffix}"
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        data[-20] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(b"" if damage == "empty" else data[:-7])
    logs: list[str] = []
    found = load_checkpoint(tmp_path, IDENTITY, logs.append)
    assert found is not None and found.step == 4
    if not (damage == "remove" and suffix == "json"):  # without its note it never was published
        assert "step-00000008 is damaged" in logs[0]


def test_nothing_left_means_none(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-00000003.safetensors").write_bytes(b"x")
    logs: list[str] = []
    assert load_checkpoint(tmp_path, IDENTITY, logs.append) is None
    assert "step-00000003" in logs[0]
    assert load_checkpoint(tmp_path / "absent", IDENTITY, logs.append) is None


def test_every_field_that_differs_is_named(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(MismatchError) as caught:
        load_checkpoint(tmp_path, {"threads": 4, "shapes": {"w": [4]}}, print)
    text = str(caught.value)
    assert "threads was 2 and is 4" in text and "shapes was {'w': [3]} and is {'w': [4]}" in text


def test_a_folder_that_cannot_be_made_is_a_stage_error(tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("a file")
    with pytest.raises(StageError, match="checkpoint of step 1 was not written"):
        save(tmp_path / "inside", 1)


def test_a_full_disk_is_a_stage_error_and_keeps_the_earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StageError, match="step 2 was not written: no space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    found = load_checkpoint(tmp_path, IDENTITY, print)
    assert found is not None and found.step == 1
