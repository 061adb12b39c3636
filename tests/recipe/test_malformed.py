"""Malformed recipes through the command line: the right line, the right exit code, no traceback, nothing written."""

import itertools
import subprocess
import sys

import pytest

from a1q.cli import main
from tests.recipe.fakes import header_model

BASE = r"""a1q: 1
name: small
seed: 1
model: {source: MODEL}
data:
  text: {source: builtin:prose, seq_len: 32}
groups:
  mlp: {match: 'model\.layers\.\d+\.mlp\.(gate|up|down)_proj', expect: 6}
  attn: {match: 'model\.layers\.\d+\.self_attn\.[qkvo]_proj'}
stages:
  - id: teacher
    kd: {data: text}
  - id: q4
    quantize:
      rules:
        mlp: {scheme: lut_lowrank, bits: 4}
        attn: {scheme: lut_lowrank, bits: 4}
  - id: tune
    train: {objective: {kd: teacher}, steps: 2}
  - id: final
    snap: {}
  - id: check
    eval: {data: text, against: teacher, gate: {bpw: {max: 90}}}
  - id: hf
    export: {format: safetensors, from: final}
"""

# (what is wrong, text to replace, its replacement, line of the problem, fragment of the message)
IN_THE_TEXT = [
    ("unknown root key", "seed: 1", "sead: 1", 3, "did you mean 'seed'?"),
    ("wrong type", "steps: 2", "steps: two", 19, "expected a whole number, found text 'two'"),
    ("a number in quotes", "steps: 2", "steps: '2'", 19, "without quotes"),
    ("a fraction", "steps: 2", "steps: 2.5", 19, "expected a whole number"),
    ("a negative number", "steps: 2", "steps: -2", 19, "expected at least 1"),
    ("zero", "steps: 2", "steps: 0", 19, "expected at least 1"),
    ("NaN", "steps: 2", "steps: 2, lr: {weights: .nan}", 19, "not a finite number"),
    ("infinity", "steps: 2", "steps: 2, lr: {weights: .inf}", 19, "not a finite number"),
    ("a negative rate", "steps: 2", "steps: 2, lr: {weights: -1e-5}", 19, "expected more than 0"),
    ("a number beyond 64 bits", "seed: 1", "seed: 123456789012345678901234567890", 3, "64 bits"),
    ("yes for true", "steps: 2", "steps: 2, straight_through_fp16: yes", 19, "write true or false"),
    ("a list for a mapping", "{objective: {kd: teacher}, steps: 2}", "[1]", 19, "expected a mapping of options"),
    ("a missing required option", "objective: {kd: teacher}, ", "", 19, "missing key 'objective'"),
    ("an unknown option", "steps: 2", "stepz: 2", 19, "did you mean 'steps'?"),
    ("an unknown nested option", "{kd: teacher}", "{kd: teacher, temprature: 2}", 19, "did you mean 'temperature'?"),
    ("an unknown stage", "    snap: {}", "    snapp: {}", 21, "did you mean 'snap'?"),
    ("no stage key", "    snap: {}\n", "", 20, "no stage key"),
    ("two stage keys", "    snap: {}", "    snap: {}\n    eval: {data: text}", 22, "exactly one stage key"),
    ("a stage that is text", "  - id: final\n    snap: {}", "  - snap", 20, "expected a mapping, found text 'snap'"),
    ("an option beside the stage key", "    snap: {}", "    snap: {}\n    dtype: fp16", 22, "stands inside it"),
    ("no stages", BASE[BASE.index("stages:") :], "", 1, "missing key 'stages'"),
    ("empty stages", BASE[BASE.index("stages:") :], "stages: []\n", 10, "at least 1 entries"),
    ("no version", "a1q: 1\n", "", 1, "missing key 'a1q'"),
    ("another version", "a1q: 1", "a1q: 2", 1, "expected 1, found the number 2"),
    ("no name", "name: small\n", "", 1, "missing key 'name'"),
    ("a bad regex", r"attn: {match: 'model", r"attn: {match: '(model", 9, "not a regular expression"),
    ("a regex that could take forever", "mlp: {match: 'model", "mlp: {match: '((((a*)*)*)*)*model", 8, "take forever"),
    ("a regex with a backreference", r"_proj', expect", r"_proj\1', expect", 8, "bounded time"),
    ("expect is negative", "expect: 6", "expect: -6", 8, "expected at least 1"),
    ("a group's name with a dot", "  mlp: {m", "  m.lp: {m", 8, "expected a plain name"),
    ("a duplicate key", "seed: 1", "seed: 1\nseed: 2", 4, "duplicate key 'seed'"),
    ("a duplicate option", "steps: 2", "steps: 2, steps: 3", 19, "duplicate key 'steps'"),
    ("a tab", "  - id: final", "\t- id: final", 20, "indent with spaces"),
    ("an open bracket", "snap: {}", "snap: {", 22, "not YAML"),
    ("two documents", "seed: 1", "---\nseed: 1", 3, "one YAML document"),
    ("a tag", "seed: 1", "seed: !!python/object/apply:os.getpid []", 3, "tag"),
    ("a merge key", "seed: 1", "seed: 1\n<<: {a1q: 1}", 4, "merge keys"),
    ("a key that is no text", "seed: 1", "3: 1", 3, "a key must be text"),
    ("empty", BASE, "", 1, "the file is empty"),
    ("a list at the root", BASE, "- a1q: 1\n", 1, "a recipe is a mapping of keys"),
    (
        "an alias bomb",
        BASE,
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in itertools.pairwise("abcdefghi")
        ),
        1,
        "aliases unfold to more than",
    ),
    ("an alias within itself", "seed: 1", "seed: &s [*s]", 3, "nested more than"),
    ("an absolute path as id", "id: check", "id: /tmp/check", 22, "expected a plain name"),
    ("a path upwards as id", "id: check", "id: ../check", 22, "expected a plain name"),
    ("an id with a space", "id: check", "id: the end", 22, "expected a plain name"),
    ("the reserved id", "id: check", "id: model", 22, "a stage can't be called so"),
    ("the same id twice", "id: check", "id: final", 22, "there are two stages 'final'"),
    ("a path upwards as name", "name: small", "name: ../small", 2, "expected a plain name"),
    ("from a later stage", "kd: {data: text}", "kd: {data: text, from: q4}", 12, "comes later"),
    ("from itself", "snap: {}", "snap: {from: final}", 21, "its own result"),
    ("from nothing", "from: final", "from: finale", 25, "did you mean 'final'?"),
    ("from a stage of another kind", "from: final", "from: check", 25, "'check' makes a report"),
    ("a teacher that makes no teacher", "{kd: teacher}", "{kd: q4}", 19, "'q4' makes a model"),
    ("a teacher that comes later", "{kd: teacher}", "{kd: check}", 19, "comes later"),
    ("unknown data", "kd: {data: text}", "kd: {data: txt}", 12, "did you mean 'text'?"),
    ("an unknown data option", "seq_len: 32", "seqlen: 32", 6, "did you mean 'seq_len'?"),
    ("a holdout of everything", "seq_len: 32", "holdout: 1.0", 6, "expected less than 0.5"),
    ("an unknown scheme", "mlp: {scheme: lut_lowrank", "mlp: {scheme: lut_lowrnk", 16, "did you mean 'lut_lowrank'?"),
    (
        "bits that no scheme has",
        "lut_lowrank, bits: 4}\n        attn",
        "lut_lowrank, bits: 5}\n        attn",
        16,
        "one of 1",
    ),
    (
        "an unknown scheme option",
        "bits: 4}\n        attn",
        "bits: 4, rnak: 1}\n        attn",
        16,
        "did you mean 'rank'?",
    ),
    ("an unknown exporter", "format: safetensors", "format: safetensor", 25, "did you mean 'safetensors'?"),
    ("an option of another exporter", "from: final}", "from: final, context: 64}", 25, "unknown key 'context'"),
    ("an unknown device", "seed: 1", "runtime: {device: tpu}", 3, "one of auto, cpu, cuda, mps"),
    ("nested use", BASE, "a1q: 1\nname: x\nuse: r.yaml\n", 3, "one level of `use`"),
    ("use of nothing", BASE, "a1q: 1\nname: x\nuse: nothing.yaml\n", 3, "there is no recipe 'nothing.yaml'"),
    ("set without use", "seed: 1", "set: {seed: 1}", 3, "only beside `use`"),
    ("a reference to something later", "seed: 1", "seed: '${stages.tune.steps}'", 3, "stands earlier"),
]
AGAINST_THE_MODEL = [
    ("a group that is not there", "        mlp: {s", "        mpl: {s", 16, 2, "did you mean 'mlp'?"),
    ("a pattern with no match", r"self_attn\.[", r"self_atn\.[", 17, 3, "model.layers.{0..1}.self_attn.q_proj"),
    ("a part of a name", r"model\.layers\.\d+\.self", "self", 17, 3, "matches no module"),
    ("expect not met", "expect: 6", "expect: 7", 16, 3, "expects 7 modules and matches 6"),
    (
        "two rules for one module",
        r"\.self_attn\.[qkvo]_proj",
        r"\.(self_attn|mlp)\..*_proj",
        17,
        3,
        "are in 'mlp' and 'attn'",
    ),
    ("a rule on a tied head", r"model\.layers\.\d+\.self_attn\.[qkvo]_proj", "lm_head", 17, 3, "model.embed_tokens"),
    (
        "training before quantizing",
        "steps: 2}",
        "steps: 2, from: model}",
        19,
        2,
        "no module of the model here is quantized",
    ),
    ("quantizing twice", "    snap: {}", "    quantize: {rules: {mlp: {scheme: lut_lowrank, bits: 2}}}", 21, 2, ""),
    ("snapping a dense model", "snap: {}", "snap: {from: model}", 21, 2, ""),
    (
        "training after snap",
        "    eval: {data: text, a",
        "    train: {objective: {kd: teacher}} # ",
        23,
        2,
        "snapped modules no longer train",
    ),
    ("an exporter that can't take what trains", "from: final}", "from: tune}", 25, 3, ""),
    ("an unknown metric in a gate", "bpw: {max", "bwp: {max", 23, 2, "did you mean 'bpw'?"),
    ("more top-k than tokens", "kd: {data: text}", "kd: {data: text, cache: {top_k: 1000}}", 12, 3, "top_k is 1000"),
    ("a model that is not there", "source: MODEL", "source: /nowhere/at/all", 4, 3, "/nowhere/at/all"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return header_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def recipe(tmp_path, model, monkeypatch):
    """Writes the base recipe with one thing changed, in an otherwise empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def write(old, new):
        assert BASE.count(old) == 1
        (tmp_path / "r.yaml").write_text(BASE.replace(old, new).replace("MODEL", str(model)), encoding="utf-8")
        return "r.yaml"

    return write


def everything_below(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def run(arguments, folder, capsys):
    """Exit code and error text of a command that must change nothing on disk."""
    before = everything_below(folder)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert everything_below(folder) == before
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return stopped.value.code, captured.err


def test_the_base_recipe_is_right(recipe, tmp_path, capsys):
    recipe("seed: 1", "seed: 2")
    assert run(["validate", "r.yaml"], tmp_path, capsys) == (0, "")
    assert run(["plan", "r.yaml"], tmp_path, capsys) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "line", "fragment"), [case[1:] for case in IN_THE_TEXT], ids=[case[0] for case in IN_THE_TEXT]
)
@pytest.mark.parametrize("command", ["validate", "plan"])
def test_wrong_in_the_text(recipe, tmp_path, capsys, command, old, new, line, fragment):
    code, error = run([command, recipe(old, new)], tmp_path, capsys)
    assert code == 2
    assert error.startswith(f"a1q: r.yaml:{line}:")
    assert fragment in error
    assert error.count("r.yaml:") == 1, "one mistake, one problem"


@pytest.mark.parametrize(
    ("old", "new", "line", "code", "fragment"),
    [case[1:] for case in AGAINST_THE_MODEL],
    ids=[case[0] for case in AGAINST_THE_MODEL],
)
def test_wrong_against_the_model(recipe, tmp_path, capsys, old, new, line, code, fragment):
    found, error = run(["plan", recipe(old, new)], tmp_path, capsys)
    assert error.startswith(f"a1q: r.yaml:{line}:"), error
    assert found == code
    assert fragment in error
    assert error.count("r.yaml:") == 1, "one mistake, one problem"


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\x00\x00", b"a1q: 1\nname: \xff\n", b"\x00\x01\x02", b"\x1f\x8b\x08\x00"]
)
def test_binary_files(tmp_path, capsys, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_bytes(data)
    code, error = run(["validate", "r.yaml"], tmp_path, capsys)
    assert code == 2
    assert error.startswith("a1q: r.yaml:")


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (
            ["validate", "r.yaml", "--set", "stages.tune.steps=x"],
            2,
            "a1q: --set stages.tune.steps=x: stages.tune.steps: expected",
        ),
        (["validate", "r.yaml", "--set", "seed"], 2, "PATH=VALUE"),
        (["validate", "r.yaml", "--unset", "stages.tuna"], 2, "did you mean 'tune'?"),
        (["validate", "missing.yaml"], 2, "there is no recipe 'missing.yaml'"),
        (["validate", "."], 2, "is a folder"),
        (["validate"], 2, "Missing argument"),
        (["validate", "r.yaml", "--plugin", "nothing.py"], 2, "no such file"),
        (["plan", "r.yaml", "--set", "groups.mlp.expect=9"], 3, "expects 9"),
    ],
)
def test_wrong_command_lines(recipe, tmp_path, capsys, arguments, code, fragment):
    recipe("seed: 1", "seed: 2")
    found, error = run(arguments, tmp_path, capsys)
    assert found == code
    assert fragment in error


@pytest.mark.parametrize(
    ("command", "old", "new", "line", "code"),
    [
        ("validate", "steps: 2", "steps: two", 19, 2),
        ("plan", "expect: 6", "expect: 7", 16, 3),
        ("run", "kd: {data: text}", "kd: {data: txt}", 12, 2),
        ("run", "expect: 6", "expect: 7", 16, 3),
    ],
)
def test_the_installed_command(recipe, tmp_path, command, old, new, line, code):
    recipe(old, new)
    before = everything_below(tmp_path)
    result = subprocess.run([sys.executable, "-m", "a1q", command, "r.yaml"], capture_output=True, text=True)
    assert result.returncode == code
    assert result.stderr.startswith(f"a1q: r.yaml:{line}:")
    assert "Traceback" not in result.stderr
    assert everything_below(tmp_path) == before
