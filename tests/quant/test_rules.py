from pathlib import Path

import pytest

from a1q.engine.artifact import Artifact
from a1q.errors import StageError
from a1q.quant.rules import FILE, Rule, read_rules


def test_rules_are_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"modules": {"up": {"group": "mlp", "scheme": {"scheme": "lut", "bits": 4}}}}')
    assert read_rules(Artifact("rules", tmp_path, "")) == {"up": Rule("mlp", ({"scheme": "lut", "bits": 4},))}


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"modules": 1}', '{"modules": {"up": {"group": "mlp"}}}'])
def test_damaged_rules_are_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(StageError, match=r"rules\.json can't be read"):
        read_rules(Artifact("rules", tmp_path, ""))
