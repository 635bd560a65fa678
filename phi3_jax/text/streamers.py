"""Text while it is generated: `generate(..., streamer=...)` puts tokens in, words come out.

A streamer has put(ids), called with the prompt and then with each token, and end(); where
generation fails, fail(error) is called in place of end().
"""

import asyncio
import queue
from collections.abc import Callable
from typing import Any

import numpy as np

from phi3_jax.text.tokenizer import StreamDecoder, Tokenizer


def _print(text: str, stream_end: bool) -> None:
    print(text, end="\n" if stream_end else "", flush=True)


class TextStreamer:
    """Hands on text as soon as its words are whole; by default it is printed (TextStreamer).

    A word is whole with the space behind it; lines and CJK ideographs are handed on at once. All
    pieces together are what the tokenizer decodes from all tokens.

    Args:
      tokenizer: of the model.
      skip_prompt: whether to leave the prompt out, which is what is put first.
      callback: called as callback(text, stream_end) with every piece; the last one, which may be
        empty, with stream_end True.
      skip_special_tokens: whether to leave out the names of special tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        callback: Callable[[str, bool], Any] = _print,
        *,
        skip_special_tokens: bool = False,
    ):
        self.tokenizer, self.skip_prompt = tokenizer, skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self._callback = callback
        self._begin()

    def _begin(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer, self.skip_special_tokens)
        self._text = ""  # settled
        self._shown = 0  # characters of it, and of what is not settled yet, that were handed on
        self._prompt_is_next = True

    def put(self, ids: Any) -> None:
        """Takes tokens: the prompt's [T] or [1, T] first, then one or more of the continuation.

        Raises:
          ValueError: for more than one row.
        """
        ids = np.asarray(ids)
        if ids.ndim > 1 and len(ids) > 1:
            raise ValueError(
                f"a {type(self).__name__} takes one row, got ids of shape {ids.shape}; generate "
                "each row of a batch alone"
            )
        is_prompt, self._prompt_is_next = self._prompt_is_next, False
        if is_prompt and self.skip_prompt:
            return
        for id in ids.reshape(-1).tolist():
            self._text += self._decoder.put(id)
        text = self._text + self._decoder.peek()
        if text.endswith("\n") or _is_ideograph(text[-1:]):
            end = len(text)
        else:
            end = text.rfind(" ") + 1
        piece = text[self._shown : end]
        self._shown += len(piece)
        settled = min(self._shown, len(self._text))
        self._text, self._shown = self._text[settled:], self._shown - settled
        self.on_finalized_text(piece)

    def end(self) -> None:
        """Hands on what is left, and begins anew: a prompt is next."""
        text = self._text + self._decoder.flush()
        shown = self._shown
        self._begin()
        self.on_finalized_text(text[shown:], stream_end=True)

    def fail(self, error: BaseException) -> None:
        """Generation ended with an error, which its caller sees; begins anew."""
        self._begin()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What happens with a piece of text, "" where a token has completed none."""
        self._callback(text, stream_end)


class TextIteratorStreamer(TextStreamer):
    """An iterator over the text, for a thread other than the one that generates.

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        Thread(target=lambda: phi3.generate(model, params, ids, streamer=streamer)).start()
        for piece in streamer: ...

    An error of the generating thread is raised here, too.

    Args:
      tokenizer: as in `TextStreamer`.
      skip_prompt: as in `TextStreamer`.
      timeout: seconds to wait for a piece, None without end; then a TimeoutError is raised.
      skip_special_tokens: as in `TextStreamer`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
    ):
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens)
        self.timeout = timeout
        self._pieces: queue.SimpleQueue = queue.SimpleQueue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._pieces.put(text)
        if stream_end:
            self._pieces.put(StopIteration())

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self._pieces.put(error)

    def __iter__(self) -> "TextIteratorStreamer":
        return self

    def __next__(self) -> str:
        try:
            piece = self._pieces.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(_late(self.timeout)) from None
        if isinstance(piece, str):
            return piece
        raise piece


class AsyncTextIteratorStreamer(TextStreamer):
    """An asynchronous iterator over the text, made inside of the event loop that reads it.

        async for piece in streamer: ...

    Arguments and errors as in `TextIteratorStreamer`; generation runs in a thread of its own, for
    example through asyncio.to_thread.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
    ):
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens)
        self.timeout = timeout
        self._pieces: asyncio.Queue = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def _put(self, piece: str | BaseException) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._put(text)
        if stream_end:
            self._put(StopAsyncIteration())

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self._put(error)

    def __aiter__(self) -> "AsyncTextIteratorStreamer":
        return self

    async def __anext__(self) -> str:
        try:
            async with asyncio.timeout(self.timeout):
                piece = await self._pieces.get()
        except TimeoutError:
            raise TimeoutError(_late(self.timeout)) from None
        if isinstance(piece, str):
            return piece
        raise piece


def _late(timeout: float | None) -> str:
    return f"no text came for {timeout} seconds; a longer timeout waits longer"


# The blocks of CJK ideographs in Unicode, as the reference counts them; words written in other
# letters, as kana and Hangul, are taken to have spaces between them.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _is_ideograph(char: str) -> bool:
    return bool(char) and any(first <= ord(char) <= last for first, last in _IDEOGRAPHS)
