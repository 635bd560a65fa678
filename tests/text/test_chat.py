import datetime
import json

import pytest

from phi3_jax.text.chat import load_chat_template, render_chat

TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi\nthere "}
LOOP: list = []
LOOP.append(LOOP)
ASSISTANT = {"role": "assistant", "content": "Hello <b>&"}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_phi3s_own_format():
    text = render_chat([SYSTEM, USER, ASSISTANT, USER], None, TOKENS, add_generation_prompt=True)
    assert text == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi\nthere <|end|>\n"
        "<|assistant|>\nHello <b>&<|end|>\n<|user|>\nHi\nthere <|end|>\n<|assistant|>\n"
    )
    assert render_chat([USER], None, TOKENS) == "<|user|>\nHi\nthere <|end|>\n<|endoftext|>"


def test_an_empty_system_message_says_nothing():
    empty = [{"role": "system", "content": ""}, USER]
    assert render_chat(empty, None, TOKENS) == render_chat([USER], None, TOKENS)
    empty_user = [{"role": "user", "content": ""}]
    assert render_chat(empty_user, None, {}, True) == "<|user|>\n<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "at least one"),
        ("Hi", "at least one.*'Hi'"),
        (USER, "at least one"),
        ([USER, "Hi"], "message 1 is a str"),
        ([USER, {"content": "Hi"}], "message 1 has the role None"),
        ([{"role": "User", "content": "Hi"}], "message 0 .*'User'.* system, user, assistant$"),
        ([USER, {"role": "tool", "content": "4"}], "message 1 .*'tool'.* system, user, assistant$"),
        ([{"role": ["user"], "content": "Hi"}], "message 0 has the role"),
        ([USER, {"role": "assistant"}], r"message 1 \(role 'assistant'\).*NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"message 0 \(role 'user'\).*list"),
        ([{**USER, "image": object()}], "plain JSON"),
        ([{**USER, "image": LOOP}], "plain JSON data: Circular"),
        ([{**USER, "image": nested(100_000)}], "plain JSON data: maximum recursion"),
    ],
)
def test_messages_that_are_none(messages, words):
    with pytest.raises(ValueError, match=words):
        render_chat(messages, None, TOKENS)


def test_a_folders_template_may_know_tools():
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tools | tojson }};{% endfor %}"
    )
    messages = [
        {**SYSTEM, "tools": [{"name": "caf\u00e9 <&>", "n": 1}]},
        {"role": "tool", "content": "4", "tools": None},
    ]
    expected = 'system:Be brief.[{"name": "caf\u00e9 <&>", "n": 1}];tool:4null;'
    assert render_chat(messages, template, {}) == expected
    with pytest.raises(ValueError, match="message 0 .*'critic'.* system, user, assistant, tool$"):
        render_chat([{"role": "critic", "content": "no"}], template, {})


def test_whitespace_and_loops_are_as_templates_expect():
    template = (
        "{% for message in messages %}\n"
        "    {% if message.role == 'assistant' %}\n"
        "        {% break %}\n"
        "    {% endif %}\n"
        "{{ bos_token }}{{ message.content }}\n"
        "{% endfor %}\n"
        "{{ tools is none }} {{ documents is defined }} {{ missing }}\n"
    )
    assert render_chat([USER, ASSISTANT, USER], template, TOKENS) == "<s>Hi\nthere \nTrue True "


def test_functions_of_templates():
    template = "{{ strftime_now('%Y') }}"
    assert abs(int(render_chat([USER], template, {})) - datetime.date.today().year) <= 1
    template = "{{ {'b': 'x', 'a': 1} | tojson(indent=1, sort_keys=True) }}"
    assert render_chat([USER], template, {}) == json.dumps({"a": 1, "b": "x"}, indent=1)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('Only user turns, please') }}", "Only user turns, please$"),
        ("{{ raise_exception('') }}", "TemplateError$"),
        ("{% for %}", "the chat template failed: "),
        ("{{ messages[0].content + none }}", "the chat template failed: "),
        ("{{ messages[7].content.strip() }}", "the chat template failed: "),
        ("{{ 1 // 0 }}", "the chat template failed: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        # What the sandbox is for.
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed"),
        ("{{ raise_exception.__globals__['json'] }}", "failed"),
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "unsafe"),
        ("{{ ('%s' | attr('format')).__self__.x }}", "failed"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% include '/etc/passwd' %}", "failed"),
    ],
)
def test_templates_that_fail(template, words):
    with pytest.raises(ValueError, match=words):
        render_chat([USER], template, {})


def test_messages_are_not_changed_and_objects_stay_outside():
    class Text(str):
        def leak(self):
            return "secret"

    messages = [{"role": "user", "content": Text("Hi"), "n": (1, 2)}]
    assert render_chat(messages, "{{ messages[0].content.leak is defined }}", {}) == "False"
    assert messages == [{"role": "user", "content": "Hi", "n": (1, 2)}]


def test_where_templates_are_found(tmp_path):
    assert load_chat_template(tmp_path, {}) is None
    assert load_chat_template(tmp_path, {"chat_template": None}) is None
    assert load_chat_template(tmp_path, {"chat_template": "config"}) == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert load_chat_template(tmp_path, {"chat_template": named}) == "plain"
    with pytest.raises(ValueError, match=r"\['tool_use'\].*default"):
        load_chat_template(tmp_path, {"chat_template": named[:1]})
    for wrong in (7, {"default": "x"}, [{"name": "default", "template": 7}]):
        with pytest.raises(ValueError, match="chat_template"):
            load_chat_template(tmp_path, {"chat_template": wrong})
    (tmp_path / "chat_template.jinja").write_text("file {{ '\u20ac' }}\n", encoding="utf-8")
    assert load_chat_template(tmp_path, {"chat_template": "config"}) == "file {{ '\u20ac' }}\n"
