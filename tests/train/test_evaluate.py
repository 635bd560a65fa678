"""Perplexity against separate forwards of each document, and answers against single ones."""

import math
from importlib import resources

import jax
import numpy as np
import pytest
from reference import config_values, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from phi3_jax.generation.decoding import decode_loop, prefill
from phi3_jax.loss import IGNORED_LABEL
from train.evaluate import answers, exact_match, perplexity, questions, summed_loss
from train.tiny_demo.tasks import held_out_chats

FOLDER = resources.files("phi3_jax") / "tiny_demo"
WIDTH = 24


def a_model(case="longrope"):
    config = phi3.Phi3Config(**config_values(case))
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))


def a_batch(documents_of_rows, parts, seed=0):
    """Rows of documents of these lengths as a batch of parts; a third of the tokens is learnt."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = len(documents_of_rows)
    input_ids, segment_ids = np.zeros((2, rows, WIDTH), np.int32)
    labels = np.full((rows, WIDTH), IGNORED_LABEL, np.int32)
    for row, lengths in enumerate(documents_of_rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            part = slice(start, start + length)
            input_ids[row, part] = tokens(1, length, seed=seed + 7 * row + number)[0]
            segment_ids[row, part] = number
            learnt = rng.random(length) < 1 / 3
            learnt[0] = False
            labels[row, part] = np.where(learnt, input_ids[row, part], IGNORED_LABEL)
            start += length
    batch = {"input_ids": input_ids, "labels": labels, "segment_ids": segment_ids}
    return {name: x.reshape(parts, rows // parts, WIDTH) for name, x in batch.items()}


# Documents on both sides of the line of 16 positions; unequal counts of labels; an empty row.
BATCHES = [
    a_batch(
        [(5, 19), (24,), (3, 3, 17), (2,), (9, 8, 7), (16,), (17, 7), (1, 20)], parts=2, seed=1
    ),
    a_batch([(24,), (11, 12), (), (4,), (6, 6, 6), (18,), (2, 22), (21,)], parts=2, seed=2),
]


def by_document(model, params, batches):
    """The summed loss of the learnt tokens and their number, every document in a row alone."""

    @jax.jit
    def logprobs_of(ids, mask):
        out = model.apply({"params": params}, ids[None], mask[None])
        return jax.nn.log_softmax(out.logits[0])

    total, count = 0.0, 0
    for batch in batches:
        flat = (batch[n].reshape(-1, WIDTH) for n in ("input_ids", "labels", "segment_ids"))
        for ids, labels, segments in zip(*flat, strict=True):
            for number in range(1, segments.max() + 1):
                start, stop = np.flatnonzero(segments == number)[[0, -1]] + (0, 1)
                alone = np.zeros((2, WIDTH), np.int32)
                alone[:, : stop - start] = ids[start:stop], np.ones(stop - start)
                logprobs = np.asarray(logprobs_of(*alone), np.float64)
                for place in np.flatnonzero(labels[start:stop] != IGNORED_LABEL):
                    total -= logprobs[place - 1, alone[0, place]]
                    count += 1
    return total, count


@pytest.fixture(scope="module")
def demo():
    model, params = phi3.from_pretrained(FOLDER, dtype="float32")
    return model, params, phi3.Tokenizer.from_pretrained(FOLDER)


@pytest.mark.parametrize("case", ["longrope", "mqa_tied_window1"])
def test_perplexity_is_that_of_every_document_alone(case):
    model, params = a_model(case)
    total, count = by_document(model, params, BATCHES)
    found = perplexity(model, params, BATCHES)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_perplexity_is_the_same_on_a_mesh_and_compiles_once():
    model, params = a_model()
    expected = perplexity(model, params, BATCHES)
    model, params = on_mesh(model, params, phi3.make_mesh(data=2, fsdp=2, tensor=2))
    before = summed_loss._cache_size()
    found = perplexity(model, params, iter(BATCHES))
    assert summed_loss._cache_size() == before + 1
    assert found.tokens == expected.tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    placed = [{name: jax.device_put(x) for name, x in batch.items()} for batch in BATCHES[:1]]
    own, given = (perplexity(*a_model(), batches) for batches in (BATCHES[:1], placed))
    assert own == given


def test_dropout_has_no_part_in_it():
    model, params = a_model()
    config = phi3.Phi3Config(**{**config_values("longrope"), "resid_pdrop": 0.5})
    dropping = phi3.Phi3ForCausalLM(config)
    assert perplexity(dropping, params, BATCHES) == perplexity(model, params, BATCHES)


def test_data_without_a_learnt_token_has_no_perplexity():
    nothing = {**BATCHES[0], "labels": np.full_like(BATCHES[0]["labels"], IGNORED_LABEL)}
    for batches in ([], [nothing]):
        with pytest.raises(ValueError, match="no token to learn"):
            perplexity(*a_model(), batches)


def test_answers_together_are_those_of_each_alone(demo, monkeypatch):
    monkeypatch.setattr("train.evaluate.ROWS", 5)
    model, params, tokenizer = demo
    prompts = [list(chat.messages) for chat in held_out_chats(per_kind=1)[:13]]
    programs = decode_loop._cache_size(), prefill._cache_size()
    found = answers(model, params, tokenizer, prompts, max_new_tokens=40)
    # Three batches: one way to decode, and a prefill for each of at most three widths.
    assert decode_loop._cache_size() == programs[0] + 1
    assert prefill._cache_size() <= programs[1] + 3
    chat = phi3.TextGenerator(model, params, tokenizer, cache_length=128)
    assert found == [chat(messages, max_new_tokens=40) for messages in prompts]
    assert answers(model, params, tokenizer, [], max_new_tokens=4) == []


def test_exact_match_counts_and_shows_what_is_wrong(demo):
    def asked(question, answer):
        return {"prompt": question, "completion": answer}

    system = {"role": "system", "content": "Answer with one word."}
    user = {"role": "user", "content": "What is the capital of Norway?"}
    records = [
        asked("What is the capital of Japan?", "The capital of Japan is Tokyo."),
        asked("What is the capital of Italy?", "The capital of Italy is Milan."),
        # The model says more than this.
        asked("What is the capital of Spain?", "The capital of Spain"),
        {"messages": [system, user, {"role": "assistant", "content": "Oslo\n"}]},
        {"messages": [user, {"role": "assistant", "content": "The capital of Norway is Oslo."}]},
    ]
    right, count, wrong = exact_match(*demo, records)
    assert (right, count) == (3, 5)
    assert [each.expected for each in wrong] == [records[n]["completion"] for n in (1, 2)]
    assert wrong[0].answer == "The capital of Italy is Rome."
    assert wrong[0].messages[-1]["content"] == "What is the capital of Italy?"
    assert exact_match(*demo, records[2:3]).right == 0
    assert exact_match(*demo, []) == (0, 0, [])


def test_null_is_none_in_a_record():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    as_columns = [
        {"messages": chat, "prompt": None, "completion": None},
        {"messages": None, "prompt": "Hi", "completion": "Hello"},
        {"messages": chat, "prompt": "a column that is not of it", "completion": None},
    ]
    assert questions(as_columns) == [(chat[:1], "Hello")] * 3


@pytest.mark.parametrize(
    "record",
    [
        {"text": "Once upon a time"},
        {"prompt": "Hello"},
        {"prompt": "Hello", "completion": None},
        {"prompt": None, "completion": None, "messages": None},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
    ],
)
def test_records_without_a_question_are_refused_by_number(demo, record):
    fine = {"prompt": "Hello", "completion": "Hello!"}
    with pytest.raises(ValueError, match="record 1 .* has no question"):
        exact_match(*demo, [fine, record])
