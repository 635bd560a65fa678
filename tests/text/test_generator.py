"""TextGenerator on the embedded model."""

import pytest

import phi3_jax as phi3
from phi3_jax.cli import EMBEDDED_MODEL

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def chat():
    model, params = phi3.from_pretrained(EMBEDDED_MODEL, dtype="float32")
    return phi3.TextGenerator(model, params, phi3.Tokenizer.from_pretrained(EMBEDDED_MODEL))


def test_stream_and_call_say_the_same(chat):
    messages = [{"role": "user", "content": QUESTION}]
    assert chat(messages) == chat(QUESTION) == "".join(chat.stream(messages))
    assert chat(QUESTION) == "The capital of France is Paris."


def test_a_temperature_asks_for_sampling(chat):
    hot = [
        chat("Tell me a story.", temperature=5.0, seed=seed, max_new_tokens=12) for seed in (1, 2)
    ]
    assert hot[0] != hot[1]
    greedy = chat(QUESTION, temperature=0)
    assert greedy == chat(QUESTION)
    with pytest.warns(UserWarning, match="no effect without do_sample"):
        assert chat(QUESTION, temperature=5.0, do_sample=False) == greedy


def test_the_cache_limits_a_conversation(chat):
    assert chat.cache_length == 512
    short = phi3.TextGenerator(chat.model, chat.params, chat.tokenizer, cache_length=14)
    prompt = len(short.encode(QUESTION))
    assert len(chat.tokenizer.encode(short(QUESTION))) <= 14 - prompt
    with pytest.raises(ValueError, match="leaves none for an answer"):
        short(QUESTION + " " + QUESTION)
    with pytest.raises(ValueError, match="max_cache_len is fixed"):
        chat(QUESTION, max_cache_len=3)
    with pytest.raises(ValueError, match="cache_length is 0"):
        phi3.TextGenerator(chat.model, chat.params, chat.tokenizer, cache_length=0)
