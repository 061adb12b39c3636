"""The check is checked: whatever defect is put into a bundle, verification at its default thresholds finds it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from a1q.coreml.bundle import read_bundle
from a1q.coreml.reference import references, sequences
from a1q.coreml.thresholds import default_verify
from a1q.coreml.verify import verify_bundle
from a1q.errors import MismatchError
from tests.cli.support import process
from tests.coreml.bundles import bundle_of, model_folder
from tests.coreml.models import SCHEMES, decoder
from tests.coreml.mutations import (
    IN_FILES,
    IN_PROGRAM,
    Editor,
    building_with,
    head_from_another_table,
    one_table_entry,
    swapped_states,
)
from tests.tiny import tiny_family

LENGTHS = (36, 4, 8)
"""Prompt, generated, random: fewer than the default, so that less can show."""


def verdict(bundle, expected):
    return verify_bundle(bundle, expected, default_verify()).failures


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A bundle without defects, and what its model says."""
    folder = tmp_path_factory.mktemp("right")
    bundle = bundle_of(decoder(SCHEMES["rank-1"]), folder)
    expected = references(decoder(SCHEMES["rank-1"]), sequences(folder, 320, *LENGTHS))
    assert verdict(bundle, expected) == []
    return folder, expected


@pytest.mark.parametrize("defect", IN_FILES, ids=lambda defect: defect.__name__)
def test_a_defect_in_the_saved_files(right, tmp_path, defect):
    folder, expected = right
    changed = shutil.copytree(folder, tmp_path / "changed")
    defect(Editor(changed))
    assert verdict(read_bundle(changed), expected)


@pytest.mark.parametrize(("defect", "family"), IN_PROGRAM, ids=[defect.__name__ for defect, _ in IN_PROGRAM])
def test_a_defect_in_the_program(tmp_path, defect, family):
    with building_with(defect):
        changed = bundle_of(tiny_family(family), tmp_path)
    assert verdict(changed, references(tiny_family(family), sequences(tmp_path, 320, *LENGTHS)))


@pytest.mark.parametrize("family", sorted({family for _, family in IN_PROGRAM}))
def test_without_defect_every_family_passes(tmp_path, family):
    bundle = bundle_of(tiny_family(family), tmp_path)
    assert verdict(bundle, references(tiny_family(family), sequences(tmp_path, 320, *LENGTHS))) == []


def test_a_head_that_reads_another_table(tmp_path):
    model = decoder(tie_word_embeddings=False)
    bundle_of(model, tmp_path)
    expected = references(model, sequences(tmp_path, 320, *LENGTHS))
    assert verdict(read_bundle(tmp_path), expected) == []
    head_from_another_table(Editor(tmp_path))
    assert verdict(read_bundle(tmp_path), expected)


def test_outputs_in_another_order(tmp_path):
    model = decoder(num_hidden_layers=1)
    bundle_of(model, tmp_path, head_parts=2)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"outputs": meta["outputs"][::-1]}))
    assert verdict(read_bundle(tmp_path), references(model, sequences(tmp_path, 320, *LENGTHS)))


def test_a_dropped_adapter(tmp_path):
    plain = bundle_of(decoder(SCHEMES["rank-1"]), tmp_path)
    with_adapter = decoder(SCHEMES["rank-1"], adapter=1)
    assert verdict(plain, references(with_adapter, sequences(tmp_path, 320, *LENGTHS)))


def test_defects_in_the_anemll_layout(tmp_path):
    """A table entry of a chunk; chunks that take each other's places, which then don't even fit."""
    model = decoder(SCHEMES["rank-1"])
    bundle_of(model, tmp_path / "right", "anemll", chunks=2)
    expected = references(decoder(SCHEMES["rank-1"]), sequences(tmp_path / "right", 320, *LENGTHS))
    assert verdict(read_bundle(tmp_path / "right"), expected) == []
    changed = shutil.copytree(tmp_path / "right", tmp_path / "changed")
    meta = json.loads((changed / "meta.json").read_text())
    parts = {part["name"]: part for part in meta["parts"]}
    one_table_entry(Editor(changed, parts["ffn_2"]["file"]))
    assert verdict(read_bundle(changed), expected)
    swapped = shutil.copytree(tmp_path / "right", tmp_path / "swapped")
    parts["ffn_1"]["file"], parts["ffn_2"]["file"] = parts["ffn_2"]["file"], parts["ffn_1"]["file"]
    (swapped / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(MismatchError, match="hidden_states of shape"):
        verdict(read_bundle(swapped), expected)


@pytest.mark.parametrize("defect", [None, swapped_states], ids=["none", "swapped_states"])
def test_the_command_says_so(right, tmp_path, defect):
    folder = shutil.copytree(right[0], tmp_path / "package")
    model: Path = model_folder(decoder(SCHEMES["rank-1"]), tmp_path / "model")
    if defect is not None:
        defect(Editor(folder))
    lengths = ("--prompt", 40, "--generate", 4, "--random", 0)
    done = process("verify", folder, "--against", model, *lengths, home=tmp_path / "home")
    assert done.returncode == (0 if defect is None else 4), done.stderr
    if defect is None:
        assert f"{folder} computes what {model} computes" in done.stdout
    else:
        assert "does not compute what" in done.stderr and "Traceback" not in done.stderr
