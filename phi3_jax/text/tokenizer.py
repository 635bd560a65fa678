"""Text to token ids and back, single texts and conversations."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from phi3_jax.config import warn_of_code
from phi3_jax.folder import find_folder
from phi3_jax.text.chat import PHI3_CHAT_TOKENS, load_chat_template, render_chat
from phi3_jax.text.vocabulary import AddedToken, Vocabulary, read_json, read_vocabulary


class Tokenizer:
    """The tokenizer of a model folder.

    vocab_size counts the vocabulary without added tokens, len() with them; either may be smaller
    than the model's vocab_size. bos_token_id, eos_token_id, pad_token_id and unk_token_id are None
    where the folder names no such token. special_ids are what skip_special_tokens leaves out.
    chat_template is the folder's own, or None: then Phi-3's format is used.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        added: Sequence[AddedToken],
        named: Mapping[str, str],
        add_bos: bool,
        add_eos: bool,
        chat_template: str | None,
    ):
        self._vocabulary = vocabulary
        self._named = named
        self._ids = {**vocabulary.vocab, **{token.content: token.id for token in added}}
        self._tokens = {id: token for token, id in self._ids.items()}
        self.vocab_size = len(vocabulary.vocab)
        self.special_ids = frozenset(token.id for token in added if token.special)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.unk_token_id = self._named_id("unk_token")
        self.pad_token_id = self._named_id("pad_token")
        self.chat_template = chat_template
        self._token_bytes: dict[int, tuple[bytes, ...]] = {}
        # As in transformers, a post-processor in tokenizer.json is believed before the config.
        believed = vocabulary.adds_special_tokens
        self._head = self._framing("bos_token") if add_bos and not believed else []
        self._tail = self._framing("eos_token") if add_eos and not believed else []

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, else tokenizer.model, and the small files beside it.

        Those are tokenizer_config.json, special_tokens_map.json, added_tokens.json and
        chat_template.jinja; each may be absent.

        Args:
          folder: a path, or an id on the Hugging Face hub.

        Raises:
          FileNotFoundError: where there is no folder, or no vocabulary in it.
          ValueError: where a file cannot be read, ids of added tokens collide, or a token that is
            named (as eos_token, for one) is not in the vocabulary.
        """
        folder = find_folder(folder)
        config = read_json(folder / "tokenizer_config.json")
        warn_of_code(folder / "tokenizer_config.json", config)
        vocabulary, added, named = read_vocabulary(folder, config)
        return cls(
            vocabulary,
            added,
            named,
            add_bos=bool(config.get("add_bos_token")),
            add_eos=bool(config.get("add_eos_token")),
            chat_template=load_chat_template(folder, config),
        )

    def check_fits(self, vocab_size: int) -> None:
        """Refuses to serve a model that has no embedding for some of the tokens.

        Raises:
          ValueError: where an id is not below vocab_size, the model's.
        """
        last = max(self._tokens, default=-1)
        if last >= vocab_size:
            raise ValueError(
                f"the tokenizer has {self._tokens[last]!r} of id {last}, outside the model's "
                f"vocabulary of {vocab_size} (vocab_size); take the tokenizer that came with the "
                "model, or give the model rows for it by resize_token_embeddings"
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; names of added tokens in it, such as <|user|>, become those tokens.

        Args:
          text: one string.
          add_special_tokens: with bos before and eos after, where the folder says so (Phi-3's own
            folders since mid-2024 do not).

        Raises:
          ValueError: where text is not a string of characters.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}, must be one string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text[{error.start}] is {text[error.start]!r}, half of a surrogate pair and no "
                "character; text.encode('utf-8', 'replace').decode() puts '?' in its place"
            ) from error
        ids = self._vocabulary.encode(text, add_special_tokens)
        return [*self._head, *ids, *self._tail] if add_special_tokens else ids

    def decode(
        self, ids: Sequence[int] | np.ndarray | int, skip_special_tokens: bool = False
    ) -> str:
        """The text of ids: one row of them, as a list or array, or a single one.

        Ids that are no token's, such as the unused rows of Phi-3's embedding, have no text.

        Raises:
          ValueError: for anything but one row of integers.
        """
        ids = np.asarray(ids)
        if ids.ndim > 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"decode takes one row of integer ids, got {ids.dtype} of shape {ids.shape}; "
                "for a batch call it once per row"
            )
        stream = StreamDecoder(self, skip_special_tokens)
        return "".join(map(stream.put, ids.reshape(-1).tolist())) + stream.flush()

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of unequal lengths as one batch, padded on the left with pad_token_id.

        Returns (input_ids, attention_mask): int32 of shape (rows, longest), the mask 0 on padding.

        Raises:
          ValueError: without rows, or where the folder names no pad token.
        """
        if self.pad_token_id is None:
            raise ValueError("the folder names no pad token; give tokenizer_config.json one")
        if not len(rows):
            raise ValueError("there are no rows to pad; give at least one")
        shape = (len(rows), max(map(len, rows)))
        input_ids = np.full(shape, self.pad_token_id, np.int32)
        attention_mask = np.zeros(shape, np.int32)
        for index, row in enumerate(rows):
            start = shape[1] - len(row)
            input_ids[index, start:] = row
            attention_mask[index, start:] = 1
        return input_ids, attention_mask

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: Literal[True] = True,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        tokenize: Literal[False],
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
    ) -> list[int] | str:
        """Ids of a conversation in the model's chat format, or with tokenize=False its text.

        As in transformers, the name of an added token inside a content becomes that token: clean
        what strangers write.

        Args:
          messages: dicts with "role" (system, user, assistant; also tool where the folder has its
            own template) and "content", a string.
          add_generation_prompt: whether to end with the opening of the assistant's answer.
          tokenize: False for the text in place of its ids.

        Raises:
          ValueError: for a message that is none, for what the template refuses, and where the
            folder has no template and its vocabulary no tokens for Phi-3's format.
        """
        if self.chat_template is None and not self._ids.keys() >= set(PHI3_CHAT_TOKENS):
            raise ValueError(
                "this folder has no chat template, and its vocabulary lacks tokens of Phi-3's own "
                f"format ({', '.join(PHI3_CHAT_TOKENS)}); give it a chat_template.jinja"
            )
        text = render_chat(messages, self.chat_template, self._named, add_generation_prompt)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None where there is no such token."""
        return self._ids.get(token)

    def id_to_token(self, id: int) -> str | None:
        """The token of an id as the vocabulary spells it, None where the id is no token's."""
        return self._tokens.get(id)

    def token_bytes(self, vocab_size: int) -> tuple[bytes, ...]:
        """The bytes that each of the ids below vocab_size has inside a text, b"" for no token's.

        Special tokens have their names. A token may be part of a character, so that only the bytes
        of several are a text in UTF-8; decode() also drops `leading_spaces` from its front.
        """
        if vocab_size not in self._token_bytes:
            text = self._vocabulary.new_text()
            self._token_bytes[vocab_size] = tuple(
                text.bytes_of(self._tokens[id]) if id in self._tokens else b""
                for id in range(vocab_size)
            )
        return self._token_bytes[vocab_size]

    @property
    def leading_spaces(self) -> int:
        """How many spaces decode() drops from the front of a text, where it has so many."""
        return self._vocabulary.new_text().leading_spaces

    def __len__(self) -> int:
        return len(self._tokens)

    def _named_id(self, name: str) -> int | None:
        return self._ids[self._named[name]] if name in self._named else None

    def _framing(self, name: str) -> list[int]:
        if (id := self._named_id(name)) is None:
            raise ValueError(
                f"tokenizer_config.json asks to add the {name} to every text, but names none; "
                f"give it one, or set add_{name} to false"
            )
        return [id]


class StreamDecoder:
    """Text of ids that come one by one; what it returns, joined, is decode() of all of them.

    put() returns the text that is settled by now, often "" in the middle of a character, and never
    half a character; flush() the rest, at the end. One decoder is for one text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._text = tokenizer._vocabulary.new_text()

    def put(self, id: int) -> str:
        id = int(id)
        token = self._tokenizer.id_to_token(id)
        return "" if token is None or id in self._skipped else self._text.put(token)

    def peek(self) -> str:
        """What flush() would return now; bytes to come may still change it."""
        return copy.deepcopy(self._text).flush()

    def flush(self) -> str:
        return self._text.flush()
