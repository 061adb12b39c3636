from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.coreml.weightfile import ENTRY, blobs, check_weights, read_spec
from tests.coreml.models import FORMS

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.mark.parametrize(("name", "tied"), FORMS)
def test_every_form_is_whole_and_its_entries_fill_the_file(form, name, tied):
    package = form(name, tied)[1]
    spec = read_spec(package.path)
    check_weights(package.path, spec)
    found = {blob.offset: blob for blob in blobs(spec)}
    content = (package.path / WEIGHTS).read_bytes()
    ends = [sum(ENTRY.unpack_from(content, offset)[2:4]) for offset in found]
    assert max(ends) == len(content), "the last entry ends the file: nothing is left that no operation names"
    assert sum(blob.bits for blob in found.values()) / 8 == pytest.approx(len(content), rel=0.2)


@pytest.fixture(scope="module")
def copy(form, tmp_path_factory):
    """(package, its weights, its program) of a copy that tests damage in turns."""
    path = shutil.copytree(form("channel-3", True)[1].path, tmp_path_factory.mktemp("cut") / "model.mlpackage")
    return path, (path / WEIGHTS).read_bytes(), read_spec(path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_wherever_a_file_is_cut_it_is_noticed(copy, data):
    path, content, spec = copy
    (path / WEIGHTS).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"weight\.bin is truncated"):
        check_weights(path, spec)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_an_entry_of_another_weight_is_noticed(copy, data):
    path, content, spec = copy
    blob = data.draw(st.sampled_from(list(blobs(spec))))
    damaged = bytearray(content)
    place = blob.offset + data.draw(st.sampled_from([0, 1, 2, 3, 8, 9]))  # sentinel and size
    damaged[place] ^= np.uint8(0x55)
    (path / WEIGHTS).write_bytes(damaged)
    with pytest.raises(ValueError, match=r"weight\.bin is damaged"):
        check_weights(path, spec)
