"""The vocabulary files of a model folder, and text to ids by them.

tokenizer.json is read through `tokenizers`; tokenizer.model through sentencepiece, which cannot
see added tokens such as <|user|>, so they are cut out of the text here first.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from phi3_jax.json_files import parse_json, read_json_object
from phi3_jax.text.token_text import ByteLevelText, PieceText, token_text_of

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

# What Rust's \s matches, which is what lstrip and rstrip mean in tokenizer.json. str.isspace()
# would also eat the separators 0x1C to 0x1F.
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before the rest is tokenized."""

    id: int
    content: str
    lstrip: bool = False  # also takes the whitespace before it
    rstrip: bool = False
    normalized: bool = False  # is looked for after spaces have become U+2581
    special: bool = False  # left out by skip_special_tokens
    single_word: bool = False  # is not looked for inside words


class _Splitter:
    """Cuts text at its added tokens, the leftmost and longest first."""

    def __init__(self, tokens: Mapping[str, AddedToken]):
        self._tokens = tokens
        contents = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, contents)) or "(?!)")

    def __call__(self, text: str) -> Iterator[str | int]:
        """Yields stretches of text, never empty, and between them ids."""
        end = 0
        for match in self._pattern.finditer(text):
            token = self._tokens[match.group()]
            start, stop = match.span()
            if token.lstrip:
                start = end + len(text[end:start].rstrip(_WHITESPACE))
            while token.rstrip and stop < len(text) and text[stop] in _WHITESPACE:
                stop += 1
            if end < start:
                yield text[end:start]
            yield token.id
            end = stop
        if end < len(text):
            yield text[end:]


class Vocabulary(Protocol):
    """What a vocabulary file gives: its tokens, text to ids, and how tokens become text."""

    vocab: Mapping[str, int]  # without the added tokens
    added: Sequence[Mapping[str, Any]]  # added tokens that the file itself declares, with ids
    named: Mapping[str, str]  # bos_token and its like, where the file itself names them
    adds_special_tokens: bool  # encode(text, True) differs from encode(text, False)
    new_text: Callable[[], PieceText | ByteLevelText]

    def add(self, tokens: Sequence[AddedToken]) -> None:
        """Says which tokens to cut out of a text; called once, before encode()."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...


class SentencePieceVocabulary:
    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        proto = path.read_bytes()
        try:
            self._model = SentencePieceProcessor(model_proto=proto)
            # The same model without its dummy prefix: messages appended to a protobuf are merged
            # into it, and these four bytes say normalizer_spec { add_dummy_prefix: false }.
            self._bare = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError as error:
            raise ValueError(
                f"{path} ({len(proto)} bytes) is no SentencePiece model: {error}. A download that "
                "was cut off or a Git LFS pointer looks like this; fetch the file again"
            ) from error
        self.vocab: Mapping[str, int] = {
            self._model.id_to_piece(id): id for id in range(self._model.get_piece_size())
        }
        self.added: Sequence[Mapping[str, Any]] = ()
        ids = {
            "bos_token": self._model.bos_id(),
            "eos_token": self._model.eos_id(),
            "unk_token": self._model.unk_id(),
        }
        self.named: Mapping[str, str] = {
            name: self._model.id_to_piece(id) for name, id in ids.items() if id >= 0
        }
        self.adds_special_tokens = False
        dummy_prefix = self._model.normalize("a").startswith("\u2581")
        self.new_text: Callable[[], PieceText | ByteLevelText] = functools.partial(
            PieceText, leading_spaces=int(dummy_prefix)
        )

    def add(self, tokens: Sequence[AddedToken]) -> None:
        if single := [token.content for token in tokens if token.single_word]:
            raise ValueError(
                f"the added tokens {single} are single_word, which only a tokenizer.json can have; "
                "this folder has tokenizer.model"
            )
        self._split = _Splitter({t.content: t for t in tokens if not t.normalized})
        self._split_normalized = _Splitter(
            {self._model.normalize(t.content): t for t in tokens if t.normalized}
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = []
        for part in self._split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            # Normalizing puts the dummy prefix before every stretch of text, not the first alone.
            for piece in self._split_normalized(self._model.normalize(part)):
                ids.extend([piece] if isinstance(piece, int) else self._bare.encode(piece))
        return ids


class TokenizersVocabulary:
    def __init__(self, path: Path):
        import tokenizers

        self._path = path
        raw = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
            spec = parse_json(raw)
            self.new_text: Callable[[], PieceText | ByteLevelText] = token_text_of(
                spec.get("decoder")
            )
        except ValueError as error:
            raise ValueError(f"{path} ({len(raw)} bytes): {error}") from error
        # Some files carry the length limits of the run that saved them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab: Mapping[str, int] = self._tokenizer.get_vocab(with_added_tokens=False)
        self.added: Sequence[Mapping[str, Any]] = spec.get("added_tokens") or ()
        self.named: Mapping[str, str] = {}
        self.adds_special_tokens = self._tokenizer.num_special_tokens_to_add(is_pair=False) > 0

    def add(self, tokens: Sequence[AddedToken]) -> None:
        import tokenizers

        flags = ("lstrip", "rstrip", "normalized", "special", "single_word")
        for token in tokens:
            # One that the file declares in the same words is left as it is.
            self._tokenizer.add_tokens(
                [tokenizers.AddedToken(token.content, **{f: getattr(token, f) for f in flags})]
            )
            if (id := self._tokenizer.token_to_id(token.content)) != token.id:
                raise ValueError(
                    f"{self._path}: the added token {token.content!r} should have the id "
                    f"{token.id}, but `tokenizers` numbers it {id}: ids of added tokens must go on "
                    "from the vocabulary's last, each once and without a gap"
                )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Without the texts' offsets, and without holding other threads up, which `encode` does.
        texts = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return texts[0].ids


def read_vocabulary(
    folder: Path, config: Mapping[str, Any]
) -> tuple[Vocabulary, list[AddedToken], dict[str, str]]:
    """The vocabulary of a folder, ready to encode; its added tokens; {"eos_token": its text, ...}.

    Of an added token's flags, those in tokenizer_config.json go before those in tokenizer.json,
    and these before added_tokens.json; a token that is named, or special anywhere, is special.

    Args:
      config: what tokenizer_config.json holds.

    Raises:
      FileNotFoundError: where there is no vocabulary.
      ValueError: where a file cannot be read, ids collide, or a named token has no id.
    """
    if (path := folder / "tokenizer.json").is_file():
        vocabulary: Vocabulary = TokenizersVocabulary(path)
    elif (path := folder / "tokenizer.model").is_file():
        vocabulary = SentencePieceVocabulary(path)
    else:
        raise FileNotFoundError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; copy them from the folder "
            "that the model came in"
        )
    special_map = read_json(folder / "special_tokens_map.json")
    ids = dict(vocabulary.vocab)
    contents = {id: content for content, id in ids.items()}
    added: dict[int, AddedToken] = {}

    def put(source: str, id: Any, entry: Any) -> None:
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if not str(id).isdecimal() or not isinstance(content, str) or not content:
            raise ValueError(
                f"{folder / source}: {id!r}: {entry!r} is no added token; it needs an id and a "
                "content"
            )
        id = int(id)
        if contents.get(id, content) != content or ids.get(content, id) != id:
            raise ValueError(
                f"{folder / source}: the added token {content!r} of id {id} collides with "
                f"{contents.get(id, content)!r} of id {ids.get(content, id)}; a token has one id, "
                "and an id one token"
            )
        ids[content], contents[id] = id, content
        special = bool(entry.get("special")) or (id in added and added[id].special)
        flags = {flag: bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "single_word")}
        normalized = bool(entry.get("normalized", not special))
        added[id] = AddedToken(id, content, special=special, normalized=normalized, **flags)

    key = "additional_special_tokens"
    specials = config.get(key) or special_map.get(key) or []
    if not isinstance(specials, list):
        raise ValueError(f"{folder}: {key} is {specials!r}, must be a list of tokens")
    specials = [_entry(folder, key, token)["content"] for token in specials]
    for content, id in read_json(folder / "added_tokens.json").items():
        put("added_tokens.json", id, {"content": content, "special": content in specials})
    for entry in vocabulary.added:
        put("tokenizer.json", entry["id"], entry)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is {decoder!r}, must be an "
            "object of ids and tokens"
        )
    for id, entry in decoder.items():
        put("tokenizer_config.json", id, entry)

    named = {}
    for name in NAMED_TOKENS:
        value = config.get(name) or special_map.get(name) or vocabulary.named.get(name)
        if not value:
            continue
        entry = _entry(folder, name, value)
        named[name] = content = entry["content"]
        if content not in ids:
            raise ValueError(
                f"{folder}: {name} is {content!r}, which is in no vocabulary there; give it an id "
                "in added_tokens_decoder of tokenizer_config.json"
            )
        if (id := ids[content]) in added:
            added[id] = dataclasses.replace(added[id], special=True)
        else:
            put("special_tokens_map.json", id, {"normalized": False, **entry, "special": True})
    tokens = [added[id] for id in sorted(added)]
    vocabulary.add(tokens)
    return vocabulary, tokens, named


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    return read_json_object(path) if path.is_file() else {}


def _entry(folder: Path, name: str, token: Any) -> Mapping[str, Any]:
    """A token of that name, which is written as its text or as an object with content and flags."""
    entry = {"content": token} if isinstance(token, str) else token
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
        raise ValueError(
            f"{folder}: {name} is {token!r}; a token is written as its text, or as an object with "
            "its content"
        )
    return entry
