"""TextGenerator on the embedded model."""

import re

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
    with pytest.warns(UserWarning, match="no effect without do_sample") as warned:
        assert chat(QUESTION, temperature=5.0, do_sample=False) == greedy
        chat.stream(QUESTION, temperature=5.0, do_sample=False)
    assert [warning.filename for warning in warned] == [__file__] * 2


def test_a_passed_config_counts_as_the_call_does(chat):
    def passed(**settings):
        return {"generation_config": phi3.GenerationConfig(**settings)}

    assert len(list(chat.stream(QUESTION, **passed(max_new_tokens=3)))) == 3 + 1
    assert chat(QUESTION, max_new_tokens=None, **passed(max_new_tokens=3)) == chat(QUESTION)
    hot = {"temperature": 5.0, "max_new_tokens": 12}
    story = "Tell me a story."
    assert chat(story, seed=1, **passed(**hot)) == chat(story, seed=1, **hot)
    assert chat(story, seed=1, **passed(**hot)) != chat(story, seed=2, **passed(**hot))
    assert chat(QUESTION, **passed(temperature=0)) == chat(QUESTION)
    cold = passed(temperature=5.0, do_sample=True)
    assert chat(QUESTION, temperature=0, **cold) == chat(QUESTION)
    with pytest.raises(ValueError, match="max_cache_len is fixed"):
        chat(QUESTION, **passed(max_cache_len=600))
    with pytest.raises(ValueError, match="num_return_sequences is 3 and TextGenerator gives one"):
        chat(QUESTION, **passed(num_return_sequences=3, do_sample=True))


def test_the_folder_counts_unless_it_is_left_out(chat):
    folder = phi3.GenerationConfig(max_new_tokens=3, num_return_sequences=2).over(
        chat.model.generation_config
    )
    model = chat.model.clone(generation_config=folder)
    own = phi3.TextGenerator(model, chat.params, chat.tokenizer)
    with pytest.raises(ValueError, match="num_return_sequences is 2"):
        own(QUESTION)
    assert len(list(own.stream(QUESTION, num_return_sequences=1))) == 3 + 1
    ends = chat.model.generation_config.eos_token_id
    assert own(QUESTION, use_model_defaults=False, eos_token_id=ends) == chat(QUESTION)


@pytest.mark.parametrize(
    "name", ["streamer", "custom_generate", "tokenizer", "mesh", "input_ids", "attention_mask"]
)
def test_what_is_not_taken_is_refused_in_words(chat, name):
    for ask in (chat, chat.stream):
        with pytest.raises(ValueError, match=f"TextGenerator takes no {name}; "):
            ask(QUESTION, **{name: object()})


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


def test_beams_answer_all_at_once_and_stop_strings_end_them(chat):
    pieces = list(chat.stream(QUESTION, num_beams=2, stop_strings=["capital of"]))
    assert "".join(pieces) == "The capital of" and len(pieces) > 2
    with pytest.raises(ValueError, match="gives one answer"):
        chat(QUESTION, do_sample=True, num_return_sequences=2)
    assert chat(QUESTION, num_return_sequences=None) == chat(QUESTION)


def test_answers_keep_to_a_grammar(chat):
    pytest.importorskip("llguidance")
    pattern = "(Rome|Oslo), [a-z]{3}[.]"
    answer = chat(QUESTION, grammar=phi3.Grammar.from_regex(pattern), temperature=2.0, seed=3)
    assert re.fullmatch(pattern, answer)


def test_a_kept_prompt_changes_no_answer(chat):
    messages = [{"role": "user", "content": QUESTION}]
    cache = chat.cache_prompt(messages)
    assert cache.cache.capacity >= chat.cache_length
    small = chat.cache_prompt(messages, cache_implementation="quantized")
    assert small.cache.k_LBKSH.values.dtype == "int8" and chat(messages, cache=small)
    assert cache.tokens.tolist() == chat.encode(messages)
    assert chat(messages, cache=cache) == chat(messages) == chat(messages, cache=cache)
    messages += [{"role": "assistant", "content": chat(messages)}]
    messages += [{"role": "user", "content": "And of Norway?"}]
    assert chat(messages, cache=cache) == chat(messages)
    with pytest.raises(ValueError, match="ask for|shorten"):
        phi3.TextGenerator(chat.model, chat.params, chat.tokenizer, cache_length=5).cache_prompt(
            messages
        )
