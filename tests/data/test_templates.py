"""The template that is read from a folder is the one that transformers takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from a1q.data.bpe import train_tokenizer
from a1q.data.templates import SWITCH, default_of, refusal, template_of
from tests.data.text import sentence

SEVERAL = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "talk"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("templates")
    train_tokenizer((sentence(number) for number in range(50)), 300, 512, place)
    return place


@pytest.mark.parametrize(
    ("setting", "file", "wanted"),
    [
        ("talk", None, "talk"),
        (None, None, None),
        (SEVERAL, None, "talk"),
        (SEVERAL[:1], None, None),
        ("old", "new", "new"),
        (None, "new\n", "new\n"),
    ],
)
def test_the_template_is_that_of_transformers(folder: Path, setting: object, file: str | None, wanted: str) -> None:
    from transformers import AutoTokenizer

    path = folder / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}
    path.write_text(json.dumps(settings if setting is None else {**settings, "chat_template": setting}))
    jinja = folder / "chat_template.jinja"
    jinja.unlink(missing_ok=True)
    if file is not None:
        jinja.write_text(file)
    found = AutoTokenizer.from_pretrained(folder)
    assert template_of(folder) == default_of(found.chat_template) == wanted
    if wanted is not None:
        assert found.get_chat_template() == wanted


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert template_of(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("[")
    assert template_of(tmp_path) is None


def test_what_is_refused() -> None:
    (missing, mute) = refusal(None, False, "here"), refusal("talk", True, "here")
    assert missing is not None and "here has no chat template" in missing.message
    assert mute is not None and "here knows no thinking" in mute.message
    assert refusal("talk", False, "here") is None and refusal(SWITCH, True, "here") is None
