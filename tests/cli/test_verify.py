"""`a1q verify`: exit codes, the report, and kind refusals; and `a1q generate` on packages."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from a1q.coreml.bundle import read_bundle
from a1q.coreml.runner import InterpreterBackend, make_runner
from a1q.errors import MismatchError
from tests.cli.support import a1q
from tests.cli.test_validate import HEAVY, loaded_by
from tests.coreml.bundles import bundle_of, model_folder
from tests.coreml.models import SCHEMES, decoder
from tests.tiny import tiny_family

SHORT = ("--prompt", 36, "--generate", 4, "--random", 0)
PROMPT = "Return a list of the words"
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its packages in both layouts, and another model."""
    folder = tmp_path_factory.mktemp("verify")
    model_folder(decoder(SCHEMES["rank-1"], max_position_embeddings=128), folder / "model")
    model_folder(decoder(seed=7), folder / "other")
    for layout in ("single", "anemll"):
        bundle_of(decoder(SCHEMES["rank-1"]), folder / layout, layout)
    return folder


@pytest.fixture(autouse=True)
def here(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setenv("A1Q_HOME", str(work / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_good_package() -> None:
    result = a1q("verify", "single", "--against", "model", *SHORT, "--lint")
    assert result.exit_code == 0, result.output
    for words in (
        "cosine of the logits, smallest", "fp16 is more than 5 % off fp32: in no operation", "largest activation",
        "bits per parameter", "Neural Engine rules: 0 errors", "note: model infer", "single computes what",
    ):  # fmt: skip
        assert words in result.stdout
    if sys.platform != "darwin":
        assert "Core ML itself was not run" in result.stdout
        assert "On a Mac: a1q verify single --against model" in result.stdout


@pytest.mark.parametrize("option", ["--min-cosine", "--min-cosine-fp16", "--max-error", "--min-agreement"])
def test_thresholds_that_are_no_number(option):
    result = a1q("verify", "single", "--against", "model", option, "nan")
    assert result.exit_code == 2 and "nan is no number" in result.output


@pytest.mark.parametrize("package", ["single/model.mlpackage", "anemll"])
def test_as_json(package: str) -> None:
    result = a1q("verify", package, "--against", "model", *SHORT, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"] and found["failures"] == []
    assert found["figures"]["fp32"]["greedy_agreement"] == 1
    assert found["figures"]["fp16"]["positions"] > 40
    assert (
        0.98 < found["costs"]["weight_bytes"] / sum(p["theory_bytes"] for p in found["costs"]["parts"].values()) < 1.3
    )
    assert found["trace"]["leaves_fp32_at"] is None and set(found["trace"]["layer_peaks"]) == {"0", "1"}


def test_thresholds_that_are_missed() -> None:
    result = a1q("verify", "single", "--against", "model", *SHORT, "--min-cosine-fp16", "0.9999999", "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert not found["ok"] and "the cosine in fp16 is" in found["failures"][0]
    assert "does not compute what model computes" in result.stderr


def test_another_model_of_the_same_shape() -> None:
    result = a1q("verify", "single", "--against", "other", *SHORT)
    assert result.exit_code == 4
    assert "computes what" not in result.stdout


def test_damaged_and_foreign_ones(work: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(work / "single", tmp_path / "damaged")
    content = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(content[: len(content) // 2])
    llama = model_folder(tiny_family("llama"), tmp_path / "llama")
    for arguments, code, words in (
        ((damaged, "--against", "model"), 3, "weight.bin is truncated"),
        (("single", "--against", llama), 3, "holds a qwen3 model, the folder a llama model"),
        (("single", "--against", "single"), 3, "not the model it was made of"),
        (("model", "--against", "model"), 3, "has no meta.json"),
        (("singel", "--against", "model"), 3, "did you mean single?"),
        (("single", "--against", "nowhere/there"), 3, "nowhere/there"),
        (("single", "--against", "model", "--adapter", "base"), 3, "has no functions infer_base"),
        (("single", "--against", "model", "--prompt", 120), 2, "do not fit the package's context of 128"),
        (("single", "--against", "model", "--prompt", 10**12), 2, "do not fit the package's context of 128"),
        (("single", "--against", "model", "--prompt", 0, "--random", 0), 2, "nothing to compare"),
        (("single", "--against", "model", "--max-error", 0), 2, "--max-error"),
        (("single",), 2, "--against"),
    ):
        result = a1q("verify", *arguments)
        assert (result.exit_code, words in result.output) == (code, True), result.output
        assert "Traceback" not in result.output


def test_errors_as_json(tmp_path: Path) -> None:
    result = a1q("verify", tmp_path, "--against", "model", "--json")
    assert (json.loads(result.stdout)["exit_code"], result.exit_code) == (3, 3)


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac compiles")
def test_compiling_needs_a_mac(tmp_path: Path) -> None:
    result = a1q("verify", "single", "--against", "model", "--compile", tmp_path / "compiled")
    assert result.exit_code == 3
    assert "--compile" in result.output and not (tmp_path / "compiled").exists()


def test_on_a_mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With Core ML's part played by the interpreter: it is compared, asked for places, and compiles."""
    from a1q.coreml import device

    places = [
        device.Placement("infer", "conv_0", "conv", "NE", ("NE", "GPU", "CPU"), 0.9),
        device.Placement("infer", "gather_0", "gather", "CPU", ("CPU",), 0.1),
    ]
    monkeypatch.setattr(device, "available", lambda: None)
    monkeypatch.setattr(device, "CoreMLBackend", lambda bundle, units=None: InterpreterBackend(bundle, "fp16"))
    monkeypatch.setattr(device, "placements", lambda path, units: places)
    monkeypatch.setattr(device, "compile_package", lambda path, out: out)
    options = ("--placements", "--compile", tmp_path / "compiled")
    result = a1q("verify", "single", "--against", "model", *SHORT, *options)
    assert result.exit_code == 0, result.output
    assert "coreml" in result.stdout.partition("\n")[0]
    assert "model: operations on 50% NE, 50% CPU; off the Neural Engine: 1 gather" in result.stdout
    assert "gather_0" in result.stdout
    assert f"compiled: {tmp_path / 'compiled' / 'model.mlmodelc'}" in result.stdout
    generated = a1q("generate", "single", "--prompt", PROMPT, "--max-tokens", 3, "--json")
    assert generated.exit_code == 0, generated.output


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("verify", "--help", heavy=HEAVY) == [0, []]


# -- generate ----------------------------------------------------------------------------------------------------
def generated(model: object, *options: object, tokens: int = 16) -> dict:
    result = a1q("generate", model, "--prompt", PROMPT, "--max-tokens", tokens, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("package", ["single", "single/model.mlpackage", "anemll"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_package_writes_the_text_of_its_model(package: str, precision: str) -> None:
    of_model = generated("model", "--temperature", 0, "--device", "cpu")
    of_package = generated(package, "--temperature", 0, "--precision", precision)
    assert of_package["text"] == of_model["text"]
    assert of_package["prompt_tokens"] == of_model["prompt_tokens"]
    assert (of_package["tokens"], of_package["stopped_at"]) == (16, "--max-tokens")


def test_same_seed_same_text_and_streaming_prints_it() -> None:
    first = generated("single", "--seed", 4, "--temperature", 1)
    assert generated("single", "--seed", 4, "--temperature", 1)["text"] == first["text"]
    assert generated("single", "--seed", 5, "--temperature", 1)["text"] != first["text"]
    streamed = a1q("generate", "single", "--prompt", PROMPT, "--max-tokens", 16, "--seed", 4, "--temperature", 1)
    assert streamed.stdout == first["text"] + "\n"
    assert "wrote 16 in" in streamed.stderr


def test_the_context_is_filled_and_not_more() -> None:
    result = a1q("generate", "single", "--prompt", "~" * 128)
    assert result.exit_code == 2 and "128 tokens, and the context of 128 must hold" in result.output
    result = a1q("generate", "single", "--prompt", "~" * 120, "--json")
    found = json.loads(result.stdout)
    assert found["prompt_tokens"] + found["tokens"] == 128
    assert found["stopped_at"] == "the end of the context"


def test_the_end_of_text_ends_it(work: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    package = shutil.copytree(work / "single", tmp_path / "package")
    bundle = read_bundle(package)
    prompt = Tokenizer.from_file(str(package / "tokenizer.json")).encode(PROMPT).ids
    first = int(make_runner(bundle, InterpreterBackend(bundle, "fp16")).prefill(prompt).argmax())
    (package / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, first]}))
    found = generated(package, "--temperature", 0)
    assert (found["tokens"], found["stopped_at"]) == (1, "the end of the text")


def test_packages_that_can_not_write(work: Path, tmp_path: Path) -> None:
    package = shutil.copytree(work / "single", tmp_path / "package")
    (package / "tokenizer.json").unlink()
    bare = a1q("generate", package, "--prompt", "x")
    assert bare.exit_code == 3 and "has no tokenizer.json" in bare.output
    shutil.rmtree(package / "model.mlpackage")
    missing = a1q("generate", package, "--prompt", "x")
    assert missing.exit_code == 3 and "part model is missing" in missing.output
    device = a1q("generate", "single", "--prompt", "x", "--device", "cpu")
    assert device.exit_code == 2 and "--device cpu is for models" in device.output


def test_a_package_is_no_model_elsewhere() -> None:
    from a1q.models.locate import locate_model

    with pytest.raises(MismatchError, match="holds a Core ML package"):
        locate_model("single")
