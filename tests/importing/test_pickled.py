"""Files of torch.save: tensors come through, and nothing in a file is ever executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a1q.errors import MismatchError
from a1q.importing.pickled import read_pickled


class Touch:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_values_come_through(tmp_path, zipped):
    value = {"model": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int8)}, "step": 7}
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_pickled(tmp_path / "a.pt")
    assert torch.equal(found["model"]["a"], value["model"]["a"]) and found["step"] == 7
    assert found["model"]["b"] == 3


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_execute_code_is_refused_and_does_not(tmp_path, zipped):
    """The check of the test itself: plain pickle does execute it."""
    pickle.loads(pickle.dumps(Touch(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()
    torch.save(
        {"a": torch.ones(3), "b": Touch(tmp_path / "touched")}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(MismatchError, match=r"would execute code when they are read: posix\.open"):
        read_pickled(tmp_path / "a.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("value, named", [(torch.nn.Linear(2, 2), "Linear"), ({"loss": np.float64(2)}, "scalar")])
def test_whole_objects_are_refused_by_name(tmp_path, value, named):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(MismatchError, match=rf"{named}\b.*\n.*save `model.state_dict\(\)` instead"):
        read_pickled(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_files_are_called_cut(tmp_path, zipped):
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "a.pt").read_bytes()
    for share in (0, 0.1, 0.5, 0.99):
        (tmp_path / "a.pt").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(MismatchError, match=r"bytes\) is no whole file of torch.save"):
            read_pickled(tmp_path / "a.pt")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=60))
def test_junk_is_refused_kindly(tmp_path, junk):
    (tmp_path / "junk.pt").write_bytes(junk)
    try:
        read_pickled(tmp_path / "junk.pt")
    except MismatchError as error:
        assert "junk.pt" in str(error)
