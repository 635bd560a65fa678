"""Chat templates: a list of messages becomes the text a chat model was trained to continue.

Templates come with a model's folder and are programs by strangers: they run in a sandbox that also
ends their time and memory, see plain JSON data only, and whatever goes wrong inside one is reported
as a ValueError.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from phi3_jax.text.sandbox import Sandbox, limited

# Phi-3's own format, for folders that bring no template: a system message only when it says
# something, and eos_token after a conversation that is not to be continued.
PHI3_TEMPLATE = """\
{% for message in messages if message.role != "system" or message.content %}
{{ "<|" + message.role + "|>\\n" + message.content + "<|end|>\\n" }}
{%- endfor %}
{{ "<|assistant|>\\n" if add_generation_prompt else eos_token }}
"""

PHI3_CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

_ROLES = ("system", "user", "assistant")


def load_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template a folder brings: chat_template.jinja, else tokenizer_config["chat_template"].

    The latter is a string, or a list of {"name", "template"} of which "default" is taken.
    Returns None where there is neither.

    Raises:
      ValueError: where the config has a template of another form.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {e.get("name"): e.get("template") for e in template if isinstance(e, Mapping)}
        if "default" not in named:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} has chat templates {sorted(map(str, named))} "
                "but none named 'default'; name one so, or put it into chat_template.jinja"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"chat_template in {folder / 'tokenizer_config.json'} is a {type(template).__name__}; "
            "it must be a string or a list of {name, template}"
        )
    return template


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation.

    Args:
      messages: dicts with "role" and "content"; further keys reach the template as they are.
      template: a jinja2 template, or None for Phi-3's own format. Roles are system, user and
        assistant, and with a folder's template also tool.
      special_tokens: what the template may name, such as {"eos_token": "<|endoftext|>"}.
      add_generation_prompt: whether to end with the opening of the assistant's answer.

    Raises:
      ValueError: for a message that is none, with its index; with the template's own words where
        the template raises or fails; and where it does not end (sandbox.MAX_SECONDS,
        sandbox.MAX_CHARACTERS).
    """
    plain = _plain_messages(messages, _ROLES if template is None else (*_ROLES, "tool"))
    try:
        return limited(
            _render,
            PHI3_TEMPLATE if template is None else template,
            messages=plain,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **special_tokens,
        )
    # A template may fail as any program does (None + "x", 1 / 0, too large a range): all of it is
    # the fault of the template or of what it was given.
    except Exception as error:
        raise ValueError(
            f"the chat template failed: {str(error) or type(error).__name__}"
        ) from error


def _plain_messages(messages: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> list[dict]:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(
            f"messages must be a list of at least one {{'role', 'content'}} dict, got {messages!r}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"message {index} is a {type(message).__name__}; "
                "a message is a dict with 'role' and 'content'"
            )
        role, content = message.get("role"), message.get("content")
        if role not in roles:
            raise ValueError(
                f"message {index} has the role {role!r}; the roles that work are {', '.join(roles)}"
            )
        if not isinstance(content, str):
            raise ValueError(
                f"message {index} (role {role!r}) has a content of type {type(content).__name__}; "
                "it must be a string"
            )
    try:
        # Through JSON, so that no object with methods of its own gets into the sandbox.
        return json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages must be plain JSON data: {error}") from error


def _render(template: str, **values: Any) -> str:
    return _compile(template).render(**values)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.add_filter("tojson", _tojson)
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(template, globals=functions)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
