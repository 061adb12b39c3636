import json
import subprocess
import sys
from pathlib import Path

import pytest

from a1q.errors import MismatchError
from a1q.models.source import resolve_source
from tests.tiny import tiny_folder


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))


def test_a_folder_and_its_digest(tmp_path: Path):
    one = resolve_source(str(tiny_folder(tmp_path / "one")))
    two = resolve_source(str(tiny_folder(tmp_path / "two")))
    other = resolve_source(str(tiny_folder(tmp_path / "other", seed=1)))
    assert one.kind == "model" and one.path == (tmp_path / "one").resolve() and len(one.digest) == 64
    assert one.digest == two.digest != other.digest
    settings = tmp_path / "two" / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    assert resolve_source(str(tmp_path / "two")).digest != one.digest


def test_the_built_in_model_is_found_without_torch():
    code = (
        "import sys; from a1q.models.source import resolve_source; found = resolve_source('builtin:pico');"
        "print(found.meta['source'], 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["builtin:pico", "False", "False"]


def test_wrong_names_get_the_nearest(tmp_path: Path):
    tiny_folder(tmp_path / "model-one")
    with pytest.raises(MismatchError, match=r"no such folder; did you mean .*model-one"):
        resolve_source(str(tmp_path / "model-on"))
    with pytest.raises(MismatchError, match=r"did you mean 'builtin:pico'"):
        resolve_source("builtin:pica")
    with pytest.raises(MismatchError, match="not a folder"):
        resolve_source(str(tmp_path / "model-one" / "config.json"))


def test_pickled_weights_are_refused_by_name(tmp_path: Path):
    folder = tiny_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(MismatchError, match=r"pytorch_model\.bin would have to be unpickled"):
        resolve_source(str(folder))


def test_a_cut_file_and_a_missing_shard_are_named(tmp_path: Path):
    folder = tiny_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(MismatchError, match=r"model\.safetensors is truncated or damaged"):
        resolve_source(str(folder))
    weights.write_bytes(whole)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MismatchError, match=r"lacks model-2\.safetensors"):
        resolve_source(str(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(MismatchError, match="is damaged"):
        resolve_source(str(folder))


def test_code_of_its_own_is_refused(tmp_path: Path):
    folder = tiny_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(MismatchError, match="a1q runs none"):
        resolve_source(str(folder))


@pytest.mark.parametrize("name", ["LocalEntryNotFoundError", "ConnectionError"])
def test_an_unreachable_hub_names_what_works_offline(name: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub
    from huggingface_hub import errors

    error = getattr(errors, name, ConnectionError)

    def unreachable(*args, **kwargs):
        assert not any("bin" in pattern for pattern in kwargs["allow_patterns"])
        assert "consolidated*" in kwargs["ignore_patterns"]
        raise error("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(MismatchError, match="can't be reached; offline, `builtin:pico`"):
        resolve_source("someone/some-model")


def test_what_is_neither_folder_nor_hub_id_is_said():
    with pytest.raises(MismatchError, match="neither a folder nor a Hub id"):
        resolve_source("some model!")


def test_an_artifact_of_the_store_is_its_content_not_when_it_was_made(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    before = resolve_source(str(folder)).digest
    for name in ("artifact.json", "entry.json", "progress.jsonl"):
        (folder / name).write_text("{}")
    assert resolve_source(str(folder)).digest == before


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("[]", "its config.json is no JSON object"),
        ("{}", "names no model_type"),
        ('{"hidden_size": "x"}', "hidden_size in its config.json is 'x'"),
    ],
)
def test_a_config_that_is_none_is_told(tmp_path: Path, config: str, text: str) -> None:
    folder = tiny_folder(tmp_path / "model")
    (folder / "config.json").write_text(config)
    with pytest.raises(MismatchError, match=text):
        resolve_source(str(folder))


def test_a_second_copy_of_the_weights_under_other_names_is_left_out(tmp_path: Path) -> None:
    """As in Mistral's folders, with and without an index."""
    from safetensors.torch import load_file, save_file

    from a1q.models.checkpoint import load_model
    from a1q.models.view import read_view

    folder = tiny_folder(tmp_path / "model")
    view = read_view(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({f"layers.{name}": tensor for name, tensor in tensors.items()}, folder / "consolidated.safetensors")
    assert read_view(folder) == view

    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert read_view(folder) == view
    before = resolve_source(str(folder)).digest
    (folder / "consolidated.safetensors").unlink()
    assert resolve_source(str(folder)).digest == before
    assert load_model(folder).config.model_type == "qwen3"
