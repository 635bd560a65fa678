"""Which tokens of a record are learnt: the answers and what ends them, whatever the template."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

import phi3_jax as phi3
from train.examples import make_example

DEMO = Path(phi3.__file__).parent / "tiny_demo"

PHI4_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' "
    "+ message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5."},
    {"role": "user", "content": "And 1 + 1?"},
    {"role": "assistant", "content": "1 + 1 = 2."},
]


@pytest.fixture(scope="module")
def demo():
    return phi3.Tokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def phi4(tmp_path_factory):
    """A small byte-level vocabulary with phi-4's format, in which no token takes white space."""
    folder = tmp_path_factory.mktemp("phi4")
    vocabulary = tokenizers.Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    vocabulary.train_from_iterator([message["content"] for message in CHAT], trainer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
    vocabulary.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    vocabulary.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config["chat_template"] = PHI4_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return phi3.Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def real():
    folder = os.environ.get("PHI3_TOKENIZER_DIR")
    if not folder:
        pytest.skip("PHI3_TOKENIZER_DIR names no folder with Phi-3's tokenizer files")
    return phi3.Tokenizer.from_pretrained(folder)


def learnt_texts(example, tokenizer):
    """The text of each stretch that is learnt."""
    cuts = np.flatnonzero(np.diff(example.learnt)) + 1
    runs = zip(np.split(example.ids, cuts), np.split(example.learnt, cuts), strict=True)
    return [tokenizer.decode(ids) for ids, learnt in runs if learnt[0]]


@pytest.mark.parametrize("name", ["demo", "real"])
def test_answers_are_learnt_with_what_ends_them(request, name):
    """A trailing <|endoftext|> is a label, although padding has the same id (trap 31)."""
    tokenizer = request.getfixturevalue(name)
    example = make_example({"messages": CHAT, "id": 7, "text": None}, tokenizer, True)
    assert example.ids.tolist() == tokenizer.apply_chat_template(CHAT)
    assert (example.ids.dtype, example.learnt.dtype) == (np.int32, bool)
    assert learnt_texts(example, tokenizer) == [
        "2 + 3 = 5.<|end|>",
        "1 + 1 = 2.<|end|><|endoftext|>",
    ]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == example.ids[-1]
    assert example.learnt[-1]


def test_templates_of_other_models_do(phi4):
    example = make_example({"messages": CHAT}, phi4, True)
    assert learnt_texts(example, phi4) == ["2 + 3 = 5.<|im_end|>", "1 + 1 = 2.<|im_end|>"]


def test_a_trailing_question_is_not_learnt(demo):
    example = make_example({"messages": CHAT[:4]}, demo, True)
    assert learnt_texts(example, demo) == ["2 + 3 = 5.<|end|>"]


def test_two_answers_in_a_row_are_two_turns(demo):
    messages = [*CHAT[1:3], {"role": "assistant", "content": "Is it not?"}]
    example = make_example({"messages": messages}, demo, True)
    assert learnt_texts(example, demo) == ["2 + 3 = 5.<|end|>", "Is it not?<|end|><|endoftext|>"]


def test_prompt_and_completion_are_two_messages(demo):
    record = {"prompt": "What is 2 + 3?", "completion": "2 + 3 = 5."}
    found, expected = (
        make_example(r, demo, True) for r in (record, {"messages": CHAT[1:3], "prompt": "other"})
    )
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.learnt, expected.learnt)


def test_without_mask_all_is_learnt(demo):
    assert make_example({"messages": CHAT}, demo, False).learnt.all()


@pytest.mark.parametrize("text", ["Oslo is the capital.", "Oslo is the capital.<|endoftext|>"])
def test_text_ends_with_one_eos(demo, text):
    example = make_example({"text": text, "completion": "x"}, demo, True)
    assert demo.decode(example.ids) == "Oslo is the capital.<|endoftext|>"
    assert example.learnt.all()


SPECIAL = ["<|end|>", "<|user|>", "<|endoftext|>", "<|im_end|>", "<|assistant|>\n"]
contents = st.lists(
    st.sampled_from(
        [*SPECIAL, "a", "5 ", " ", "\n", "\u2003", "= 5.", "\u00e9", "capital", "</s>"]
    ),
    min_size=1,
    max_size=6,
).map("".join)
chats = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]), "content": contents.filter(str.strip)}
    ),
    min_size=1,
    max_size=5,
).map(lambda messages: [CHAT[1], *messages, CHAT[2]])


@settings(deadline=None, max_examples=150)
@given(messages=chats)
def test_tokens_are_those_of_each_beginning(demo, phi4, messages):
    """Whatever is written in messages, also where white space belongs to the token before it."""
    for tokenizer in (demo, phi4):
        whole = tokenizer.apply_chat_template(messages)
        learnt = np.zeros(len(whole), bool)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                opening = tokenizer.apply_chat_template(messages[:turn], True)
                closed = tokenizer.apply_chat_template(messages[: turn + 1])
                same = [a == b for a, b in zip(closed, whole, strict=False)] + [False]
                learnt[len(opening) : same.index(False)] = True
        example = make_example({"messages": messages}, tokenizer, True)
        assert example.ids.tolist() == whole
        assert np.array_equal(example.learnt, learnt)


def with_template(tokenizer, template):
    """The same vocabulary with another chat template."""
    other = object.__new__(phi3.Tokenizer)
    vars(other).update(vars(tokenizer), chat_template=template)
    return other


@pytest.mark.parametrize(
    "template",
    [
        # It says how many messages there are,
        "{{ messages|length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}",
        # opens no answer,
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{{ '<|user|>' if add_generation_prompt }}",
        # or shortens answers that are not the last.
        "{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content if loop.last or m.role == 'user' else m.content[:3] }}<|end|>{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}",
    ],
)
def test_a_template_that_rewrites_is_refused(demo, template):
    tokenizer = with_template(demo, template)
    with pytest.raises(ValueError, match=r"message [24] otherwise .*data\.mask_prompt=false"):
        make_example({"messages": CHAT}, tokenizer, True)
    assert make_example({"messages": CHAT}, tokenizer, False).learnt.all()


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, r"has the keys \(none\); it must have one of messages, prompt/completion, or text"),
        ({"prompt": "a", "answer": "b"}, "has the keys prompt, answer; it must"),
        ({"text": "a", "messages": []}, "has messages and text; it must"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "has prompt/completion and text; it"),
        ({"messages": CHAT, "tools": [{}]}, "has tools, which are not supported"),
        ({"text": 5}, "text is 5, must be a string"),
        ({"text": ""}, "text is '', must be a string that is not empty"),
        ({"text": "half \ud800"}, "half of a surrogate pair"),
        ({"text": "<|endoftext|>"}, r"nothing to learn in its 1 token\(s\)"),
        ({"prompt": 5, "completion": "a"}, r"message 0 \(role 'user'\) has a content of type int"),
        ({"messages": []}, "at least one"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": ["hello"]}, "message 0 is a str"),
        (chat(("user", "a"), ("bot", "b")), "message 1 has the role 'bot'"),
        (chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "message 1 is of a tool"),
        (chat(("user", "a"), ("assistant", None)), "message 1 .* content of type NoneType"),
        (chat(("user", "a"), ("assistant", " \n")), r"message 1 \(role 'assistant'\) is empty"),
        (chat(("user", ""), ("assistant", "a")), r"message 0 \(role 'user'\) is empty"),
        (chat(("system", "a"), ("user", "b")), "must have a message of the assistant"),
        (chat(("system", "a"), ("assistant", "b"), ("user", "c")), "begins with the assistant"),
    ],
)
def test_what_cannot_be_learnt_is_refused(demo, record, message):
    with pytest.raises(ValueError, match=message):
        make_example(record, demo, True)


def test_an_empty_system_message_is_left_to_the_template(demo):
    tokenizer = with_template(demo, None)
    empty = {"messages": [{"role": "system", "content": ""}, *CHAT[1:3]]}
    without = make_example({"messages": CHAT[1:3]}, tokenizer, True)
    assert np.array_equal(make_example(empty, tokenizer, True).ids, without.ids)
