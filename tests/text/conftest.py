"""Small tokenizers made on the spot, and the real one where the environment names its folder."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from phi3_jax.text.tokenizer import Tokenizer

CORPUS = [
    "the capital of Norway is Oslo, and that of Peru is Lima.",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))",
    "caf\u00e9 na\u00efve \u00fcber Stra\u00dfe \u017c\u00f3\u0142\u0107",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f",
    "one  two   three    four        eight",
]

ADDED = {  # content: (lstrip, rstrip, normalized, special)
    "<unk>": (False, False, False, True),
    "<s>": (False, False, False, True),
    "</s>": (False, True, False, False),
    "<|endoftext|>": (False, False, False, True),
    "<|assistant|>": (False, True, False, True),
    "<|system|>": (False, True, False, True),
    "<|end|>": (False, True, False, True),
    "<|user|>": (False, True, False, True),
    "<left>": (True, False, False, True),
    "<both>": (True, True, False, False),
    "<|end|>ing": (False, False, False, False),
    "<norm>": (False, True, True, False),
    "two words": (False, False, True, False),
}
FLAGS = ("lstrip", "rstrip", "normalized", "special")


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="session")
def toy_folders(tmp_path_factory):
    """(folder with tokenizer.model, folder with the tokenizer.json of the same vocabulary)."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=proto,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    vocab = {sp.id_to_piece(id): id for id in range(sp.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and vocab[piece] > 258
    ]
    ids = {}
    for content in ADDED:
        ids[content] = vocab.get(content, len(vocab) + len([c for c in ids if c not in vocab]))

    like_the_hubs = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True)
    )
    like_the_hubs.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    like_the_hubs.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    like_the_hubs.add_tokens(
        [
            tokenizers.AddedToken(content, **dict(zip(FLAGS, flags, strict=True)))
            for content, flags in ADDED.items()
        ]
    )
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(ids[content]): {"content": content, **dict(zip(FLAGS, flags, strict=True))}
            for content, flags in ADDED.items()
        },
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
    }
    folders = tmp_path_factory.mktemp("toy")
    for name in ("model", "json"):
        (folders / name).mkdir()
        write_json(folders / name / "tokenizer_config.json", config)
    (folders / "model" / "tokenizer.model").write_bytes(proto.getvalue())
    like_the_hubs.save(str(folders / "json" / "tokenizer.json"))
    return folders / "model", folders / "json"


@pytest.fixture(scope="session")
def toys(toy_folders):
    return tuple(map(Tokenizer.from_pretrained, toy_folders))


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory):
    """A small tokenizer of the kind that phi-4 has."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken("<|endoftext|>", special=True, normalized=False),
            tokenizers.AddedToken("<|im_start|>", special=True, normalized=False, rstrip=True),
            tokenizers.AddedToken("<|a b \u20ac|>", special=False, normalized=False, lstrip=True),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}},
    )
    return folder


@pytest.fixture(scope="session")
def byte_level(byte_level_folder):
    return Tokenizer.from_pretrained(byte_level_folder)


@pytest.fixture(scope="session")
def real_folders(tmp_path_factory):
    """Phi-3's own vocabulary in its two forms; it is not ours to ship."""
    source = os.environ.get("PHI3_TOKENIZER_DIR")
    if not source:
        pytest.skip("PHI3_TOKENIZER_DIR names no folder with Phi-3's tokenizer files")
    folder = tmp_path_factory.mktemp("real")
    for path in Path(source).iterdir():
        if path.name != "tokenizer.json":
            shutil.copy(path, folder)
    return folder, Path(source)


@pytest.fixture(scope="session")
def reals(real_folders):
    return tuple(map(Tokenizer.from_pretrained, real_folders))
