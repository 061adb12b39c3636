import dataclasses

import numpy
import pytest
import torch

from a1q.models.checkpoint import load_model
from a1q.quant.linear import quantized_modules
from benchmarks.quality import own
from benchmarks.quality.configurations import CONFIGURATIONS
from benchmarks.quality.fits import keep_fit, kept_fit, place_of
from benchmarks.quality.job import Job
from benchmarks.quality.protocol import Tokens
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.teachers import linears
from tests.tiny import tiny_folder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))


@pytest.fixture
def job(tmp_path):
    folder = tiny_folder(tmp_path / "teacher")
    vocabulary = load_model(folder).config.vocab_size
    ids = numpy.random.default_rng(0).integers(vocabulary, size=(8, 16))
    (tmp_path / "first").mkdir()
    return Job(folder, SETTINGS["w2"], Tokens(ids, ids), 0, None, tmp_path / "first")


def fitted(job):
    student = load_model(job.teacher)
    configuration = CONFIGURATIONS["a1q-fit"]
    specs = own.specs_of(configuration, job.setting, [name for name, _ in linears(student)])
    return student, own.fitted(student, specs, job, configuration)


def test_a_fit_is_made_once(job, tmp_path, monkeypatch):
    made, record = fitted(job)
    monkeypatch.setattr(own, "fit", None)
    (tmp_path / "second").mkdir()
    taken, again = fitted(dataclasses.replace(job, scratch=tmp_path / "second"))
    assert again == record and record["seconds"] > 0
    pairs = list(zip(quantized_modules(made), quantized_modules(taken), strict=True))
    assert len(pairs) == 14
    for (name, module), (_, other) in pairs:
        assert torch.equal(module.dequantize(), other.dequantize()), name
        assert other.state == module.state


def test_other_tokens_are_another_fit(job, tmp_path):
    fitted(job)
    other = Tokens(job.tokens.calibration[:4], job.tokens.training)
    (tmp_path / "second").mkdir()
    fitted(dataclasses.replace(job, tokens=other, scratch=tmp_path / "second"))
    assert len(list((tmp_path / "home" / "quality" / "fits").iterdir())) == 2


def test_nothing_kept_is_nothing_found(job):
    place = place_of({"some": "thing"})
    assert kept_fit(place) is None
    student, record = fitted(job)
    keep_fit(place, dict(quantized_modules(student)), record)
    assert kept_fit(place)[1] == record
