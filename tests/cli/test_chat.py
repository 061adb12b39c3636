"""`a1q chat` as a program: scripted by a pipe, typed at a terminal, and refusals."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.support import ROOT, a1q
from tests.cli.test_validate import HEAVY, loaded_by
from tests.tiny import tiny_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def program(*arguments: str, lines: str | bytes) -> subprocess.CompletedProcess:
    content = lines.encode() if isinstance(lines, str) else lines
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "a1q", *arguments]
    return subprocess.run(command, input=content, capture_output=True, env=environment)


GREEDY = ("--temperature", "0", "--max-tokens", "8", "--device", "cpu")


def test_a_script_of_questions_and_commands() -> None:
    lines = 'Return\n/stats\n"""\ntwo\nlines\n"""\n/save talk.json\n/unknown\n/quit\nnever\n'
    done = program("chat", "builtin:pico", *GREEDY, "--system", "Be short.", lines=lines)
    told = done.stderr.decode()
    assert done.returncode == 0, told
    messages = json.loads(Path("talk.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "two\nlines"
    assert done.stdout.decode() == "".join(messages[number]["content"] + "\n" for number in (2, 4))
    assert told.count("tokens/s, stopped at") == 3 and "tokens of context, on cpu" in told and "/help lists" in told
    again = program("chat", "builtin:pico", *GREEDY, "--load", "talk.json", lines="/undo\n/retry\n")
    assert again.stdout == (messages[2]["content"] + "\n").encode()


def test_lines_as_windows_ends_them_and_commands_in_quotes() -> None:
    lines = b'\xef\xbb\xbfReturn\r\n"""/quit"""\r\n/save talk.json\r\n/exit\r\n'
    done = program("chat", "builtin:pico", *GREEDY, lines=lines)
    assert done.returncode == 0 and "no command" not in done.stderr.decode()
    messages = json.loads(Path("talk.json").read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["Return", "/quit"]


def test_the_same_question_in_generate_gets_the_same_answer() -> None:
    done = program("chat", "builtin:pico", *GREEDY, lines="Why is it so?\n")
    asked = a1q("generate", "builtin:pico", *GREEDY, "--chat", "--prompt", "Why is it so?", "--json")
    assert json.loads(asked.stdout)["text"] + "\n" == done.stdout.decode()
    assert json.loads(asked.stdout)["prompt_tokens"] > len(["Why", "is", "it", "so?"])


@pytest.mark.parametrize(
    ("arguments", "lines", "code", "message"),
    [
        (("builtin:pico",), b"caf\xe9\n", 2, "standard input is not UTF-8"),
        (("builtin:pico",), b"Hello \\\n", 2, "standard input ends where a line should follow"),
        (("builtin:pico",), b'"""\nHello\nthere', 2, "standard input ends where a line should follow"),
        (("builtin:pico", "--thinking", "on"), b"", 3, "knows no thinking"),
        (("builtin:pico", "--base", "x"), b"", 2, "--base is for adapters"),
        (("builtin:pico", "--load", "no.json"), b"", 2, "no.json is no conversation"),
        (("builtin:pica",), b"", 3, "builtin:pico"),
        (("builtin:pico", "--top-p", "0"), b"", 2, "top-p"),
        (("builtin:pico", "--temperature", "nan"), b"", 2, "nan is no number"),
        (("builtin:pico", "--max-tokens", "0"), b"", 2, "max-tokens"),
        (("builtin:pico", "--temperature", "inf"), b"", 2, "inf is not in the range 0<=x<=100"),
        (("builtin:pico", "--repetition-penalty", "1e-300"), b"", 2, "0.01<=x<=100"),
    ],
)
def test_refusals(arguments: tuple[str, ...], lines: bytes, code: int, message: str) -> None:
    done = program("chat", *arguments, lines=lines)
    assert done.returncode == code and message in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_a_model_that_was_not_trained_to_chat_names_what_works(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "tiny")
    done = program("chat", "tiny", lines="Hello\n")
    assert (
        done.returncode == 3 and "no chat template" in done.stderr.decode() and "a1q generate" in done.stderr.decode()
    )


def as_a_shell_starts_it(terminal: int) -> None:
    """Tests may run where Ctrl-C is ignored, which programs inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.login_tty(terminal)


def test_typed_at_a_terminal() -> None:
    """With line editing; history is kept for its owner alone, Ctrl-C drops a line, Ctrl-D leaves."""
    parent, child = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    command = [sys.executable, "-m", "a1q", "chat", "builtin:pico", *GREEDY]
    process = subprocess.Popen(command, env=environment, preexec_fn=lambda: as_a_shell_starts_it(child))
    os.close(child)
    seen, all_of_it = b"", b""

    def until(text: bytes) -> None:
        nonlocal seen, all_of_it
        end = time.monotonic() + 30
        while text not in seen and time.monotonic() < end:
            if select.select([parent], [], [], 1)[0]:
                piece = os.read(parent, 4096)
                seen, all_of_it = seen + piece, all_of_it + piece
        assert text in seen, (text, all_of_it)
        seen = seen.partition(text)[2]

    until(b"/help lists")
    until(b"> ")
    os.write(parent, b"half a li")
    until(b"half a li")  # a signal just before Python waits for the first key would be seen with that key
    time.sleep(0.2)
    os.write(parent, b"\x03")
    until(b"> ")
    os.write(parent, b"Return \\\n")
    until("… ".encode())
    os.write(parent, b"it\n")
    until(b"stopped at")
    until(b"> ")
    os.write(parent, b"\x04")
    assert process.wait(timeout=30) == 0
    os.close(parent)
    history = Path("home") / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and "Return" in history.read_text()


def test_an_adapter_writes_as_its_model_with_it(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_folder(tmp_path / "tiny")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    options = (*GREEDY, "--prompt", "Return a list", "--json")
    found = json.loads(a1q("generate", "adapter", *options).stdout)
    assert found["text"] == json.loads(a1q("generate", "adapter", "--base", "tiny", *options).stdout)["text"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("Return a list", return_tensors="pt")["input_ids"]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with torch.inference_mode():
        written = theirs.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True) == found["text"]
    plain = json.loads(a1q("generate", "tiny", *options).stdout)["text"]
    assert plain != found["text"]

    other = tiny_folder(tmp_path / "other", hidden_size=32, head_dim=8)
    refused = a1q("generate", "adapter", "--base", other, *options[:-1])
    assert refused.exit_code == 3 and "name the adapter's own model with --base" in refused.output
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    refused = a1q("generate", "adapter", *options[:-1])
    assert refused.exit_code == 2 and "--base MODEL" in refused.output


def test_options_of_the_template_need_it() -> None:
    for option in (("--system", "x"), ("--thinking", "off")):
        result = a1q("generate", "builtin:pico", "--prompt", "x", *option)
        assert result.exit_code == 2 and f"{option[0]} is for the chat template: add --chat" in result.output


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("chat", "--help", heavy=HEAVY) == [0, []]
