from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from a1q.coreml.bundle import read_bundle
from a1q.errors import MismatchError
from tests.coreml.bundles import bundle_of
from tests.coreml.models import SCHEMES, decoder

MODEL = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that nobody changes."""
    folder = tmp_path_factory.mktemp("whole")
    bundle_of(decoder(SCHEMES["channel-3"]), folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def change_meta(folder: Path, **changes: object) -> None:
    file = folder / "meta.json"
    meta = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def message(folder: Path) -> str:
    with pytest.raises(MismatchError) as caught:
        read_bundle(folder)
    return str(caught.value)


def test_a_whole_bundle(whole):
    bundle = read_bundle(whole)
    assert (bundle.context, bundle.vocabulary, list(bundle.packages)) == (128, 320, ["model"])
    assert set(bundle.packages["model"].program.functions) == {"infer", "prefill"}
    assert bundle.packages["model"] is bundle.packages["model"], "read once"
    assert bundle.part("model")["layers"] == [0, 2]


def test_the_folder_and_the_package_mean_the_same(whole):
    assert read_bundle(whole / "model.mlpackage").folder == whole


def test_a_part_that_is_missing(folder):
    shutil.rmtree(folder / "model.mlpackage")
    assert "part model is missing: there is no" in message(folder)


def test_a_function_that_is_missing(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["parts"][0]["functions"]["prefill_base"] = 32
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "has no function prefill_base" in message(folder)


def test_an_output_that_is_missing(folder):
    change_meta(folder, outputs=["logits1", "logits2"])
    assert "has no output logits1" in message(folder)


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_truncated_weights(folder, share):
    file = folder / WEIGHTS
    cut(file, int(share * file.stat().st_size))
    assert "weight.bin is truncated" in message(folder)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_program(folder, share):
    file = folder / MODEL
    cut(file, int(share * file.stat().st_size))
    assert "model.mlmodel" in message(folder)
    assert "truncated" in message(folder)


def test_weights_of_another_package(folder):
    file = folder / WEIGHTS
    content = bytearray(file.read_bytes())
    content[64:128] = bytes(64)
    file.write_bytes(content)
    assert "weight.bin is damaged: at 64 there is no entry of" in message(folder)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, "model.mlpackage/Manifest.json"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    assert f"{folder / name} is missing" in message(folder)


def test_a_damaged_manifest(folder):
    (folder / "model.mlpackage/Manifest.json").write_text("{}")
    assert "Manifest.json is damaged" in message(folder)


def test_damage_that_only_reading_back_meets(folder):
    file = folder / MODEL
    file.write_bytes(file.read_bytes().replace(b"layer_norm", b"layer_nurm"))
    bundle = read_bundle(folder)
    with pytest.raises(MismatchError, match="can't be read back"):
        bundle.packages["model"]


def test_a_tokenizer_with_more_tokens_than_the_package(folder):
    change_meta(folder, vocabulary=300)
    assert "tokenizer.json does not match: it has tokens up to" in message(folder)


def test_a_damaged_tokenizer(folder):
    cut(folder / "tokenizer.json", 100)
    assert "tokenizer.json is damaged" in message(folder)


def test_every_problem_is_told_at_once(folder):
    cut(folder / WEIGHTS, 100)
    change_meta(folder, vocabulary=300)
    assert "truncated" in message(folder) and "tokenizer" in message(folder)
