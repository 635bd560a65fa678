"""Pieces of streamed text against transformers' streamers."""

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

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


class Theirs(transformers.TextStreamer):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append((text, stream_end))


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def pieces_of(both, ids, prompt, **options) -> tuple[list, list]:
    """What our streamer and theirs hand on for the same tokens."""
    ours, pieces = both[0], []
    mine = TextStreamer(ours, callback=lambda *piece: pieces.append(piece), **options)
    theirs = Theirs(both[1], **options)
    for streamer, convert in ((mine, np.asarray), (theirs, torch.tensor)):
        streamer.put(convert([ids[:prompt]]))
        for id in ids[prompt:]:
            streamer.put(convert([id]))
        streamer.end()
    return pieces, theirs.pieces


@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_references(both, text, skip_prompt):
    ids = both[0].encode(f"<|user|>{text}<|end|>")
    for prompt in (1, 4):
        for options in ({}, {"skip_special_tokens": True}):
            mine, theirs = pieces_of(both, ids, prompt, skip_prompt=skip_prompt, **options)
            assert mine == theirs
            assert len(mine) == len(ids) - prompt + 2 - skip_prompt


def test_indentation_is_kept_where_the_reference_drops_a_space(both):
    # It decodes every line alone, and the decoder of SentencePiece drops a text's first space.
    ids = both[0].encode(INDENTED)
    mine, theirs = pieces_of(both, ids, 2)
    assert "".join(text for text, _ in mine) == INDENTED
    drops = "".join(text for text, _ in theirs) != INDENTED
    assert drops == (both[0].leading_spaces > 0)


def test_iterators_give_what_theirs_give(both):
    ids = both[0].encode(TEXTS[0])

    def feed(streamer, convert):
        for id in ids:
            streamer.put(convert([id]))
        streamer.end()

    def read(streamer, convert):
        thread = threading.Thread(target=feed, args=(streamer, convert))
        thread.start()
        pieces = list(streamer)
        thread.join()
        return pieces

    async def read_async(kind, tokenizer, convert):
        streamer = kind(tokenizer, timeout=30)
        feeding = asyncio.create_task(asyncio.to_thread(feed, streamer, convert))
        pieces = [piece async for piece in streamer]
        await feeding
        return pieces

    expected = read(transformers.TextIteratorStreamer(both[1], timeout=30), torch.tensor)
    assert read(TextIteratorStreamer(both[0], timeout=30), np.asarray) == expected
    for kind, tokenizer, convert in (
        (AsyncTextIteratorStreamer, both[0], np.asarray),
        (transformers.AsyncTextIteratorStreamer, both[1], torch.tensor),
    ):
        assert asyncio.run(read_async(kind, tokenizer, convert)) == expected
