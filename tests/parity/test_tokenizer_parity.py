"""Token ids, text and chats against transformers, on folders with a tokenizer.json."""

import json
import os
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from phi3_jax.text.tokenizer import StreamDecoder, Tokenizer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

CHAT_TOKENS = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]

# Phi-3.5's rules in other words: roles joined into tags, eos unless an answer is to follow.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'critic' %}{{ raise_exception('no critics') }}"
    "{% endif %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

TEXTS = [
    "",
    " ",
    "\n",
    "Hello",
    " Hello  World ",
    "a<|end|>b",
    "<|user|>\nHello<|end|>\n<|assistant|>\n",
    "<|endoftext|>\n\n<|end|> \t\x1c\x1d x<|user|>\x85\u3000\u200by",
    "<s></s> <unk>\n<|user|<|user|>",
    "tabs\t\tand\r\nnew\n\n\nlines\x00\x01\x7f",
    "            def f(x):\n                return '<0x0A>'",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\U0001f600\U0001f9d1\u200d\U0001f680\U0001f1f3\U0001f1f4 e\u0301 \u0e01\u0e34 \ufffd",
    "\u2581\u2581x \u2581",
    "1234567890 3.14 2**31",
]

CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "  two\n\nlines \n"}, {"role": "assistant", "content": ""}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "\U0001f600<|end|>\n<b>&'\""},
        {"role": "assistant", "content": " \u4f60"},
        {"role": "user", "content": "x"},
    ],
]


def piece_tokenizer():
    """SentencePiece-like: bytes, letters and a few words, as in the hub's tokenizer.json."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    tokens += sorted(set("Helo Wrdabxytndfw\u4f60" + "\n\t") - {" "})
    merges = [("\u2581", "\u2581"), ("H", "e"), ("l", "l"), ("He", "ll"), ("Hell", "o")]
    merges += [("\u2581", "Hello"), ("\u2581", "a"), ("\u2581\u2581", "\u2581\u2581")]
    tokens += ["".join(merge) for merge in merges]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def byte_level_tokenizer():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


@pytest.fixture(scope="module", params=["pieces", "byte level", "phi-3"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    if request.param == "phi-3":
        source = os.environ.get("PHI3_TOKENIZER_DIR")
        if not source:
            pytest.skip("PHI3_TOKENIZER_DIR names no folder with Phi-3's tokenizer files")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(os.path.join(source, name), folder / name)
    else:
        make = piece_tokenizer if request.param == "pieces" else byte_level_tokenizer
        tokenizer = make()
        tokenizer.add_tokens(
            [
                tokenizers.AddedToken(
                    token, special=True, normalized=False, rstrip=token != "<|endoftext|>"
                )
                for token in CHAT_TOKENS
            ]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["AutoTokenizer", "PreTrainedTokenizerFast"])
def theirs(folder, request):
    return getattr(transformers, request.param).from_pretrained(folder)


def test_lookups(ours, theirs):
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs))
    assert ours.special_ids == set(theirs.all_special_ids) | {
        id for id, token in theirs.added_tokens_decoder.items() if token.special
    }
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    for id in range(len(ours)):
        assert ours.id_to_token(id) == theirs.convert_ids_to_tokens(id)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode(ours, theirs, text):
    for add_special_tokens in (False, True):
        ids = theirs.encode(text, add_special_tokens=add_special_tokens)
        assert ours.encode(text, add_special_tokens=add_special_tokens) == ids
    for skip in (False, True):
        expected = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_decode_of_any_ids(ours, theirs):
    rng = np.random.default_rng(0)
    for length in range(40):
        ids = rng.integers(0, rng.choice([270, len(ours) + 60]), length)
        for skip in (False, True):
            expected = theirs.decode(ids.tolist(), skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
            stream = StreamDecoder(ours, skip_special_tokens=skip)
            assert "".join(map(stream.put, ids)) + stream.flush() == expected


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CHATS)
def test_chats(ours, theirs, messages, add_generation_prompt):
    text = theirs.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert ours.apply_chat_template(messages, add_generation_prompt, tokenize=False) == text
    ids = theirs.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert ours.apply_chat_template(messages, add_generation_prompt) == ids


def test_padding(ours, theirs):
    rows = [ours.encode(text) for text in TEXTS[3:6]]
    theirs.padding_side = "left"
    batch = theirs.pad({"input_ids": rows}, return_tensors="np")
    input_ids, attention_mask = ours.pad(rows)
    assert np.array_equal(input_ids, batch["input_ids"])
    assert np.array_equal(attention_mask, batch["attention_mask"])


def test_flags_of_added_tokens_in_the_config_win(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    user = Tokenizer.from_pretrained(folder).token_to_id("<|user|>")
    entry = {"content": "<|user|>", "lstrip": True, "rstrip": False, "normalized": False}
    entry |= {"single_word": False, "special": True}
    config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), str(user): entry}
    path.write_text(json.dumps(config))
    ours = Tokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("x \n<|user|>\n y<|end|>\n z")
    assert ids == theirs.encode("x \n<|user|>\n y<|end|>\n z")
    assert ids != Tokenizer.from_pretrained(folder).encode("x \n<|user|>\n y<|end|>\n z")


def test_a_post_processor_is_believed_before_add_bos_token(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", end)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for add_bos_token in (False, True):
        config |= {"add_bos_token": add_bos_token, "bos_token": "<|user|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours = Tokenizer.from_pretrained(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ids = theirs.encode("Hello")
        assert ours.encode("Hello") == ids
        assert ids[0] == end
