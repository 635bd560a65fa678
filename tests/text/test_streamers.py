"""Streamed text: joined it is the decoded text, in pieces it is words."""

import asyncio
import threading

import numpy as np
import pytest
from small_tokenizers import INDENTED, KINDS, TEXTS, save_tokenizer

from phi3_jax.text.streamers import (
    AsyncTextIteratorStreamer,
    TextIteratorStreamer,
    TextStreamer,
)
from phi3_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return Tokenizer.from_pretrained(
        save_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)
    )


def feed(streamer, ids, prompt=1):
    streamer.put(np.asarray([ids[:prompt]]))
    for id in ids[prompt:]:
        streamer.put(np.asarray([id]))
    streamer.end()


def pieces_of(tokenizer, ids, prompt=1, **options) -> list[str]:
    pieces = []
    streamer = TextStreamer(tokenizer, callback=lambda text, _: pieces.append(text), **options)
    feed(streamer, ids, prompt)
    return pieces


@pytest.mark.parametrize("text", [*TEXTS, INDENTED, " \n\n  x", ""])
def test_all_pieces_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text + "<|end|>")
    for skip in (False, True):
        expected = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=skip)) == expected
    expected = tokenizer.decode(ids[1:])
    assert "".join(pieces_of(tokenizer, ids, skip_prompt=True)) == expected


def test_any_tokens_give_whole_characters_once(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, len(tokenizer), 40)
        # Without line breaks: one that is shown stays one, though broken bytes follow.
        ids = [id for id in ids if b"\n" not in tokenizer.token_bytes(len(tokenizer))[id]]
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_words_lines_and_ideographs_are_pieces(tokenizer):
    text = "one twofold\n\u4f60\u597dx \U0001f600 end"
    ids = tokenizer.encode(text)
    pieces = [piece for piece in pieces_of(tokenizer, ids) if piece]
    assert pieces == ["one ", "twofold\n", "\u4f60", "\u597d", "x ", "\U0001f600 ", "end"]


def test_a_streamer_begins_anew_after_its_end(tokenizer):
    pieces = []
    streamer = TextStreamer(tokenizer, True, lambda *piece: pieces.append(piece))
    prompt = tokenizer.encode("a prompt")
    feed(streamer, [*prompt, *tokenizer.encode("one two")], len(prompt))
    streamer.put(prompt)
    streamer.put(tokenizer.encode("half an"))
    streamer.fail(RuntimeError("no more"))  # a callback's user sees the error where it was raised
    feed(streamer, [*prompt, *tokenizer.encode("three")], len(prompt))
    texts = [piece for piece in pieces if piece[0]]
    assert texts == [("one ", False), ("two", True), ("half ", False), ("three", True)]


def test_printing_ends_the_line(tokenizer, capsys):
    streamer = TextStreamer(tokenizer)
    feed(streamer, tokenizer.encode("one two"))
    feed(streamer, tokenizer.encode("three"))
    assert capsys.readouterr().out == "one two\nthree\n"


def test_one_row_only(tokenizer):
    streamer = TextStreamer(tokenizer, callback=lambda text, stream_end: None)
    with pytest.raises(ValueError, match=r"takes one row, got ids of shape \(2, 3\)"):
        streamer.put(np.zeros((2, 3), np.int32))


def test_an_iterator_gives_what_another_thread_puts(tokenizer):
    streamer = TextIteratorStreamer(tokenizer, timeout=30)
    for text in TEXTS[:2]:  # one after the other
        ids = tokenizer.encode(text)
        thread = threading.Thread(target=feed, args=(streamer, ids))
        thread.start()
        assert "".join(streamer) == tokenizer.decode(ids)
        thread.join()


def test_an_error_of_the_generating_thread_arrives(tokenizer):
    streamer = TextIteratorStreamer(tokenizer, timeout=30)
    streamer.put(tokenizer.encode("one two"))
    streamer.fail(ValueError("no memory"))
    assert next(streamer) == "one "
    with pytest.raises(ValueError, match="no memory"):
        next(streamer)


def test_an_iterator_does_not_wait_for_ever(tokenizer):
    with pytest.raises(TimeoutError, match="0.01 seconds"):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))


def test_the_same_in_an_event_loop(tokenizer):
    ids = tokenizer.encode(TEXTS[1])

    async def read():
        streamer = AsyncTextIteratorStreamer(tokenizer, timeout=30)
        feeding = asyncio.create_task(asyncio.to_thread(feed, streamer, ids))
        pieces = [piece async for piece in streamer]
        await feeding
        return pieces

    async def fail():
        streamer = AsyncTextIteratorStreamer(tokenizer, timeout=30)
        await asyncio.to_thread(streamer.fail, ValueError("no memory"))
        return await anext(streamer)

    async def wait():
        return await anext(AsyncTextIteratorStreamer(tokenizer, timeout=0.01))

    assert asyncio.run(read()) == pieces_of(tokenizer, ids)
    with pytest.raises(ValueError, match="no memory"):
        asyncio.run(fail())
    with pytest.raises(TimeoutError, match="0.01 seconds"):
        asyncio.run(wait())
