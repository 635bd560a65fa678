"""What the host has a part in: clocks, criteria, streamers, constraints; and what is refused."""

import types

import jax
import numpy as np
import pytest
from no_cache import VOCAB, small_model, small_prompts
from reference import left_padded

import phi3_jax as phi3
from phi3_jax.generation import driver, prepare
from phi3_jax.generation.request import stream

ROWS = small_prompts((5, 3))
WIDE = 5
# All requests fit the same programs.
COMMON = dict(max_new_tokens=20, eos_token_id=None, max_cache_len=32)


def generate(rows=ROWS, **settings):
    settings = {**COMMON, **settings}
    return phi3.generate(*small_model("gqa"), *left_padded(rows), **settings)


def tail(result) -> np.ndarray:
    return result.sequences[:, WIDE:]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second whenever somebody looks at it."""
    seconds = iter(range(1000))
    time = types.SimpleNamespace(monotonic=lambda: next(seconds))
    for module in (driver, prepare):
        monkeypatch.setattr(module, "time", time)


def test_time_is_looked_at_now_and_then(clock):
    """Looks at 0, when the request is made, and at 1, 2 and 3, with the first token and after
    every eight.
    """
    result = generate(max_time=2.5)
    assert tail(result).shape == (2, 17)
    np.testing.assert_array_equal(result.sequences, generate(max_new_tokens=17).sequences)


def test_time_and_streams(clock):
    """Behind every token; a row is not ended by the time, so that nothing is padding."""
    pieces = list(stream(*small_model("gqa"), *left_padded(ROWS), max_time=4.5, **COMMON))
    np.testing.assert_array_equal(np.stack(pieces, axis=1), tail(generate(max_new_tokens=5)))


def test_criteria_end_all_rows_or_some():
    """They see sequences with padding, and scores if those are asked for."""
    free = generate()
    seen = []

    def at_eight(sequences, scores):
        seen.append((sequences.shape, scores))
        return sequences.shape[1] >= 8

    result = generate(stopping_criteria=[at_eight])
    np.testing.assert_array_equal(result.sequences, free.sequences[:, :8])
    assert seen == [((2, width), None) for width in (6, 7, 8)]

    end = tail(free)[0, 4]
    first = [[*np.flatnonzero(row == end), 19][0] + 1 for row in tail(free)]
    assert first[0] != first[1]
    scores_seen = []
    result = generate(
        stopping_criteria=[
            lambda sequences, scores: sequences[:, -1] == end,
            lambda sequences, scores: bool(scores_seen.append(len(scores))),
        ],
        output_scores=True,
        pad_token_id=7,
    )
    for row, length, wanted in zip(tail(result), first, tail(free), strict=True):
        np.testing.assert_array_equal(row[:length], wanted[:length])
        assert (row[length:] == 7).all()
    assert scores_seen == list(range(1, len(scores_seen) + 1)) == list(range(1, max(first) + 1))


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self, broken_at=None):
        self.calls, self.broken_at = [], broken_at

    def put(self, ids):
        if len(self.calls) == self.broken_at:
            raise RuntimeError("the pipe is broken")
        self.calls.append(np.asarray(ids).tolist())

    def end(self):
        self.calls.append("end")


class Failing(Recorder):
    def fail(self, error):
        self.calls.append(error)


@pytest.mark.parametrize("way", [{}, {"prompt_lookup_num_tokens": 3, "max_cache_len": 25}], ids=str)
def test_streamers_get_the_prompt_then_each_token(way):
    """Rounds of several tokens, too."""
    streamer, ids = Recorder(), ROWS[0][None]
    settings = {**COMMON, "max_new_tokens": 9, **way}
    result = phi3.generate(*small_model("gqa"), ids, streamer=streamer, **settings)
    np.testing.assert_array_equal(
        result.sequences, phi3.generate(*small_model("gqa"), ids, **settings).sequences
    )
    assert streamer.calls == [ids.tolist(), *[[x] for x in tail(result)[0].tolist()], "end"]


def test_streamers_hear_of_errors():
    prompt = (*small_model("gqa"), ROWS[0][None])
    streamer = Failing(broken_at=3)
    with pytest.raises(RuntimeError, match="the pipe is broken") as caught:
        phi3.generate(*prompt, streamer=streamer, **COMMON)
    assert len(streamer.calls) == 4 and streamer.calls[-1] is caught.value
    with pytest.raises(RuntimeError, match="the pipe is broken"):
        phi3.generate(*prompt, streamer=Recorder(broken_at=0), **COMMON)
    streamer = Failing()
    with pytest.raises(ValueError, match="allows no token"):
        phi3.generate(*prompt, streamer=streamer, prefix_allowed_tokens_fn=lambda *_: [], **COMMON)
    assert isinstance(streamer.calls[-1], ValueError) and "end" not in streamer.calls


@pytest.mark.parametrize(
    "rows, settings",
    [(2, {}), (1, {"num_beams": 2}), (1, {"num_return_sequences": 2, "do_sample": True})],
    ids=["rows", "beams", "continuations"],
)
def test_streamers_take_one_row(rows, settings, monkeypatch):
    monkeypatch.setattr(driver, "prefill", None)
    streamer = Recorder()
    with pytest.raises(ValueError, match="a streamer takes one row"):
        generate(ROWS[:rows], streamer=streamer, **settings)
    assert not streamer.calls
    if "num_beams" in settings:
        with pytest.raises(ValueError, match="beams are known when all are there"):
            stream(*small_model("gqa"), ROWS[:1], **settings)


@pytest.mark.parametrize("beams", [1, 2])
def test_allowed_tokens(beams):
    """Batch ids are those of the prompts, whatever becomes of each; padding is not shown."""
    asked = []

    def allowed(batch_id, ids):
        asked.append((batch_id, ids[: len(ROWS[batch_id])].tolist(), len(ids)))
        return [3, 4, 5, 6] if batch_id == 0 else [ids[-1], 20 + len(ids) % 2]

    way = dict(num_beams=2) if beams == 2 else dict(do_sample=True)
    result = generate(
        prefix_allowed_tokens_fn=allowed, num_return_sequences=2, max_new_tokens=6, **way
    )
    assert {batch_id for batch_id, *_ in asked} == {0, 1}
    for batch_id, prompt, length in asked:
        assert prompt == ROWS[batch_id].tolist() and length < len(ROWS[batch_id]) + 6
    first, second = tail(result)[:2], tail(result)[2:]
    assert np.isin(first, [3, 4, 5, 6]).all()
    assert np.isin(second, [20, 21, ROWS[1][-1]]).all()
    assert len(asked) == 4 * 6


def test_processors_of_the_caller_run_inside_the_loop(monkeypatch):
    """They see a row's own tokens, -1 behind them, and how many those are."""

    def next_is_the_sum(tokens_BS, length_B, logits_BV):
        held_BS = np.arange(tokens_BS.shape[1]) < length_B[:, None]
        empty_B = ((tokens_BS == -1) != held_BS).all(axis=1)
        total_B = jax.numpy.where(held_BS, tokens_BS, 0).sum(axis=1) % VOCAB
        wanted_BV = jax.nn.one_hot(total_B, VOCAB) * 1000
        return jax.numpy.where(empty_B[:, None], logits_BV + wanted_BV, jax.numpy.nan)

    monkeypatch.setattr(driver, "decode_step", None)
    result = generate(logits_processor=[next_is_the_sum])
    for row, new in zip(ROWS, tail(result), strict=True):
        held = row.tolist()
        for token in new.tolist():
            assert token == sum(held) % VOCAB
            held.append(token)


def test_strategies_of_the_caller():
    """Whatever it returns; the checked request is what it has to do with."""
    free = generate()

    def two_steps(request):
        assert isinstance(request, driver.Request) and request.seen.step == 0
        request.start()
        request.step()
        request.step()
        assert request.goes_on
        return "mine", request.result()

    mine, result = generate(custom_generate=two_steps)
    assert mine == "mine"
    np.testing.assert_array_equal(result.sequences, free.sequences[:, : WIDE + 3])

    def start_and_run(request):
        request.start()
        request.run()
        return request.result().sequences

    np.testing.assert_array_equal(generate(custom_generate=start_and_run), free.sequences)
    with pytest.raises(ValueError, match="leave the streamer out"):
        generate(ROWS[:1], custom_generate=two_steps, streamer=Recorder())


def test_without_a_prompt():
    model, params = small_model("gqa")
    settings = {**COMMON, "max_new_tokens": 3}
    alone = phi3.generate(model, params, **settings).sequences
    np.testing.assert_array_equal(alone, phi3.generate(model, params, [[1]], **settings).sequences)
    other = phi3.generate(model, params, bos_token_id=9, **settings).sequences
    assert other[0, 0] == 9 and other.shape == (1, 4)


def test_the_folders_settings_can_be_left_out():
    model, params = small_model("gqa")
    folder = model.clone(generation_config=phi3.GenerationConfig(max_new_tokens=3))
    asked = dict(max_cache_len=32, eos_token_id=None)
    for more, new in (({}, 3), ({"use_model_defaults": False}, 20)):
        result = phi3.generate(folder, params, [[3, 4]], **asked, **more)
        assert result.sequences.shape == (1, 2 + new)


def test_the_cache_can_be_left_out_of_the_result():
    assert generate(use_cache=False).cache is None and generate().cache is not None


DRAFT = {"assistant": "the model itself"}
LOOKUP = {"prompt_lookup_num_tokens": 3}
RING = {"cache_implementation": "sliding_window"}
GUIDED = {"guidance_scale": 1.5}
BEFORE = {"cache": "of the prompt's first token"}
REFUSED = [
    ({**DRAFT, "num_beams": 2}, "assisted generation and num_beams > 1 do not go together"),
    ({**LOOKUP, "num_beams": 2}, "drafts are for greedy decoding"),
    (
        {**LOOKUP, "prefix_allowed_tokens_fn": lambda *_: [3]},
        "assisted generation and what decides token by token on the host",
    ),
    ({**DRAFT, "output_hidden_states": True}, "assisted generation and output_hidden_states or"),
    ({**LOOKUP, "output_attentions": True}, "assisted generation and output_hidden_states or"),
    ({**DRAFT, **RING}, "assisted generation and a sliding-window cache, which cannot be cut"),
    ({**LOOKUP, "cache": "a ring"}, "assisted generation and a sliding-window cache"),
    ({**DRAFT, **LOOKUP}, "an assistant and prompt_lookup_num_tokens do not go together"),
    ({"output_hidden_states": True, "prefill_chunk_size": 2}, "a prompt in parts"),
    ({"output_attentions": True, **BEFORE}, "outputs of the whole prompt and a prompt in parts"),
    ({"output_attentions": True, **RING}, "output_attentions and a sliding-window cache"),
    ({"negative_prompt_ids": [[3]]}, "negative_prompt_ids and no guidance_scale"),
    ({"negative_prompt_ids": [[3]], "guidance_scale": 1.0}, "and no guidance_scale"),
    ({**BEFORE, **GUIDED}, "a cache from before and guidance_scale"),
    ({**BEFORE, **RING}, "a cache from before, which has its kind, and another"),
    ({"stop_strings": "x"}, r"stop_strings needs the tokenizer: generate\(..., tokenizer="),
    ({"token_healing": True}, "token_healing needs the tokenizer"),
    ({**GUIDED, "negative_prompt_ids": [[3]] * 3}, "have 3 rows and input_ids 2; give one"),
    ({**GUIDED, "negative_prompt_ids": [[VOCAB]]}, "negative_prompt_ids holds 29, outside"),
    ({**GUIDED, "negative_prompt_ids": [[]]}, "negative_prompt_ids has shape"),
    (
        {**GUIDED, "negative_prompt_ids": [[3, 0]], "negative_prompt_attention_mask": [[1, 0]]},
        "row 0 of negative_prompt_ids has padding on the right",
    ),
    (
        {**GUIDED, "negative_prompt_ids": [[3, 4]], "negative_prompt_attention_mask": [[1]]},
        "the attention mask of negative_prompt_ids has shape",
    ),
    ({"input_ids": None, "attention_mask": None, "bos_token_id": None}, "begins with bos_token_id"),
    ({"num_return_sequences": 2}, "greedy decoding has only one"),
    ({"num_return_sequences": 3, "num_beams": 2}, "there are no more sequences than beams"),
]


@pytest.mark.parametrize("settings, words", REFUSED, ids=[words[:60] for _, words in REFUSED])
def test_refused_before_anything_runs(settings, words, monkeypatch):
    model, params = small_model("mha_window")
    kind = {"a ring": True, "of the prompt's first token": False}
    settings = {**COMMON, **settings}
    if "cache" in settings:
        ring = kind[settings["cache"]]
        settings["cache"] = phi3.KVCache.init(model.config, 2, 32, "float32", ring=ring)
    if "assistant" in settings:
        settings["assistant"] = (model, params)
    ids, mask = left_padded(ROWS)
    prompt = {"input_ids": ids, "attention_mask": mask}
    monkeypatch.setattr(driver, "prefill", None)
    with pytest.raises(ValueError, match=words):
        phi3.generate(model, params, **{**prompt, **settings})
