"""What lm-evaluation-harness gets, against direct calls of the model, and a task of its own."""

import json
import math
from importlib import resources
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from reference import config_values, hf_weights, params_of

import phi3_jax as phi3

lm_eval = pytest.importorskip("lm_eval")

from train.lm_eval import Phi3LM, _scored  # noqa: E402

FOLDER = resources.files("phi3_jax") / "tiny_demo"
TEXT = "Once upon a time, a fox lived in the forest. One day it found a golden bell and a red hat."


class Letters:
    """A tokenizer of one token a letter, with ids from 3 on."""

    bos_token_id, eos_token_id, pad_token_id, chat_template = 1, 2, 0, None

    def encode(self, text, add_special_tokens=True):
        return [3 + ord(letter) % 90 for letter in text]

    def decode(self, ids, skip_special_tokens=False):
        return "<s>"


@pytest.fixture(scope="module")
def demo():
    return Phi3LM.from_pretrained(FOLDER, dtype="float32", batch_size=4)


def longrope_lm(**settings):
    config = phi3.Phi3Config(**config_values("longrope"))
    params = params_of(config, hf_weights(config, "longrope"))
    return Phi3LM(phi3.Phi3ForCausalLM(config), params, Letters(), **settings)


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def logprobs_of(lm, ids):
    """Float64 log-probabilities [T, V] of what follows each token of one row."""
    logits = lm.model.apply({"params": lm.params}, [ids]).logits[0]
    return np.asarray(jax.nn.log_softmax(logits.astype("float32")), np.float64)


def score_of(lm, context, continuation):
    """Of ids behind ids: the sum, and whether each is the most likely."""
    ids = [*context, *continuation]
    logprobs = logprobs_of(lm, ids[:-1])[len(context) - 1 :]
    picked = logprobs[np.arange(len(continuation)), continuation]
    return picked.sum(), bool((logprobs.argmax(axis=1) == continuation).all())


def close(score):
    return pytest.approx(score, rel=1e-5, abs=1e-5)


def test_continuations_have_the_scores_of_separate_calls(demo):
    question = demo.apply_chat_template([{"role": "user", "content": "What is 2 + 3?"}])
    pairs = [
        (question, "2 + 3 = 5.<|end|>"),
        (question, "2 + 3 = 6.<|end|>"),
        ("Hello", " there"),
        (TEXT, TEXT),
        ("red, blue,", " green"),
        ("a", "b" * 50),
    ]
    found = demo.loglikelihood(requests(*pairs))
    for (context, continuation), (score, is_greedy) in zip(pairs, found, strict=True):
        whole, given = demo.tokenizer.encode(context + continuation), demo.tokenizer.encode(context)
        expected, greedy = score_of(demo, given, whole[len(given) :])
        assert score == close(expected) and is_greedy == greedy
    assert [greedy for _, greedy in found[:2]] == [True, False]
    assert found[0][0] > -0.1 > found[1][0]


def test_a_space_at_the_end_of_a_context_belongs_to_the_continuation(demo):
    assert demo.loglikelihood(requests(("red, blue, ", "green"))) == demo.loglikelihood(
        requests(("red, blue,", " green"))
    )


def test_a_text_without_context_follows_the_prefix_token(demo):
    ((score, _),) = demo.loglikelihood(requests(("", TEXT)))
    expected, _ = score_of(demo, [demo.tokenizer.bos_token_id], demo.tokenizer.encode(TEXT))
    assert score == close(expected)


@pytest.mark.parametrize("lengths", [(3, 4), (9, 7), (9, 8), (4, 15), (40, 1), (30, 17)])
def test_long_rows_lose_their_beginning_and_use_their_own_rope_factors(lengths):
    # The line of longrope is at 16 positions: rows of one batch are on both sides of it.
    lm = longrope_lm(max_length=20)
    context, continuation = "abcdefghijklmnopqrstuvwxyz" * 2, "zyxwvutsrqponmlkjihgfedcba"
    context, continuation = context[: lengths[0]], continuation[: lengths[1]]
    (score, greedy), _ = lm.loglikelihood(requests((context, continuation), ("abc", "def" * 6)))
    ids = lm.tok_encode(context + continuation)[-21:]
    expected = score_of(lm, ids[: -lengths[1]], ids[-lengths[1] :])
    assert (score, greedy) == (close(expected[0]), expected[1])


def test_continuations_that_cannot_be_scored_are_refused():
    lm = longrope_lm(max_length=20)
    for continuation, tokens in (("", 0), ("a" * 21, 21)):
        with pytest.raises(ValueError, match=f"has {tokens} tokens"):
            lm.loglikelihood(requests(("abc", continuation)))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 21])
def test_rolling_windows_predict_every_token_once_with_the_most_context(length):
    lm = longrope_lm(max_length=8, batch_size=3)
    texts = "the quick brown fox jumps"[:length], "over"
    found = lm.loglikelihood_rolling(requests(*[(text,) for text in texts]))
    for text, score in zip(texts, found, strict=True):
        ids = [Letters.bos_token_id, *lm.tok_encode(text)]
        expected, done = 0.0, 1
        while done < len(ids):
            stop = min(done + 8, len(ids))
            logprobs = logprobs_of(lm, ids[max(0, stop - 9) : stop - 1])
            new = np.arange(done - stop, 0)
            expected += logprobs[new, np.asarray(ids[:stop])[new]].sum()
            done = stop
        assert score == close(expected)


def test_few_programs_score_many_lengths():
    lm = longrope_lm(max_length=100)
    before = _scored._cache_size()
    lm.loglikelihood(requests(*[("a" * n, "b" * (1 + n % 5)) for n in range(1, 45)]))
    # Rows of 16, 32 and 48 tokens.
    assert _scored._cache_size() == before + 3


def test_a_mesh_gives_the_same_scores_and_texts(demo):
    mesh = phi3.make_mesh(data=2, fsdp=2, tensor=2)
    spread = Phi3LM.from_pretrained(FOLDER, dtype="float32", mesh=mesh, batch_size=4)
    asked = requests(("Hello", " there"), (TEXT, " The end."), ("What", "?"))
    for one, other in zip(demo.loglikelihood(asked), spread.loglikelihood(asked), strict=True):
        assert one == (close(other[0]), other[1])
    asked = requests((chat(demo, "Count from 3 to 6."), {"until": [], "max_gen_toks": 16}))
    assert demo.generate_until(asked) == spread.generate_until(asked) == ["3, 4, 5, 6."]


def chat(lm, question):
    return lm.apply_chat_template([{"role": "user", "content": question}])


def test_texts_end_before_their_first_stop_string(demo):
    count, capital = chat(demo, "Count from 3 to 6."), chat(demo, "What is the capital of Japan?")
    asked = [
        (count, {"until": [" 5", "4"], "max_gen_toks": 30}),
        (capital, {"until": [" 5", "4"], "max_gen_toks": 30}),
        (count, {"until": "nowhere", "max_gen_toks": 30}),
        (count, {"max_gen_toks": 4, "do_sample": False, "temperature": 0.0}),
        (capital, {"until": [""], "max_gen_toks": 30}),
        (count, {"until": [" 5", "4"], "max_gen_toks": 30}),
    ]
    assert demo.generate_until(requests(*asked)) == [
        "3, ",
        "The capital of Japan is Tokyo.",
        "3, 4, 5, 6.",
        "3, ",
        "The capital of Japan is Tokyo.",
        "3, ",
    ]


def test_generating_stops_where_every_text_has_a_stop_string(demo, monkeypatch):
    made = []

    def counted(*arguments, **settings):
        for token_B in phi3_stream(*arguments, **settings):
            made.append(token_B)
            yield token_B

    from train import lm_eval as module

    phi3_stream = module.stream
    monkeypatch.setattr(module, "stream", counted)
    long, short = chat(demo, "Tell me a story about a fox and a bell."), chat(demo, "Spell fox.")
    asked = [(text, {"until": [","], "max_gen_toks": 60}) for text in (long, short)]
    assert demo.generate_until(requests(*asked)) == ["Once upon a time", "f-o-x."]
    assert 6 <= len(made) <= 16


def test_contexts_lose_their_beginning_to_what_is_generated(demo):
    lm = Phi3LM(demo.model, demo.params, demo.tokenizer, batch_size=1, max_length=48)
    # A question that is long gone, and the end of another.
    context = chat(demo, "Count from 3 to 6.") + TEXT + chat(demo, "Sort: ")
    ids = demo.tok_encode(context)
    texts = []
    for given in (ids[-32:], ids):
        result = phi3.generate(lm.model, lm.params, [given], max_new_tokens=16)
        new = result.sequences[0, len(given) :]
        texts.append(demo.tokenizer.decode(new, skip_special_tokens=True))
    assert texts[0] != texts[1]
    assert lm.generate_until(requests((context, {"max_gen_toks": 16}))) == texts[:1]
    with pytest.raises(ValueError, match="max_gen_toks is 48"):
        lm.generate_until(requests((context, {"max_gen_toks": 48})))
    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until(requests((context, {"max_gen_toks": 4, "num_beams": 3})))


def test_a_chat_without_a_prompt_for_an_answer_stays_open(demo):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    assert (
        demo.apply_chat_template(turns, add_generation_prompt=False) == chat(demo, "Hi") + "Well,"
    )


def test_the_harness_runs_tasks_on_it(demo, tmp_path):
    capitals = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Norway": "Oslo"}
    cities = list(capitals.values())
    documents = [
        {"question": f"What is the capital of {country}?", "city": city, "cities": cities}
        for country, city in capitals.items()
    ]
    # One that cannot be right.
    documents.append({"question": "Spell fox.", "city": "Rome", "cities": cities})
    file = tmp_path / "capitals.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
    }
    choice = {
        **common,
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{cities}}",
        "doc_to_target": "city",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    answer = {
        **common,
        "task": "answer",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "city",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 20},
        "filter_list": [
            {"name": "last", "filter": [{"function": "regex", "regex_pattern": r"(\w+)$"}]}
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = {
        **common,
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    found = lm_eval.simple_evaluate(
        model=demo,
        tasks=[choice, answer, rolling],
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=False,
    )["results"]
    assert found["answer"]["exact_match,last"] == 0.8
    chosen = []
    for document in documents:
        pairs = [(chat(demo, document["question"]), city) for city in cities]
        scores = [score for score, _ in demo.loglikelihood(requests(*pairs))]
        chosen.append(cities[int(np.argmax(scores))] == document["city"])
    assert found["choice"]["acc,none"] == np.mean(chosen)
    scores = demo.loglikelihood_rolling(requests(*[(d["question"],) for d in documents]))
    words = sum(len(document["question"].split()) for document in documents)
    perplexity = math.exp(-sum(scores) / words)
    assert found["rolling"]["word_perplexity,none"] == pytest.approx(perplexity)
