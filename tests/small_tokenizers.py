"""Small tokenizers of the two kinds that models of the Phi-3 family have, as tokenizer.json."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = (
    "The capital of Norway is Oslo, and that of Peru is Lima.",
    "def f(x):\nreturn x + 1\n\nprint(f(41))",
    "caf\u00e9 na\u00efve stop\u00fcber, stopping; \u017c\u00f3\u0142\u0107\n",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f world",
    '\U0001f600 smile\U0001f9d1\u200d\U0001f680\u4f60! {"a": [1, 2]}',
)
INDENTED = "if x:\n    y = [1,\n         2]\n  z"

SPECIAL = ("<|endoftext|>", "<|user|>", "<|end|>")

KINDS = ("pieces", "byte level")


def save_tokenizer(folder: Path, kind: str) -> Path:
    """Writes tokenizer.json and what belongs to it into a folder, and returns it."""
    tokenizer = _pieces() if kind == "pieces" else _byte_level()
    tokenizer.add_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    return folder


def _pieces() -> tokenizers.Tokenizer:
    # As SentencePiece has it: a line break and rare characters only as bytes.
    words = 'The capital of stop stopping return print Oslo world {" ": ()'.split(" ")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    tokens += [char for char in sorted(set("".join(TEXTS)) - set(" \n\U0001f600\u017c\u4f60"))]
    merges = []
    for word in ("\u2581" + word for word in words):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                merges.append((word[: end - 1], word[end - 1]))
                tokens.append(word[:end])
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def _byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [*TEXTS[:3], INDENTED],
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer
