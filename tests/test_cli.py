"""phi3-generate and phi3-chat on the embedded model."""

import io
import json
import shutil
import sys

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from phi3_jax import chat_cli, cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command and returns exit status, stdout and stderr."""

    def call(entry, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["phi3", *arguments])
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.StringIO(stdin))
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
    parts = ["start", "load", "compile", "prefill 10 tokens", "decode 10 tokens", "peak memory"]
    stats = err.splitlines()[-1].split(" | ")
    assert [part[: len(name)] for part, name in zip(stats, parts, strict=True)] == parts
    assert all(stats[place].endswith(" tokens/s") for place in (3, 4))


def test_chat_tells_of_each_answer(run):
    status, _, err = run(chat_cli.chat_command, "--stats", stdin=f"{QUESTION}\n!clear\n{QUESTION}")
    stats = [line.split(" | ") for line in err.splitlines() if "start" in line]
    assert status == 0 and len(stats) == 2
    assert stats[0][:2] == stats[1][:2] and stats[1][2] == "compile 0.00 s"


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


@pytest.fixture
def asked(monkeypatch):
    """What reaches a TextGenerator that says nothing: (messages, seed, settings) of each call."""
    calls = []

    class Silent:
        model = "model"

        def encode(self, messages):
            return [1, 2]

        def stream(self, messages, seed, **settings):
            calls.append((messages, seed, settings))
            yield ""

    for module in (cli, chat_cli):
        monkeypatch.setattr(module, "load_generator", lambda *arguments: Silent())
    monkeypatch.setattr(cli, "load_model", lambda model, dtype: (model, f"{model}/{dtype}", "p"))
    return calls


SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2}


def as_options(settings):
    return [word for name, value in settings.items()
            for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


def test_options_are_settings_of_generation(run, asked, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "integer"}')
    common = {"max_new_tokens": 7, "num_beams": 4, "max_time": 2.5, **SAMPLING}
    more = ["--stop", "a b", "--stop", "c", "--kv-bits", "8", "--seed", "9"]
    assert run(cli.generate_command, "hi", *as_options(common), *more, "--system", "s")[0] == 0
    ((messages, seed, settings),) = asked
    assert [message["content"] for message in messages] == ["s", "hi"] and seed == 9
    assert settings == {
        **common,
        "stop_strings": ["a b", "c"],
        "cache_implementation": "quantized",
    }
    assert run(cli.generate_command, "hi")[0] == 0 and asked[1][2] == {}
    assert run(chat_cli.chat_command, *as_options(SAMPLING), stdin="hi")[0] == 0
    assert asked[2][2] == SAMPLING
    draft = ["--draft-model", "small", "--num-draft-tokens", "5", "--dtype", "float32"]
    assert run(cli.generate_command, "hi", "--num-beams", "1", *draft)[0] == 0
    wanted = {"assistant": ("small/float32", "p"), "num_assistant_tokens": 5, "num_beams": 1}
    assert asked[3][2] == wanted
    assert run(cli.generate_command, "hi", "--prompt-lookup-num-tokens", "6")[0] == 0
    assert asked[4][2] == {"prompt_lookup_num_tokens": 6}


DRAFT, LOOKUP = ["--draft-model", "m"], ["--prompt-lookup-num-tokens", "3"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--kv-bits", "4"], "--kv-bits is 4, must be 8"),
        (["--num-draft-tokens", "3"], "give --draft-model too"),
        ([*DRAFT, *LOOKUP], "--draft-model and --prompt-lookup-num-tokens do not"),
        ([*LOOKUP, "--json-schema", "f"], "--prompt-lookup-num-tokens and --json-schema do not"),
        ([*DRAFT, "--num-beams", "2"], "--draft-model and --num-beams do not"),
        (["--prompt-cache-file", "no/such/file"], "'no/such/file' is in a folder that does not"),
        (["--prompt-cache-file", "."], "'.' is a directory"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--num-beams", "3", "--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_faults_are_said_before_a_model_is_loaded(run, monkeypatch, options, words):
    monkeypatch.setattr(cli, "load_generator", lambda *_: pytest.fail("loaded"))
    status, out, err = run(cli.generate_command, "hi", *options)
    assert status == 1 and not out and words in err


def test_answers_follow_a_schema(run, tmp_path):
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}}
    schema.write_text(json.dumps({**city, "required": ["city"], "additionalProperties": False}))
    status, out, _ = run(cli.generate_command, QUESTION, "--json-schema", str(schema))
    assert status == 0 and json.loads(out)["city"] in ("Paris", "Oslo")
    schema.write_text('{"type": "town"}')
    status, out, err = run(cli.generate_command, QUESTION, "--json-schema", str(schema))
    assert status == 1 and not out and f"{schema}: the grammar is not valid" in err


def test_a_prompt_is_kept_in_a_file(run, tmp_path):
    arguments = [QUESTION, "--prompt-cache-file", str(tmp_path / "cache")]
    first = run(cli.generate_command, *arguments)
    written = (tmp_path / "cache").stat().st_mtime_ns
    assert "Paris" in first[1] and run(cli.generate_command, *arguments)[1] == first[1]
    assert (tmp_path / "cache").stat().st_mtime_ns == written
    status, _, err = run(cli.generate_command, *arguments, "--kv-bits", "8")
    assert status == 1 and "cache has keys and values that are not in 8 bits" in err
    arguments[-1] += "-8"
    for _ in range(2):
        assert run(cli.generate_command, *arguments, "--kv-bits", "8")[1] == first[1]
    with safe_open(arguments[-1], framework="np") as file:
        assert file.metadata()["quantized"] == "true"


def test_a_prompt_that_another_model_kept_is_refused(run, tmp_path):
    """Of the same config: only the weights, here of the last norm, are others."""
    other, kept = tmp_path / "other", ["--prompt-cache-file", str(tmp_path / "kept")]
    shutil.copytree(cli.EMBEDDED_MODEL, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][::-1].copy()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert run(cli.generate_command, QUESTION, *kept)[0] == 0
    status, out, err = run(cli.generate_command, QUESTION, *kept, "--model", str(other))
    assert status == 1 and not out and "kept' was made with other weights; make it again" in err


def test_a_kept_prompt_of_no_use_leaves_the_kind_of_cache_asked_for(tmp_path):
    generator = cli.load_generator(None, "auto", None)
    asked = [{"role": "user", "content": "hi"}]
    kind = {"cache_implementation": "quantized"}
    for messages, names in (
        (asked, ["cache"]),
        (asked, ["cache"]),
        ([{"role": "system", "content": "s"}, *asked], ["cache_implementation"]),
    ):
        settings = cli.prompt_cache_settings(tmp_path / "kept", generator, messages, kind)
        assert list(settings) == names


def test_what_beams_took_is_said_together(run, asked):
    assert "s together" in run(cli.generate_command, QUESTION, "--num-beams", "2", "--stats")[2]
    assert "s together" not in run(cli.generate_command, QUESTION, "--stats")[2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["hi", "--json-schema", "no/such-file"], "no/such-file"),
        (["hi", "--model", "no/such-folder-here-at-all/x"], "no/such-folder"),
        (["hi", "--model", ""], "the name of the model folder is empty"),
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


def test_help_says_where_compiled_programs_are(run):
    for entry in (cli.generate_command, chat_cli.chat_command):
        status, out, _ = run(entry, "--help")
        assert status == 0 and "JAX_ENABLE_COMPILATION_CACHE=false" in out


def test_a_closed_input_is_an_empty_one(run, monkeypatch):
    for module in (cli, chat_cli):
        monkeypatch.setattr(module, "load_generator", lambda *_: None)
    for entry, arguments, status in (
        (cli.generate_command, ["-"], 1),
        (chat_cli.chat_command, [], 0),
    ):
        found, out, err = run(entry, *arguments, stdin=None)
        assert found == status and not out
    assert "> " in err


def test_unknown_options_are_usage_errors(run):
    assert run(cli.generate_command, "hi", "--nonsense")[0] == 2


def test_chat_keeps_history_and_obeys(run, tmp_path):
    file = tmp_path / "chat.json"
    lines = ["!help", QUESTION, "/set max_new_tokens=3", QUESTION, f"!save {file}", "!nothing"]
    status, out, err = run(chat_cli.chat_command, stdin="\n".join([*lines, "!exit", "unread"]))
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
        f"!set top_p={'[' * 100_000}",
        "!set top_k",
        "!set extra=3",
        "!save",
        f"!save {file}",
    ]
    status, _, err = run(chat_cli.chat_command, "--system", "Be kind.", stdin="\n".join(lines))
    assert status == 0 and file.read_text() == "mine"
    values = ("temperature is -1", "'nonsense'", "'x' must be a number", "[[' must be a number")
    for words in (*values, "!set needs NAME=VALUE", "!save needs a file name"):
        assert words in err
    assert "File exists" in err


def test_chat_clear_forgets_all_but_the_system_message(run, tmp_path):
    file = tmp_path / "chat.json"
    lines = [QUESTION, "!clear", f"!save {file}"]
    run(chat_cli.chat_command, "--system", "Be kind.", stdin="\n".join(lines))
    assert json.loads(file.read_text()) == [{"role": "system", "content": "Be kind."}]


def test_settings_can_be_taken_back(run):
    lines = ["!set temperature=0.5", "!set top_k=3", "!set temperature=null"]
    err = run(chat_cli.chat_command, stdin="\n".join(lines))[2]
    assert '({"temperature": 0.5, "top_k": 3})' in err and '({"top_k": 3})' in err


def test_a_conversation_that_the_template_refuses_is_not_the_end(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(cli.EMBEDDED_MODEL, folder)
    template = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template + "{{ messages[0].content }}")
    file = tmp_path / "chat.json"
    lines = ["Hello", "again", f"!save {file}"]
    status, _, err = run(chat_cli.chat_command, "--model", str(folder), stdin="\n".join(lines))
    assert status == 0 and "one turn only" in err and len(json.loads(file.read_text())) == 2


def test_a_turn_that_does_not_fit_is_forgotten(run):
    lines = [QUESTION + " please" * 40, QUESTION]
    status, out, err = run(chat_cli.chat_command, "--cache-length", "40", stdin="\n".join(lines))
    assert status == 0 and "leaves none for an answer" in err and "Paris" in out
