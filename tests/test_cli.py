"""phi3-generate and phi3-chat on the embedded model."""

import io
import json
import shutil
import sys

import pytest

from phi3_jax import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command and returns exit status, stdout and stderr."""

    def call(entry, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["phi3", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            entry()
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


QUESTION = "What is the capital of France?"


def test_generate_answers_and_says_that_it_is_the_demo(run):
    status, out, err = run(cli.generate_command, QUESTION, "--stats")
    assert status == 0 and "Paris" in out
    assert "phi3-tiny-demo" in err and "not Phi-3" in err
    for word in ("load", "prompt", "decode", "tokens/s", "peak memory"):
        assert word in err


def test_generate_reads_the_input_and_a_model_folder(run):
    status, out, err = run(
        cli.generate_command, "-", "--model", str(cli.EMBEDDED_MODEL), stdin=QUESTION
    )
    assert status == 0 and "Paris" in out and "demo" not in err


def test_generate_options_reach_generation(run):
    short = run(cli.generate_command, QUESTION, "--max-new-tokens", "2")[1]
    assert 0 < len(short.strip()) < len("The capital of France is Paris.")
    hot = ["--temperature", "5", "--top-p", "0.99", "--max-new-tokens", "12"]
    first, again, other = (
        run(cli.generate_command, QUESTION, *hot, "--seed", seed)[1] for seed in ("1", "1", "2")
    )
    assert first == again != other
    cold = run(cli.generate_command, QUESTION, "--temperature", "0", "--dtype", "float32")[1]
    assert "Paris" in cold


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["hi", "--model", "no/such-folder-here-at-all/x"], "no/such-folder"),
        (["hi", "--temperature", "-1"], "temperature is -1"),
        (["hi", "--cache-length", "3"], "leaves none for an answer"),
        (["hi", "--dtype", "int8"], "int8"),
        ([" "], "the prompt is empty"),
    ],
)
def test_errors_are_one_message_without_a_traceback(run, arguments, words):
    status, out, err = run(cli.generate_command, *arguments)
    assert status == 1 and not out
    assert words in err and "error:" in err and "Traceback" not in err


def test_unknown_options_are_usage_errors(run):
    assert run(cli.generate_command, "hi", "--nonsense")[0] == 2


def test_chat_keeps_history_and_obeys(run, tmp_path):
    file = tmp_path / "chat.json"
    lines = ["!help", QUESTION, "/set max_new_tokens=3", QUESTION, f"!save {file}", "!nothing"]
    status, out, err = run(cli.chat_command, stdin="\n".join([*lines, "!exit", "unread"]))
    assert status == 0 and "Paris" in out.splitlines()[0]
    assert "!clear" in err and "no command 'nothing'" in err
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2
    assert saved[1]["content"] == out.splitlines()[0]


def test_chat_clear_save_and_set_report_their_faults(run, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text("mine")
    lines = [
        "!set temperature=-1",
        "!set nonsense=1",
        "!set top_k=x",
        "!set extra=3",
        "!save",
        f"!save {file}",
    ]
    status, _, err = run(cli.chat_command, "--system", "Be kind.", stdin="\n".join(lines))
    assert status == 0 and file.read_text() == "mine"
    for words in ("temperature is -1", "'nonsense'", "'x' is no number", "needs a file name"):
        assert words in err
    assert "File exists" in err


def test_chat_clear_forgets_all_but_the_system_message(run, tmp_path):
    file = tmp_path / "chat.json"
    lines = [QUESTION, "!clear", f"!save {file}"]
    run(cli.chat_command, "--system", "Be kind.", stdin="\n".join(lines))
    assert json.loads(file.read_text()) == [{"role": "system", "content": "Be kind."}]


def test_settings_can_be_taken_back(run):
    lines = ["!set temperature=0.5", "!set top_k=3", "!set temperature=null"]
    err = run(cli.chat_command, stdin="\n".join(lines))[2]
    assert '({"temperature": 0.5, "top_k": 3})' in err and '({"top_k": 3})' in err


def test_a_conversation_that_the_template_refuses_is_not_the_end(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(cli.EMBEDDED_MODEL, folder)
    template = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template + "{{ messages[0].content }}")
    file = tmp_path / "chat.json"
    lines = ["Hello", "again", f"!save {file}"]
    status, _, err = run(cli.chat_command, "--model", str(folder), stdin="\n".join(lines))
    assert status == 0 and "one turn only" in err and len(json.loads(file.read_text())) == 2


def test_a_turn_that_does_not_fit_is_forgotten(run):
    lines = [QUESTION + " please" * 40, QUESTION]
    status, out, err = run(cli.chat_command, "--cache-length", "40", stdin="\n".join(lines))
    assert status == 0 and "leaves none for an answer" in err and "Paris" in out
