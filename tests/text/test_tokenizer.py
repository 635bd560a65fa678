import functools
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi3_jax.text.tokenizer import StreamDecoder

MESSAGES = [{"role": "user", "content": "Hello"}]

SPECIAL = ["<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
# Added tokens and what else tokenizers trip over, between ordinary characters.
SCRAPS = st.sampled_from(
    [*SPECIAL, "</s>", "<left>", "<both>", "<|end|>ing", "<norm>", "two words", "<|user|"]
    + [" ", "  ", "     ", "\n", "\r\n", "\t", "\u2581", "<0x41>", "a"]
    + ["\0", "\x1c", "\x1f", "\x7f", "\x85", "\xa0", "\u200b", "\u2003", "\u2028", "\u3000"]
    + ["\ufeff", "\ufffd", "e\u0301", "\U0001f600", "\U0001f9d1\u200d\U0001f680", "\u4f60\u597d"]
    + ["the capital", "1234", "\u0627\u0644", "\u0e01\u0e34"]
)
TEXTS = st.lists(st.one_of(SCRAPS, st.text(max_size=4)), max_size=12).map("".join)
PROPERTY = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@functools.cache
def reference(folder):
    """The `tokenizers` library itself on a folder's tokenizer.json."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@PROPERTY
@given(text=TEXTS)
def test_both_back_ends_agree(toys, text):
    from_model, from_json = toys
    ids = from_json.encode(text)
    assert from_model.encode(text) == ids
    assert from_model.decode(ids) == from_json.decode(ids)


@PROPERTY
@given(text=TEXTS)
def test_both_back_ends_agree_on_the_real_vocabulary(reals, text):
    from_model, from_json = reals
    ids = from_json.encode(text)
    assert from_model.encode(text) == ids
    assert from_model.decode(ids) == from_json.decode(ids)


def check_decoding(tokenizer, reference, data):
    """decode() is the reference's; streaming gives the same and never half a character."""
    most = len(tokenizer) + 3
    byte_ids = [id for id in range(most) if (tokenizer.id_to_token(id) or "").startswith("<0x")]
    id_lists = st.lists(
        st.one_of(
            st.integers(0, most),
            st.sampled_from(byte_ids or [0]),
            st.sampled_from(sorted(tokenizer.special_ids)),
        ),
        max_size=20,
    )
    ids = data.draw(st.one_of(id_lists, TEXTS.map(tokenizer.encode)))
    # How a normalized added token is spelled has changed between versions of `tokenizers`.
    ids = [id for id in ids if tokenizer.id_to_token(id) not in ("<norm>", "two words")]
    skip = data.draw(st.booleans())
    expected = reference.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    said = ""
    for id in ids:
        said += stream.put(id)
        assert expected.startswith(said)
    assert said + stream.flush() == expected


@PROPERTY
@given(data=st.data())
def test_decode_and_stream_of_pieces(toys, toy_folders, data):
    check_decoding(toys[0], reference(toy_folders[1]), data)


@PROPERTY
@given(data=st.data())
def test_decode_and_stream_of_byte_level_tokens(byte_level, byte_level_folder, data):
    check_decoding(byte_level, reference(byte_level_folder), data)


@settings(PROPERTY, max_examples=30)
@given(data=st.data())
def test_decode_and_stream_of_the_real_vocabulary(reals, real_folders, data):
    check_decoding(reals[0], reference(real_folders[1]), data)


# The ids of Phi-3: rstrip eats the newlines of the chat format, and every stretch of text after a
# special token begins with the dummy prefix (15043 is U+2581 Hello, 10994 would be Hello).
PHI3_IDS = {
    "": [],
    "Hello": [15043],
    " Hello": [29871, 15043],
    "\n": [29871, 13],
    "a<|end|>b": [263, 32007, 289],
    "<|user|>\nHello<|end|>\n<|assistant|>\n": [32010, 15043, 32007, 32001],
    "<|user|>\nHello!<|end|>\n<|endoftext|>\n": [32010, 15043, 29991, 32007, 32000, 29871, 13],
    "</s> \n<s> x": [2, 1, 29871, 921],
}


@pytest.mark.parametrize("text", PHI3_IDS)
def test_ids_of_phi3(reals, text):
    for tokenizer in reals:
        assert tokenizer.encode(text) == PHI3_IDS[text]


def test_phi3_has_fewer_tokens_than_its_embedding_has_rows(reals):
    for tokenizer in reals:
        assert (tokenizer.vocab_size, len(tokenizer)) == (32000, 32011)
        assert tokenizer.decode([15043, *range(32011, 32064), 3186]) == "Hello world"
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == 32000
        assert (tokenizer.bos_token_id, tokenizer.unk_token_id) == (1, 0)
        assert tokenizer.special_ids == {0, 1, *range(32000, 32011)}
        chat = [*MESSAGES, {"role": "assistant", "content": "Hello!"}]
        ids = [32010, 15043, 32007, 32001, 15043, 29991, 32007]
        assert tokenizer.apply_chat_template(chat) == [*ids, 32000]
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True) == [*ids, 32001]


def test_lookups(toys):
    for tokenizer in toys:
        user = tokenizer.token_to_id("<|user|>")
        assert tokenizer.id_to_token(user) == "<|user|>"
        assert tokenizer.token_to_id("<|nobody|>") is None
        assert tokenizer.id_to_token(len(tokenizer)) is None
        assert tokenizer.vocab_size == 420
        assert len(tokenizer) == 430
        assert {tokenizer.id_to_token(id) for id in tokenizer.special_ids} == {*SPECIAL, "<left>"}


def test_decode_takes_rows_of_any_integers(toys):
    tokenizer = toys[0]
    ids = tokenizer.encode("the capital")
    for row in (ids, tuple(ids), np.array(ids), np.array(ids, np.int32), np.array(ids, np.uint16)):
        assert tokenizer.decode(row) == "the capital"
    assert tokenizer.decode(ids[0]) == tokenizer.decode(ids[:1])
    assert tokenizer.decode([]) == tokenizer.decode(np.zeros(0)) == ""
    assert tokenizer.decode([-1, -100, 10**6, 2**40, *ids]) == "the capital"


def test_decode_refuses_what_is_no_row_of_ids(toys):
    for ids in ([[1, 2]], [1.0], np.zeros((1, 0), int), "abc", [None]):
        with pytest.raises(ValueError, match="one row of integer ids"):
            toys[0].decode(ids)


def test_encode_refuses_what_is_no_text(toys):
    for tokenizer in toys:
        with pytest.raises(ValueError, match=r"text\[2\] is '\\ud83d'"):
            tokenizer.encode("ab\ud83d")
        with pytest.raises(ValueError, match="text is a list, must be one string"):
            tokenizer.encode(["ab"])


def test_pad(toys):
    tokenizer = toys[0]
    pad = tokenizer.pad_token_id
    input_ids, attention_mask = tokenizer.pad([[5, 6], [7, 8, 9], [4]])
    assert input_ids.dtype == attention_mask.dtype == np.int32
    assert input_ids.tolist() == [[pad, 5, 6], [7, 8, 9], [pad, pad, 4]]
    assert attention_mask.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match="no rows"):
        tokenizer.pad([])


def test_stream_holds_a_character_until_it_is_whole(toys, byte_level):
    for tokenizer in (*toys, byte_level):
        ids = tokenizer.encode(" a\U0001f600\u20acb")
        stream = StreamDecoder(tokenizer)
        pieces = [*map(stream.put, ids), stream.flush()]
        assert "".join(pieces) == " a\U0001f600\u20acb"
        assert "" in pieces[1:-1]
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_come_out_in_their_place(toys):
    tokenizer = toys[0]
    start, a = tokenizer.token_to_id("<0xF0>"), tokenizer.token_to_id("a")
    stream = StreamDecoder(tokenizer)
    assert [stream.put(id) for id in (a, start, start, a, start)] == [
        "a",
        "",
        "",
        "\ufffd\ufffda",
        "",
    ]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_stream_leaves_special_tokens_out_unless_told(toys):
    tokenizer = toys[0]
    ids = np.array(tokenizer.encode("<|user|>\nthe<|end|><both>"))
    for skip, text in ((True, "the<both>"), (False, "<|user|> the<|end|><both>")):
        stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
        assert "".join(map(stream.put, ids)) + stream.flush() == text
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text


def test_byte_level_folder(byte_level, byte_level_folder):
    tokenizer = byte_level
    text = "<|im_start|>\n\U0001f600 na\u00efve  \x00 <|a b \u20ac|>x"
    ids = tokenizer.encode(text)
    assert ids == reference(byte_level_folder).encode(text).ids
    assert tokenizer.decode(ids) == "<|im_start|>\U0001f600 na\u00efve  \x00<|a b \u20ac|>x"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 330
    assert tokenizer.bos_token_id is None
    assert tokenizer.special_ids == {330, 331}


def test_chat_in_phi3s_own_format(toys):
    for tokenizer in toys:
        assert tokenizer.chat_template is None
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        assert text == "<|user|>\nHello<|end|>\n<|endoftext|>"
        text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
        assert text == "<|user|>\nHello<|end|>\n<|assistant|>\n"
        ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
        assert ids == tokenizer.encode(text)
        assert ids[-1] == tokenizer.token_to_id("<|assistant|>")


def test_phi3s_format_needs_its_tokens(byte_level):
    with pytest.raises(ValueError, match=r"lacks tokens of Phi-3's.*chat_template\.jinja"):
        byte_level.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "text", ["a caf\u00e9 \u4f60\u597d\n\n  x", "<|user|>two words <0x41>", ""]
)
def test_bytes_of_tokens_are_the_texts(toys, byte_level, text):
    for tokenizer in (*toys, byte_level):
        words, ids = tokenizer.token_bytes(len(tokenizer) + 3), tokenizer.encode(text)
        joined = b"".join(words[id] for id in ids).decode()
        dropped = min(tokenizer.leading_spaces, len(joined) - len(joined.lstrip(" ")))
        assert tokenizer.decode(ids) == joined[dropped:]
        assert words[-3:] == (b"", b"", b"") and len(words) == len(tokenizer) + 3
        assert words is tokenizer.token_bytes(len(tokenizer) + 3)
        assert tokenizer.token_bytes(5) == words[:5]
    assert [tokenizer.leading_spaces for tokenizer in (*toys, byte_level)] == [1, 1, 0]


def test_import_is_light():
    code = (
        "import sys, phi3_jax.text.tokenizer as t; "
        "print([m for m in ('jax', 'tokenizers', 'sentencepiece', 'torch', 'transformers') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
