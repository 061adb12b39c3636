"""docs/coming-from-anemll.md: complete, and true of the schemas, the command line and the recipes.

tests/coming_from_anemll.json holds what has to be translated: heading of a table -> the scripts, flags, arguments,
functions, files, keys and names that are published under it. Every name in the list has exactly one row in its table,
and every table with a column `theirs` has no others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from a1q.engine.registry import load_registry
from a1q.recipe import load_recipe
from tests.cli.support import a1q
from tests.data.text import sentence
from tests.importing.formats import v1
from tests.test_recipes import QWEN3, hollow_model
from tests.tiny import tiny_family_folder, tiny_folder
from tests.translation import (
    LINK,
    NAMES,
    PAGE,
    ROOT,
    SPAN,
    command_problem,
    commands,
    default_problem,
    entry_problem,
    member_problem,
    option_problem,
    parse,
    recipes,
    snippets,
    span_problem,
    spans,
    tables,
)

TEXT = PAGE.read_text(encoding="utf-8")
TABLES = {table.heading: table for table in tables(TEXT)}
EXPECTED: dict[str, list[str]] = json.loads(NAMES.read_text(encoding="utf-8"))
GENERAL = "What differs everywhere"
"""The table of differences, whose rows are no names."""
ROWS = [(heading, row) for heading, table in TABLES.items() if heading != GENERAL for row in table.rows]


def test_there_is_one_table_for_every_list_of_names():
    headings = [table.heading for table in tables(TEXT)]
    assert sorted(headings) == sorted([*EXPECTED, GENERAL])


@pytest.mark.parametrize("heading", EXPECTED)
def test_every_name_has_exactly_one_row(heading: str):
    assert TABLES[heading].columns[0] == "theirs"
    found = Counter(name for row in TABLES[heading].rows for name in SPAN.findall(row["theirs"]))
    assert found == Counter(EXPECTED[heading])


def test_no_name_is_listed_twice():
    assert all(len(set(names)) == len(names) for names in EXPECTED.values())


@pytest.mark.parametrize(
    ("heading", "row"), [pytest.param(*item, id=f"{item[0]} {item[1]['theirs']}") for item in ROWS]
)
def test_a_row_is_true(heading: str, row: dict[str, str]):
    assert entry_problem(row["here"], row["what differs"]) is None
    if "default here" in TABLES[heading].columns:
        assert default_problem(row["here"], row["default here"]) is None


def test_every_code_span_is_true():
    assert [problem for problem in map(span_problem, spans(TEXT)) if problem is not None] == []


def test_links_lead_somewhere():
    for target in LINK.findall(TEXT):
        file, _, anchor = target.partition("#")
        page = PAGE.parent / file if file else PAGE
        assert page.exists(), target
        if anchor:
            lines = page.read_text(encoding="utf-8").splitlines()
            assert anchor in [_anchor(line.lstrip("#").strip()) for line in lines if line.startswith("#")], target


def _anchor(heading: str) -> str:
    """The anchor that a heading gets on the web."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_command_line_is_complete():
    found = commands(TEXT)
    assert len(found) > 10
    for words in found:
        assert command_problem(words) is None
        parse(words)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with text, in which the page's own recipes lie as files."""
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"text": sentence(number)}) + "\n" for number in range(400))
    (tmp_path / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, text in recipes(TEXT).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def _runs() -> list[list[str]]:
    """What command lines say of a recipe and how they change it, once each."""
    found = {}
    for words in commands(TEXT):
        name, given = parse(words)
        if name in ("run", "plan", "validate"):
            sets = [word for item in given.get("sets", ()) for word in ("--set", item)]
            unsets = [word for item in given.get("unsets", ()) for word in ("--unset", item)]
            found[(given["recipe"], *sets, *unsets)] = [given["recipe"], *sets, *unsets]
    return list(found.values())


@pytest.mark.parametrize("arguments", _runs(), ids=" ".join)
def test_a_recipe_and_its_changes_are_valid(arguments: list[str], place: Path):
    done = a1q("validate", *arguments)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("arguments", [item for item in _runs() if "/" in item[0]], ids=" ".join)
def test_the_same_is_valid_for_the_built_in_model(arguments: list[str], place: Path):
    name = arguments[0].partition("/")[2]
    done = a1q("validate", name, *arguments[1:])
    assert done.exit_code == 0, done.output
    model = load_recipe(name, registry=load_registry()).model
    assert model is not None and model["source"] == "builtin:pico"


def test_every_recipe_is_valid(place: Path):
    assert recipes(TEXT) and len(recipes(TEXT)) == len(snippets(TEXT, "yaml"))
    for name in recipes(TEXT):
        done = a1q("validate", name)
        assert done.exit_code == 0, done.output


def test_recipes_are_planned_for_the_shapes_they_are_meant_for(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("a1q.models.source.content_digest", lambda folder, names: "not read")
    model = hollow_model(place / "model", QWEN3)
    for arguments in _runs():
        if arguments[0] == "v2-from-v1.yaml":
            continue  # run from its checkpoint to its export below
        data = "chat" if arguments[0] == "cache.yaml" else "text"
        here = [f"model.source={model}", f"data.{data}={{source: {place / 'text.jsonl'}, seq_len: 32, holdout: 0.2}}"]
        done = a1q("plan", *arguments, *(word for item in here for word in ("--set", item)))
        assert done.exit_code == 0, done.output


def test_recovery_goes_on_from_another_run(place: Path):
    model = tiny_family_folder(place / "teacher", "qwen3", num_hidden_layers=1)
    data = f"data.text={{source: {place / 'text.jsonl'}, seq_len: 32, holdout: 0.2}}"
    start = {
        "a1q": 1,
        "name": "q2",
        "model": {"source": str(model)},
        "groups": {"linears": {"match": r"model\.layers\.\d+\.(mlp|self_attn)\.\w+_proj"}},
        "stages": [
            {"quantize": {"rules": {"linears": {"scheme": "lut_lowrank", "bits": 2}}}},
            {"id": "open", "export": {"format": "packed", "latent": "keep"}},
        ],
    }
    (place / "q2.yaml").write_text(json.dumps(start), encoding="utf-8")
    done = a1q("run", "q2.yaml")
    assert done.exit_code == 0, done.output
    teacher = f"stages.teacher.model={{source: {model}}}"
    done = a1q(
        "run", "recovery.yaml", "--smoke", "--set", data, "--set", teacher, "--set", "stages.ane.context=128",
        "--set", "stages.ane.verify={prompt: 40, generate: 4, random: 16}",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    written = place / "runs" / "recovery-smoke" / "export"
    assert (written / "hf" / "model.safetensors").is_file() and (written / "ane" / "model.mlpackage").is_dir()


def test_a_checkpoint_of_theirs_becomes_a_package(place: Path):
    tiny_folder(place / "base", head_dim=32)
    v1(head_dim=32).save(place / "runs" / "v1", "best.pt")
    (words,) = (words for words in commands(TEXT) if "runs/v1/best.pt" in words)
    assert "Qwen/Qwen3-0.6B" in words
    here = ["base" if word == "Qwen/Qwen3-0.6B" else word for word in words[1:]]
    done = a1q(*here, "--sequences", 0)
    assert done.exit_code == 0, done.output
    sets = [
        f"data.text={{source: {place / 'text.jsonl'}, seq_len: 32, holdout: 0.2}}",
        "stages.teacher.model={source: base}",
        "stages.ane.context=128",
        "stages.ane.verify={prompt: 40, generate: 4, random: 16}",
    ]
    done = a1q("run", "v2-from-v1.yaml", "--smoke", *(word for item in sets for word in ("--set", item)))
    assert done.exit_code == 0, done.output
    assert (place / "runs" / "v2-from-v1-smoke" / "export" / "ane" / "model.mlpackage").is_dir()


def test_the_readme_names_the_page():
    assert "docs/coming-from-anemll.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("problem", "wrong", "right"),
    [
        (option_problem, "train.lr.weight", "train.lr.weights"),
        (option_problem, "quantize.rules.*.rnk", "quantize.rules.*.rank"),
        (option_problem, "quantize.rules.*.scheme: balance", "quantize.rules.*.scheme: balanced"),
        (option_problem, "snap.mode: bake", "snap.mode: baked"),
        (option_problem, "export.contxt", "export.context"),
        (option_problem, "train.trainable: [weight]", "train.trainable: [weights]"),
        (option_problem, "data.*.lenght", "data.*.seq_len"),
        (option_problem, "stages.*.of", "stages.*.from"),
        (command_problem, ["a1q", "generat"], ["a1q", "generate"]),
        (command_problem, ["a1q", "generate", "--promt"], ["a1q", "generate", "--prompt"]),
        (command_problem, ["a1q", "store", "pak"], ["a1q", "store", "pack"]),
        (command_problem, ["a1q", "run", "--track", "wand"], ["a1q", "run", "--track", "wandb"]),
        (member_problem, "a1q.recipe.load_recipes", "a1q.recipe.load_recipe"),
        (member_problem, "a1q.quant.module.QuantModule.unsnap", "a1q.quant.module.QuantModule.snap"),
        (span_problem, "kd.cache.topk", "kd.cache.top_k"),
        (lambda cell: entry_problem(cell, ""), "nothing", "`snap`"),
        (lambda cell: entry_problem(cell, ""), "`snapp`", "`lora_recover`"),
        (lambda stated: default_problem("`kd.cache.top_k`", stated), "128", "64"),
        (lambda stated: default_problem("`train.ema`", stated), "", "null"),
        (lambda stated: default_problem("`a1q generate --max-tokens`", stated), "256", "128"),
        (lambda stated: default_problem("`model.source`", stated), "builtin:pico", ""),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_noticed(problem, wrong, right):
    assert problem(wrong) is not None
    assert problem(right) is None
