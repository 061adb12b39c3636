from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from a1q.coreml.interpreter import Interpreter
from a1q.coreml.package import write_package
from a1q.coreml.weights import Linear, Palette, decoder_weights
from tests.coreml.models import FORMS, SCHEMES, decoder, package_of, program_of, saved


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize(("name", "tied"), FORMS)
def test_weights_read_back_without_error(form, name, tied):
    """Dense weights, indices, tables, scales and norms of the file are those of the model, bit for bit."""
    from a1q.quant.linear import QuantLinear

    model, package, _ = form(name, tied)
    constants = Interpreter(package.program, "fp32").constants
    for function in ("infer", "prefill"):
        for key, module in model.named_modules():
            if not hasattr(module, "in_features") or (tied and key == "lm_head"):
                continue
            place = "lm_head_1" if key == "lm_head" else key.replace(".", "_")
            stored = constants[function][f"{place}_weight"][:, :, 0, 0]
            if not isinstance(module, QuantLinear):
                assert np.array_equal(stored, module.weight.detach().half().float().numpy())
                continue
            parts = module.parts()
            if module.scheme.vector > 1:
                entries = parts["lut"].detach().float()[parts["indices"].long()].transpose(1, 2).flatten(0, 1)
            else:
                lut = parts["lut"].detach().float().reshape(-1, parts["lut"].shape[-1])
                tables = lut.repeat_interleave(module.out_features // len(lut), 0)
                entries = tables.gather(1, parts["indices"].long())
            assert np.array_equal(stored, entries.numpy())
            if "a" in parts:
                a, b = constants[function][f"{place}_a"], constants[function][f"{place}_b"]
                assert np.array_equal(a[0, :, :, 0], parts["a"].detach().float().numpy())
                assert np.array_equal(b[0, :, :, 0].T, parts["b"].detach().float().numpy())


def test_functions_share_one_copy_of_the_weights(form, tmp_path):
    model, both, _ = form("rank-1", True)
    program = program_of(model)[0]
    del program.functions["prefill"]
    one = saved(program, tmp_path)
    assert 0 <= both.weight_bytes - one.weight_bytes < 2048, "no more than prefill's row numbers"


def test_weight_file_has_the_theoretical_size(tmp_path):
    """Indices at their bits: what is above them is headers of 64 bytes, alignment and fp16 vectors."""
    model = decoder(SCHEMES["tensor-2"], hidden_size=256, intermediate_size=512)
    package, _ = package_of(model, tmp_path)
    weights = decoder_weights(model)
    theory = weights.embedding.theory_bits // 8
    theory += sum(linear.palette.indices.size * 2 // 8 for linear in weights.linears.values())
    theory += sum(2 * 2 * norm.size for norm in weights.norms.values())
    entries = 3 * len(weights.linears) + len(weights.norms) + 8
    assert theory < package.weight_bytes < theory + 128 * entries + 8 * 128


def test_same_model_gives_the_same_bytes_anywhere_in_silence(form, tmp_path):
    """Another process, history and hash seed, a home that can't be written; nothing is said to the user."""
    script = (
        "import sys; from pathlib import Path; from tests.coreml.models import *;"
        "package_of(decoder(SCHEMES['group-4']), Path(sys.argv[1]))"
    )
    environment = {**os.environ, "HOME": "/dev/null", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert done.stderr == done.stdout == ""
    _, here, _ = form("group-4", True)
    assert files(tmp_path) == files(here.path.parent)


def test_manifest_names_what_is_there(form):
    _, package, _ = form("dense", True)
    manifest = json.loads((package.path / "Manifest.json").read_text())
    entries = manifest["itemInfoEntries"]
    assert entries[manifest["rootModelIdentifier"]]["name"] == "model.mlmodel"
    assert all((package.path / "Data" / entry["path"]).exists() for entry in entries.values())


def test_interface_of_the_functions(form):
    _, package, _ = form("dense", True)
    functions = {function.name: function for function in package.description.functions}
    assert package.description.defaultFunctionName == "infer"

    def shapes(features):
        return {feature.name: list(feature.type.multiArrayType.shape) for feature in features}

    assert shapes(functions["infer"].input) == {"input_ids": [1, 1], "position": [1]}
    assert shapes(functions["prefill"].input) == {"input_ids": [1, 32], "position": [1], "last": [1]}
    for function in functions.values():
        assert shapes(function.output) == {"logits": [1, 1, 320]}
        assert list(function.state[0].type.stateType.arrayType.shape) == [4, 2, 128, 32]


def test_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    program, _, _ = program_of(decoder())
    write_package(program, tmp_path / "model.mlpackage")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("tables", "vector", "step"), [((1, 4), 1, 1), ((4, 4), 1, 4), ((1, 4, 2), 2, 2)])
def test_rows_of_a_linear(tables, vector, step):
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 4, (16 // vector, 8)).astype(np.uint8)
    palette = Palette(indices, rng.standard_normal(tables).astype(np.float16))
    assert (palette.shape, palette.row_step) == ((16, 8), step)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((16, 2), (2, 8)))
    linear = Linear(palette=palette, a=a, b=b)
    parts = [linear.rows(0, 8), linear.rows(8, 16)]
    assert np.array_equal(np.concatenate([part.dequantize() for part in parts]), linear.dequantize())


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """coremltools writes in C++ and says only that it failed; the system says why."""
    from coremltools.converters.mil.backend.mil import load

    def fails(*_, **__):
        raise RuntimeError("[MIL FileWriter]: Unknown error occurred while writing data to the file.")

    program = program_of(decoder(SCHEMES["tensor-2"]))[0]
    monkeypatch.setattr(load, "load", fails)
    with pytest.raises(RuntimeError, match="FileWriter"):
        write_package(program, tmp_path / "roomy.mlpackage")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_package(program, tmp_path / "full.mlpackage")
    assert list(tmp_path.iterdir()) == []


def no_space(_handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
