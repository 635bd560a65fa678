"""Every way of generating against rows computed alone, whole, without a cache."""

from collections import Counter

import jax
import jax.monitoring
import numpy as np
import pytest
from no_cache import (
    VOCAB,
    beginnings,
    forward,
    next_logits,
    small_model,
    small_prompts,
    step_logits,
)
from reference import left_padded, on_mesh

import phi3_jax as phi3
from phi3_jax.generation.outputs import compute_transition_scores

# How often each program was compiled, by its name.
COMPILED: Counter[str] = Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **facts: (
        COMPILED.update([facts.get("fun_name", "?")]) if "backend_compile" in event else None
    )
)

# One row stays below the line of 16, two cross it at different steps, one is beyond it.
LENGTHS = (7, 12, 16, 17)
ROWS = small_prompts(LENGTHS)
NEW = 9
# With a window of 7 columns besides.
CASE = "longrope_window"
OUTPUTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")


def generate(rows=ROWS, **settings):
    settings = {"max_new_tokens": NEW, "eos_token_id": None, **settings}
    return phi3.generate(*small_model(CASE), *left_padded(rows), **settings)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def log_softmax(logits) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(np.asarray(logits), axis=-1))


def assert_right(result, rows=ROWS) -> None:
    """Every token is the likeliest one, and logits are those of the row alone."""
    new = result.sequences[:, max(map(len, rows)) :]
    expected = step_logits(*small_model(CASE), rows, new)
    np.testing.assert_array_equal(new, expected.argmax(axis=-1))
    if result.logits is not None:
        close(np.stack(result.logits, axis=1), expected)


def test_outputs_of_every_step():
    """Also of the steps behind which a row is computed anew with the long factors."""
    result = generate(**dict.fromkeys(OUTPUTS, True))
    new = result.sequences[:, max(LENGTHS) :]
    np.testing.assert_array_equal(generate().sequences, result.sequences)
    assert_right(result)
    held = [part for pair in zip(ROWS, new, strict=True) for part in beginnings(*pair)]
    expected = forward(*small_model(CASE), held, outputs=True)
    for index, row_tokens in enumerate(held):
        (row, step), end = divmod(index, NEW), len(row_tokens)
        run = 1 if step else end  # tokens of the row in this step
        close(result.scores[step][row], expected.logits[index, end - 1])
        pairs = zip(result.hidden_states[step], expected.hidden_states, strict=True)
        for ours, theirs in pairs:
            close(ours[row, -run:], theirs[index, end - run : end])
        pairs = zip(result.attentions[step], expected.attentions, strict=True)
        for ours, theirs in pairs:
            assert ours.shape[2:] == (1 if step else max(LENGTHS), max(LENGTHS) + step)
            close(ours[row, :, -run:, -end:], theirs[index, :, end - run : end, :end])
            assert not ours[row, :, -run:, :-end].any(), "padding is looked at"


def test_scores_of_chosen_tokens():
    result = generate(output_scores=True)
    new = result.sequences[:, max(LENGTHS) :]
    scores = np.stack(result.scores, axis=1)
    expected = np.take_along_axis(scores, new[:, :, None], axis=2)[:, :, 0]
    chosen = compute_transition_scores(result.sequences, result.scores)
    np.testing.assert_array_equal(chosen, expected)
    close(
        compute_transition_scores(result.sequences, result.scores, normalize_logits=True),
        np.take_along_axis(log_softmax(scores), new[:, :, None], axis=2)[:, :, 0],
    )
    with pytest.raises(ValueError, match="output_scores=True"):
        compute_transition_scores(result.sequences, None)
    beams = np.zeros((len(ROWS), NEW), np.int32)
    with pytest.raises(ValueError, match="8 steps of scores .* do not belong to beams of 9"):
        compute_transition_scores(result.sequences, result.scores[1:], beams)


# Of each row, or one for all of them; below, across and beyond the line on their own account.
NEGATIVES = {"default": None, "of each row": (3, 19, 8, 16), "one": (20,), "short": (1, 2, 5, 4)}


@pytest.mark.parametrize("lengths", NEGATIVES.values(), ids=NEGATIVES)
def test_guidance(lengths):
    """Scores are s (c - u) + u of two forwards, each of a row of its own."""
    scale, settings = 1.7, {"guidance_scale": 1.7}
    negative = [row[-1:] for row in ROWS]
    if lengths is not None:
        negative = [row[::-1] for row in small_prompts(lengths)]
        ids, mask = left_padded(negative)
        settings |= {"negative_prompt_ids": ids, "negative_prompt_attention_mask": mask}
        negative = negative * (len(ROWS) // len(negative))
    result = generate(output_scores=True, output_logits=True, **settings)
    new = result.sequences[:, max(LENGTHS) :]
    prompted, against = (step_logits(*small_model(CASE), rows, new) for rows in (ROWS, negative))
    close(np.stack(result.logits, axis=1), prompted)
    prompted, against = log_softmax(prompted), log_softmax(against)
    scores = scale * (prompted - against) + against
    close(np.stack(result.scores, axis=1), scores)
    np.testing.assert_array_equal(new, scores.argmax(axis=-1))
    assert (new != prompted.argmax(axis=-1)).any()
    np.testing.assert_array_equal(generate(**settings).sequences, result.sequences)


@pytest.mark.parametrize("kind", [None, "sliding_window"])
@pytest.mark.parametrize("chunk", [1, 5, 7])
def test_prompts_in_chunks(chunk, kind):
    """Across the line, with padding on the left; and in a ring of the window's 7 slots."""
    settings = dict(cache_implementation=kind, prefill_chunk_size=chunk)
    assert_right(generate(**settings))


def test_a_ring_of_the_windows_width():
    result = generate(cache_implementation="sliding_window")
    assert result.cache.slots == 7
    assert_right(result)


def test_eight_bits_a_number():
    """The first logits are exact; the others are off by a few hundredths of what they vary."""
    result = generate(cache_implementation="quantized", output_logits=True)
    logits = np.stack(result.logits, axis=1)
    new = result.sequences[:, max(LENGTHS) :]
    expected = step_logits(*small_model(CASE), ROWS, new)
    close(logits[:, 0], expected[:, 0])
    off = (logits - expected)[:, 1:].std(axis=-1) / expected[:, 1:].std(axis=-1)
    assert 0 < off.mean() < 0.06
    assert (new == expected.argmax(axis=-1)).mean() > 0.8


@pytest.mark.parametrize("kind", [None, "sliding_window"])
def test_going_on_from_a_cache(kind):
    """As often as one likes, while rows cross the line; what is left to compute may be a step or
    more tokens, which take a row across.
    """
    whole = generate().sequences
    begun = generate(max_new_tokens=4, cache_implementation=kind)
    _, mask = left_padded(ROWS)
    mask = np.pad(mask, ((0, 0), (0, 4)), constant_values=1)

    def go_on(ids, mask, cache, **settings):
        settings = {"max_new_tokens": 5, "eos_token_id": None, **settings}
        return phi3.generate(*small_model(CASE), ids, mask, cache=cache, **settings).sequences

    for _ in range(2):
        np.testing.assert_array_equal(go_on(begun.sequences, mask, begun.cache), whole)
    longer = np.concatenate([begun.sequences, small_prompts((2,)) * len(ROWS)], axis=1)
    mask_longer = np.pad(mask, ((0, 0), (0, 2)), constant_values=1)
    np.testing.assert_array_equal(
        go_on(longer, mask_longer, begun.cache), go_on(longer, mask_longer, None)
    )

    ids = begun.sequences
    other = mask.copy()
    other[0, max(LENGTHS) - 1] = 0
    for words, arguments in (
        ("padding is not where it was", (ids, other)),
        ("holds 20 columns of 4 rows and input_ids have 21 of 2", (ids[:2], mask[:2])),
        ("holds 20 columns of 4 rows and input_ids have 20 of 4", (ids[:, :20], mask[:, :20])),
    ):
        with pytest.raises(ValueError, match=words):
            go_on(*arguments, begun.cache)


def test_several_continuations_of_each_prompt():
    """Side by side, and drawn as rows of a batch are."""
    sample = dict(do_sample=True, seed=3)
    several = generate(ROWS[1:3], num_return_sequences=2, **sample).sequences
    alike = generate([ROWS[1], ROWS[1], ROWS[2], ROWS[2]], **sample).sequences
    np.testing.assert_array_equal(several, alike)
    assert (several[0] != several[1]).any() and (several[2] != several[3]).any()


class Letters:
    """A tokenizer whose every token is a letter."""

    def token_bytes(self, vocab_size: int) -> list[bytes]:
        return [bytes([65 + token]) for token in range(vocab_size)]


def test_other_values_compile_nothing():
    """Of the same settings: prompts of the same bucket, seeds, numbers, words of other lengths."""
    model, params = small_model("gqa")

    def run(lengths, negative, ngram, scale, **settings):
        prompt = left_padded(small_prompts(lengths))
        ids, mask = left_padded(small_prompts(negative))
        against = dict(negative_prompt_ids=ids, negative_prompt_attention_mask=mask)
        settings |= dict(do_sample=True, guidance_scale=scale, tokenizer=Letters(), **against)
        phi3.generate(model, params, *prompt, max_cache_len=64, **settings)
        # With the room for guesses as many columns.
        lookup = dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=ngram, max_cache_len=57)
        phi3.generate(model, params, *prompt, **lookup, **settings)

    run(
        (7, 12), (3, 6), ngram=2, scale=1.7, seed=1, max_new_tokens=4, eos_token_id=[3, 4],
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.3,
        no_repeat_ngram_size=2, bad_words_ids=[[5, 6]], sequence_bias={(7,): 2.0},
        stop_strings=["ZZ"], pad_token_id=0, min_new_tokens=2,
    )  # fmt: skip
    before = COMPILED.copy()
    assert before["jit(decode_loop)"] and before["jit(assisted_loop)"]
    run(
        (14, 2), (13, 1), ngram=3, scale=-0.5, seed=9, max_new_tokens=30, eos_token_id=5,
        temperature=1.9, top_k=20, top_p=0.5, min_p=0.2, repetition_penalty=0.8,
        no_repeat_ngram_size=3, bad_words_ids=[[5, 6], [1, 2], [8]],
        sequence_bias={(9,): -2.0, (4,): 1.0}, stop_strings=["ABC", "XYZ"], pad_token_id=7,
        min_new_tokens=9,
    )  # fmt: skip
    assert before == COMPILED


GUIDED = dict(guidance_scale=1.7, negative_prompt_ids=small_prompts((5,)))
BEAMS = dict(num_beams=2, num_return_sequences=2, cache_implementation="quantized")
# What is asked for on the mesh, and what on one device.
WAYS = {
    "guided lookup": (dict(prompt_lookup_num_tokens=3, **GUIDED), GUIDED),
    "beams in eight bits": (BEAMS, BEAMS),
    "ring": (dict(cache_implementation="sliding_window"), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_on_a_mesh(way):
    """Rows, heads and layers' widths over eight devices: the tokens of one device."""
    model, params = small_model(CASE)
    _, sharded = on_mesh(model, params, phi3.make_mesh(2, 2, 2))
    rows = small_prompts((7, 12, 20, 17))  # none crosses the line: fewer programs
    settings, plain = WAYS[way]
    new = dict(max_new_tokens=4, eos_token_id=None)
    found = phi3.generate(model, sharded, *left_padded(rows), **new, **settings)
    alone = generate(rows, **new, **plain)
    np.testing.assert_array_equal(found.sequences, alone.sequences)
    if alone.sequences_scores is not None:
        close(found.sequences_scores, alone.sequences_scores)


def test_the_book_itself():
    """Padding on the right changes nothing, or the other tests would compare with too little."""
    model, params = small_model(CASE)
    alone = jax.jit(lambda ids: model.apply({"params": params}, ids).logits)
    for row, logits in zip(ROWS, next_logits(model, params, ROWS), strict=True):
        assert logits.shape == (VOCAB,)
        if len(row) in (7, 17):
            close(logits, np.asarray(alone(row[None]))[0, -1])
