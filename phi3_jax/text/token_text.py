"""The text of tokens, put together one token at a time.

This is what a tokenizer.json calls its decoder. Models of the Phi-3 family have one of two.
"""

import codecs
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class PieceText:
    """Text of SentencePiece tokens: U+2581 is a space, <0xE4> a byte of a character to come.

    Bytes wait until a token that is no byte ends their run, because only the whole run decides
    whether they are characters: one bad byte makes a U+FFFD of each, as in `tokenizers`.
    """

    def __init__(self, leading_spaces: int):
        self.leading_spaces = leading_spaces  # still to be dropped from the front of the text
        self._run = bytearray()

    @staticmethod
    def bytes_of(token: str) -> bytes:
        """The bytes that a token has inside a text."""
        if byte := _BYTE_PIECE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode("utf-8")

    def put(self, token: str) -> str:
        if _BYTE_PIECE.fullmatch(token):
            self._run += self.bytes_of(token)
            return ""
        return self._strip(self._end_run() + token.replace("\u2581", " "))

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        while text and self.leading_spaces:
            if text[0] != " ":
                self.leading_spaces = 0
                break
            text = text[1:]
            self.leading_spaces -= 1
        return text


class ByteLevelText:
    """Text of byte-level BPE tokens: each character of a token stands for one byte."""

    leading_spaces = 0

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @staticmethod
    def bytes_of(token: str) -> bytes:
        """The bytes that a token has inside a text."""
        if all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        return token.encode("utf-8")

    def put(self, token: str) -> str:
        return self._decoder.decode(self.bytes_of(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    # GPT-2's: bytes that are visible characters in Latin-1 stand for themselves, the others are
    # numbered from U+0100 on.
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + index): byte for index, byte in enumerate(hidden)
    }


_BYTE_OF_CHAR = _byte_alphabet()


def token_text_of(decoder: Mapping[str, Any] | None) -> Callable[[], PieceText | ByteLevelText]:
    """What makes the text that the "decoder" of a tokenizer.json would make.

    Raises:
      ValueError: for a decoder of another kind.
    """
    steps = decoder.get("decoders", [decoder]) if decoder else []
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteLevelText
    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    if steps[:3] == [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]:
        spaces = steps[3].get("start") if len(steps) == 4 else 0
        strip = {"type": "Strip", "content": " ", "start": spaces, "stop": 0}
        if steps[3:] in ([], [strip]):
            return functools.partial(PieceText, spaces)
    raise ValueError(
        f"the decoder {decoder} is none that models of the Phi-3 family use; those are ByteLevel, "
        "and the sequence of Replace (U+2581 by a space), ByteFallback, Fuse and Strip"
    )
