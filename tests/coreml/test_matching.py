from __future__ import annotations

import json
import shutil

import pytest

from a1q.coreml.bundle import read_bundle
from a1q.coreml.matching import require_match
from a1q.errors import MismatchError
from tests.coreml.bundles import bundle_of, model_folder
from tests.coreml.models import SCHEMES, decoder
from tests.tiny import tiny_family


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same model in both layouts."""
    folder = tmp_path_factory.mktemp("matching")
    return {layout: bundle_of(decoder(), folder / layout, layout) for layout in ("single", "anemll")}


@pytest.mark.parametrize("layout", ["single", "anemll"])
@pytest.mark.parametrize("scheme", [None, "rank-1"])
def test_its_own_model_and_another_of_the_same_shape(bundles, tmp_path, layout, scheme):
    require_match(bundles[layout], model_folder(decoder(SCHEMES.get(scheme)), tmp_path))


@pytest.mark.parametrize("layout", ["single", "anemll"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 321}, "a vocabulary of 320, the model 321"),
        ({"num_hidden_layers": 3}, "layers: 2, the model 3"),
        ({"hidden_size": 96}, "hidden size 64, the model 96"),
        ({"num_key_value_heads": 4}, "key/value heads: 2, the model 4"),
        ({"head_dim": 64}, "head_dim 32, the model 64"),
    ],
)
def test_other_sizes(bundles, tmp_path, layout, changes, words):
    with pytest.raises(MismatchError, match=words):
        require_match(bundles[layout], model_folder(decoder(**changes), tmp_path))


def test_another_family(bundles, tmp_path):
    with pytest.raises(MismatchError, match="holds a qwen3 model, the folder a llama model"):
        require_match(bundles["single"], model_folder(tiny_family("llama"), tmp_path))


def test_a_rope_type_that_no_package_has(bundles, tmp_path):
    folder = model_folder(decoder(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="rotary scaling 'dynamic' is not supported"):
        require_match(bundles["single"], folder)


def test_a_folder_that_is_no_model(bundles, tmp_path):
    with pytest.raises(MismatchError, match="is not a model"):
        require_match(bundles["single"], tmp_path)


def test_other_tokenizers(bundles, tmp_path):
    folder = model_folder(decoder(), tmp_path / "model")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"truncation": None, "padding": None}))
    require_match(bundles["single"], folder)
    content["model"]["merges"] = content["model"]["merges"][::-1]
    file.write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="are different tokenizers: they differ in model"):
        require_match(bundles["single"], folder)
    file.unlink()
    with pytest.raises(MismatchError, match="has no counterpart"):
        require_match(bundles["single"], folder)
    bare = shutil.copytree(bundles["single"].folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    require_match(read_bundle(bare), folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_tokenizer_of_the_model(bundles, tmp_path, text):
    folder = model_folder(decoder(), tmp_path)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(MismatchError, match=r"tokenizer\.json is damaged"):
        require_match(bundles["single"], folder)
