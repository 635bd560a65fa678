"""Prefill, steps, streams: what stops a row, what compiles, what is refused."""

import functools
from collections import Counter

import jax
import jax.monitoring
import numpy as np
import pytest
from reference import (
    PROMPT_LENGTHS,
    config_values,
    hf_weights,
    left_padded,
    on_mesh,
    params_of,
    prompts,
    tokens,
)

import phi3_jax as phi3
from phi3_jax.generation import driver, request
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.decoding import bucket
from phi3_jax.generation.request import stream

# How often each program was compiled, by its name.
COMPILED: Counter[str] = Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **facts: (
        COMPILED.update([facts.get("fun_name", "?")]) if "backend_compile" in event else None
    )
)


@functools.cache
def model_and_params(case: str):
    config = phi3.Phi3Config(**config_values(case))
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))


def generate(ids, mask=None, case="gqa", **settings):
    settings.setdefault("eos_token_id", None)
    return phi3.generate(*model_and_params(case), ids, mask, **settings).sequences


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 64, 65, 129, 4096, 4097)] == [
        16, 16, 32, 64, 80, 160, 4096, 5120,
    ]  # fmt: skip
    assert all(n <= bucket(n) <= max(16 * -(-n // 16), 1.25 * n) for n in range(1, 9000))


def test_steps_and_loop_choose_the_same():
    ids, mask = left_padded(prompts())
    settings = dict(max_new_tokens=9, do_sample=True, temperature=1.3, top_p=0.9, seed=3)
    for case in ("gqa", "longrope"):
        looped = generate(ids, mask, case, **settings)
        steps = stream(*model_and_params(case), ids, mask, eos_token_id=None, **settings)
        np.testing.assert_array_equal(np.stack(list(steps), axis=1), looped[:, ids.shape[1] :])


@pytest.mark.parametrize("case", ["longrope", "longrope_partial_tied"])
def test_cache_across_the_line_is_that_of_a_fresh_prefill(case):
    """Whatever each row's crossing was, no slot is left with short factors (traps 11, 12)."""
    model, params = model_and_params(case)
    ids, mask = left_padded(prompts(), 1)
    asked = request.prepare(model, params, ids, mask, max_new_tokens=12, eos_token_id=None)
    asked.start()
    asked.run()
    sequences, cache = asked.sequences, asked.state.cache.split(False)
    longer = np.pad(mask, ((0, 0), (0, 11)), constant_values=1)
    whole = request.prepare(model, params, sequences[:, :-1], longer, max_new_tokens=1)
    whole.start()
    other = whole.state.cache.split(False)
    used = int(cache.length)
    assert used == int(other.length)
    valid = np.asarray(cache.valid_BS)[None, :, None, :used, None]
    for ours, fresh in (("k_LBKSH",) * 2, ("v_LBKSH",) * 2):
        a, b = getattr(cache, ours)[..., :used, :], getattr(other, fresh)[..., :used, :]
        np.testing.assert_allclose(a * valid, b * valid, rtol=1e-3, atol=1e-4)
    assert asked.state.long_R.all()


def test_crossing_leaves_the_other_rows_alone():
    model, params = model_and_params("longrope")
    ids, mask = left_padded(prompts((16, 3)))
    asked = request.prepare(model, params, ids, mask, max_new_tokens=5, eos_token_id=None)
    asked.start()
    before = np.asarray(asked.state.cache.split(False).k_LBKSH)
    asked.cross()
    after = np.asarray(asked.state.cache.split(False).k_LBKSH)
    assert asked.state.long_R.tolist() == [True, False]
    np.testing.assert_array_equal(after[:, 1], before[:, 1])
    assert (after[:, 0, :, 1:16] != before[:, 0, :, 1:16]).mean() > 0.9
    assert int(asked.state.cache.length) == 16


def test_a_row_does_not_depend_on_its_neighbours():
    rows = prompts()
    for settings in ({}, {"do_sample": True, "top_k": 20}):
        together = generate(*left_padded(rows, 6), "longrope", max_new_tokens=8, **settings)
        others = [rows[0], *prompts((3, 30, 2, 15))]
        changed = generate(*left_padded(others), "longrope", max_new_tokens=8, **settings)
        np.testing.assert_array_equal(together[0, -8:], changed[0, -8:])


def test_end_tokens_stay_and_padding_follows():
    """A list of ends, each row at its own (trap 35)."""
    ids, mask = left_padded(prompts())
    free = generate(ids, mask, max_new_tokens=12)[:, ids.shape[1] :]
    first, second = int(free[0, 2]), int(free[1, 5])
    ended = generate(ids, mask, max_new_tokens=12, eos_token_id=[first, second], pad_token_id=7)
    for row, tail in zip(free, ended[:, ids.shape[1] :], strict=True):
        stops = np.flatnonzero((row == first) | (row == second))
        length = stops[0] + 1 if stops.size else len(row)
        np.testing.assert_array_equal(tail[:length], row[: min(length, len(tail))])
        assert (tail[length:] == 7).all()
    assert any((row == first).any() for row in free)


def test_generation_ends_when_every_row_has():
    ids = tokens(1, 5)
    free = generate(ids, max_new_tokens=20)
    end = int(free[0, 8])
    count = 1 + int(np.flatnonzero(free[0, 5:] == end)[0])
    assert generate(ids, max_new_tokens=20, eos_token_id=end).shape == (1, 5 + count)


def test_settings_are_laid_over_one_another():
    model, params = model_and_params("gqa")
    ids = tokens(1, 4)
    folder = model.clone(generation_config=GenerationConfig(max_new_tokens=3, eos_token_id=None))
    length = lambda *args, **kw: phi3.generate(*args, **kw).sequences.shape[1] - 4  # noqa: E731
    assert length(folder, params, ids) == 3
    passed = GenerationConfig(max_new_tokens=5)
    assert length(folder, params, ids, generation_config=passed) == 5
    assert length(folder, params, ids, generation_config=passed, max_new_tokens=2) == 2
    assert length(model, params, ids, max_length=10, eos_token_id=None) == 6
    assert length(model, params, ids, eos_token_id=None) == 20


def test_sampling_follows_its_seed():
    ids = tokens(3, 4)
    draw = lambda seed: generate(ids, max_new_tokens=10, do_sample=True, seed=seed)  # noqa: E731
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()
    same = generate(np.repeat(ids[:1], 3, axis=0), max_new_tokens=10, do_sample=True)
    assert (same[0] != same[1]).any(), "equal prompts must not give equal samples"


def test_repetition_penalty_spares_padding():
    ids, mask = left_padded(prompts())
    strong = generate(ids, mask, max_new_tokens=12, repetition_penalty=1e6)
    for row, keep in zip(strong, mask, strict=True):
        new = row[ids.shape[1] :]
        own = set(row[: ids.shape[1]][keep == 1].tolist())
        assert len(set(new.tolist())) == 12 and not own & set(new.tolist())


def test_nothing_compiles_while_decoding_or_for_another_length():
    model, params = model_and_params("gqa")
    new = dict(max_new_tokens=4, do_sample=True, temperature=2.0, max_cache_len=64)

    def run(width, **changes):
        settings = {"eos_token_id": None, **new, **changes}
        phi3.generate(model, params, tokens(2, width), **settings)
        list(stream(model, params, tokens(2, width), **settings))

    run(3)
    before = COMPILED.copy()
    run(7)
    run(15, max_new_tokens=30, temperature=0.3, top_k=7, seed=9, eos_token_id=[5, 6])
    assert COMPILED == before
    run(17)  # the next bucket: one more prefill, and the steps stay as they are
    new = COMPILED - before
    assert new["jit(prefill)"] == 1
    assert not {"jit(decode_step)", "jit(decode_loop)", "jit(first_state)"} & new.keys()


def test_padding_is_inferred_unless_it_is_an_end():
    rows = prompts()[:2]
    ids, mask = left_padded(rows)
    assert ids[0, 0] == 0
    with_mask = generate(ids, mask, max_new_tokens=6)
    np.testing.assert_array_equal(generate(ids, max_new_tokens=6, pad_token_id=0), with_mask)
    not_inferred = generate(ids, max_new_tokens=6, pad_token_id=0, eos_token_id=[0, 96])
    unmasked = generate(ids, np.ones_like(mask), max_new_tokens=6, eos_token_id=[0, 96])
    np.testing.assert_array_equal(not_inferred, unmasked)


@pytest.mark.parametrize(
    "ids, settings, words",
    [
        ([[3, 97]], {}, "97, outside the vocabulary of 97"),
        ([[3, -1]], {}, "-1, outside the vocabulary"),
        ([3, 4], {}, "input_ids has shape"),
        ([[]], {}, "at least one token"),
        ([[0.5]], {}, "whole numbers"),
        ([[3, 4]], {"attention_mask": [[1]]}, "mask of input_ids has shape"),
        ([[3, 4]], {"attention_mask": [[1, 0]]}, "row 0 of the prompt has padding on the right"),
        ([[3, 4]], {"attention_mask": [[0, 0]]}, "no token at all"),
        ([[3, 4]], {"max_new_tokens": 7, "max_cache_len": 8}, "at most 6 new tokens"),
        ([[3, 4]], {"max_length": 2}, "max_length is 2"),
        ([[3, 4]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[3, 4]], {"do_sample": True, "temperature": 0.0}, "do_sample=False"),
        ([[3, 4]], {"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ([[3, 4]], {"top_p": "x"}, "top_p is 'x'"),
        ([[3, 4]], {"seed": 2**64}, "seed is"),
        ([[3, 4]], {"extra": 3}, "setting 'extra'"),
        ([[3, 4], [5]], {}, "pad shorter rows on the left"),
        ([[3] * 600], {}, "600 tokens and the model 512 positions"),
        ([[3] * 9], {"max_cache_len": 8, "max_new_tokens": 1}, "shorten it"),
        ([[3, 4]], {"max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ([[3, 4]], {"pad_token_id": 99}, "pad_token_id is 99"),
    ],
)
def test_refused_before_anything_runs(ids, settings, words, monkeypatch):
    monkeypatch.setattr(driver, "prefill", None)
    model, params = model_and_params("gqa")
    with pytest.raises(ValueError, match=words):
        phi3.generate(model, params, ids, **settings)
    with pytest.raises(ValueError, match=words):
        stream(model, params, ids, **settings)


def test_folder_settings_that_are_not_here_are_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [2, 5], "penalty_alpha": 0.6, "top_p": null, '
        '"transformers_version": "4.39.3"}'
    )
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_ids == (2, 5) and config.top_p == 1.0
    model, params = model_and_params("gqa")
    with pytest.raises(ValueError, match="penalty_alpha is 0.6"):
        phi3.generate(model.clone(generation_config=config), params, [[3]])
    beamless = GenerationConfig.from_call(
        {"num_beams": 1, "suppress_tokens": [], "penalty_alpha": None}
    )
    phi3.generate(model.clone(generation_config=config), params, [[3]], generation_config=beamless)
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again == config and again.extra["transformers_version"] == "4.39.3"


def test_a_folder_may_say_greedy_with_temperature_zero(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.0}')
    model, params = model_and_params("gqa")
    config = GenerationConfig.from_pretrained(tmp_path)
    phi3.generate(model.clone(generation_config=config), params, [[3]], max_new_tokens=1)


def test_numpy_values_are_taken():
    ids = tokens(1, 4)
    plain = generate(ids, max_new_tokens=4, eos_token_id=[7, 8])
    numpy = generate(ids, max_new_tokens=np.int64(4), eos_token_id=np.array([7, 8]))
    np.testing.assert_array_equal(plain, numpy)


def test_sampling_settings_without_sampling_are_said_to_be_idle():
    with pytest.warns(UserWarning, match="temperature: no effect without do_sample"):
        generate(tokens(1, 4), max_new_tokens=2, temperature=0.7)


def test_default_length_ends_at_the_last_position():
    model, params = model_and_params("gqa")
    ids = tokens(1, 505)
    assert phi3.generate(model, params, ids, eos_token_id=None).sequences.shape == (1, 512)


def test_a_model_without_a_head_is_refused():
    model, params = model_and_params("gqa")
    with pytest.raises(ValueError, match="Phi3Model has no head"):
        phi3.generate(phi3.Phi3Model(model.config), params["model"], [[3]])


def test_parameters_on_another_mesh_are_refused():
    model, params = model_and_params("gqa")
    mesh, other = phi3.make_mesh(1, 2, 4), phi3.make_mesh(2, 2, 2)
    _, sharded = on_mesh(model, params, mesh)
    with pytest.raises(ValueError, match="the parameters are on the mesh"):
        phi3.generate(model, sharded, [[3]], mesh=other)
    with pytest.raises(ValueError, match="the parameters are on one device"):
        phi3.generate(model, params, [[3]], mesh=other)
    alone = phi3.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="the parameters are on the mesh"):
        phi3.generate(model, sharded, [[3]], mesh=alone)


@pytest.mark.parametrize("case", ["gqa", "longrope"])
def test_nothing_compiles_while_decoding_on_a_mesh(case):
    """With the batch sharded, and rows that cross; and the tokens are those of one device."""
    model, params = model_and_params(case)
    mesh = phi3.make_mesh(2, 2, 2)
    _, sharded = on_mesh(model, params, mesh)
    ids, mask = left_padded(prompts((7, 12, 16, 15)))
    new = dict(max_new_tokens=7, eos_token_id=None)
    steps_compiled = COMPILED["jit(decode_step)"]
    pieces = stream(model, sharded, ids, mask, **new)
    got = [next(pieces), next(pieces)]
    before = COMPILED.total()
    for piece in pieces:
        got.append(piece)
        crossing = case == "longrope" and len(got) in (3, 6, 7)
        assert COMPILED.total() == before or crossing, COMPILED
        before = COMPILED.total()
    assert COMPILED["jit(decode_step)"] == steps_compiled + 1
    alone = phi3.generate(model, params, ids, mask, **new).sequences
    np.testing.assert_array_equal(np.stack(got, axis=1), alone[:, ids.shape[1] :])
    looped = phi3.generate(model, sharded, ids, mask, **new).sequences
    np.testing.assert_array_equal(looped, alone)


def test_prompt_lengths_cover_the_line():
    assert min(PROMPT_LENGTHS) < 16 < max(PROMPT_LENGTHS) and 16 in PROMPT_LENGTHS
