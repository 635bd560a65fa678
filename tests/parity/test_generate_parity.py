"""generate() against transformers' own, live: tokens, scores, logits and all other outputs.

All below original_max_position_embeddings and without padding: beyond the one, and beside the
other, the reference is not right, and tests/generation compares with forwards without a cache.
"""

import functools

import numpy as np
import pytest
from reference import config_values, hf_weights, params_of

import phi3_jax as phi3
from phi3_jax.generation.outputs import compute_transition_scores

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("torch_reference")
pytestmark = pytest.mark.parity

VOCAB, ROWS, WIDTH, NEW, PAD = 41, 3, 8, 11, 1
SIZES = dict(vocab_size=VOCAB, num_hidden_layers=2, original_max_position_embeddings=512)
ENDS = [5, 9, 14]
SEEDS = range(20)
BOTH = dict(max_new_tokens=NEW, pad_token_id=PAD, output_scores=True, output_logits=True)


@functools.cache
def models(seed: int, case: str = "gqa") -> tuple:
    """Theirs, ours and our parameters, with the weights of this seed."""
    values = {**config_values(case), **SIZES}
    config = phi3.Phi3Config(**values)
    weights = hf_weights(config, f"generate/{seed}")
    return hf.hf_model(values, weights), phi3.Phi3ForCausalLM(config), params_of(config, weights)


def ids_of(seed: int, rows: int = ROWS, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, width)).astype(np.int32)


def theirs(seed: int, ids: np.ndarray, **settings):
    reference, *_ = models(seed)
    as_torch = {name: hf.as_torch(value) for name, value in settings.items()}
    with torch.no_grad():
        return reference.generate(
            hf.as_torch(ids),
            attention_mask=hf.as_torch(np.ones_like(ids)),
            return_dict_in_generate=True,
            **{**BOTH, **as_torch},
        )


def ours(seed: int, ids: np.ndarray, **settings):
    _, model, params = models(seed)
    # As many columns for all of them, so that they share their programs.
    settings = {**BOTH, "max_cache_len": 32, **settings}
    return phi3.generate(model, params, ids, np.ones_like(ids), **settings)


def close(found, wanted) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def assert_same(found, wanted) -> None:
    np.testing.assert_array_equal(found.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        close(np.stack(getattr(found, name)), np.stack(getattr(wanted, name)))


def compare(seed: int, ids: np.ndarray, **settings) -> None:
    assert_same(ours(seed, ids, **settings), theirs(seed, ids, **settings))


def words(rng, number: int) -> list[list[int]]:
    """Of one, two and three tokens, so few that rows hold their beginnings."""
    return [rng.integers(0, VOCAB, 1 + index % 3).tolist() for index in range(number)]


def biases(rng) -> dict:
    return {tuple(word): float(rng.normal(0, 4)) for word in words(rng, 12)}


# Four sets, so that each compiles once: the width of the prompt and what the settings are.
PROCESSORS = [
    lambda rng: dict(
        repetition_penalty=rng.uniform(0.6, 2),
        no_repeat_ngram_size=int(rng.integers(1, 4)),
        bad_words_ids=words(rng, 9),
        sequence_bias=biases(rng),
        renormalize_logits=True,
        eos_token_id=None,
    ),
    lambda rng: dict(
        encoder_repetition_penalty=rng.uniform(0.6, 2),
        encoder_no_repeat_ngram_size=int(rng.integers(1, 4)),
        suppress_tokens=rng.integers(0, VOCAB, 4).tolist(),
        min_length=WIDTH + int(rng.integers(1, NEW)),
        exponential_decay_length_penalty=(int(rng.integers(NEW)), rng.uniform(1, 2)),
        eos_token_id=ENDS,
    ),
    lambda rng: dict(
        begin_suppress_tokens=rng.integers(0, VOCAB, 9).tolist(),
        min_new_tokens=int(rng.integers(1, NEW)),
        forced_eos_token_id=int(rng.integers(0, VOCAB)),
        remove_invalid_values=True,
        eos_token_id=ENDS,
    ),
    lambda rng: dict(
        forced_bos_token_id=int(rng.integers(0, VOCAB)),
        begin_suppress_tokens=rng.integers(0, VOCAB, 9).tolist(),
        forced_eos_token_id=ENDS[:2],
        repetition_penalty=rng.uniform(0.6, 2),
        eos_token_id=ENDS[0],
    ),
]


@pytest.mark.parametrize("kind", range(len(PROCESSORS)))
def test_greedy_with_processors(kind):
    """A token is forced behind a prompt of one, in the last of the sets."""
    for seed in SEEDS:
        rng = np.random.default_rng(100 * kind + seed)
        settings = PROCESSORS[kind](rng)
        compare(seed, ids_of(seed, width=1 if kind == 3 else WIDTH), **settings)


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("negative", [False, True], ids=["default", "negative"])
def test_guidance(rows, negative):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        settings = dict(guidance_scale=rng.uniform(-1, 4), eos_token_id=ENDS)
        if negative:
            ids = ids_of(seed + 50, rows, int(rng.integers(1, 12)))
            settings["negative_prompt_ids"] = ids
            settings["negative_prompt_attention_mask"] = np.ones_like(ids)
        compare(seed, ids_of(seed, rows), **settings)


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_watermark(scheme):
    marked = 0
    for seed in SEEDS:
        ids, settings = ids_of(seed), dict(eos_token_id=None)
        mark = dict(
            seeding_scheme=scheme, greenlist_ratio=0.4, bias=4.0, context_width=1 + seed % 3
        )
        found = ours(seed, ids, watermarking_config=mark, **settings)
        config = transformers.WatermarkingConfig(**mark)
        assert_same(found, theirs(seed, ids, watermarking_config=config, **settings))
        marked += (found.sequences != ours(seed, ids, **settings).sequences).any()
    assert marked > 10


def test_hidden_states_and_attentions_of_every_step():
    asked = dict(output_hidden_states=True, output_attentions=True, eos_token_id=ENDS)
    for seed in SEEDS:
        found, wanted = (run(seed, ids_of(seed), **asked) for run in (ours, theirs))
        assert_same(found, wanted)
        for name in ("hidden_states", "attentions"):
            steps = zip(getattr(found, name), getattr(wanted, name), strict=True)
            for ours_step, theirs_step in steps:
                for x, y in zip(ours_step, theirs_step, strict=True):
                    assert x.shape == tuple(y.shape)
                    close(x, y)


@pytest.mark.parametrize(
    "way",
    [{}, {"do_sample": True, "top_k": 7}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "sampling", "beams"],
)
def test_scores_of_chosen_tokens(way):
    """Ours are given to both."""
    for seed in SEEDS[:5]:
        result = ours(seed, ids_of(seed), eos_token_id=ENDS, **way)
        beams = result.beam_indices
        for normalize in (False, True):
            expected = models(seed)[0].compute_transition_scores(
                hf.as_torch(result.sequences),
                tuple(torch.from_numpy(step.copy()) for step in result.scores),
                None if beams is None else hf.as_torch(beams),
                normalize_logits=normalize,
            )
            found = compute_transition_scores(
                result.sequences, result.scores, beams, normalize_logits=normalize
            )
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_several_continuations_of_each_prompt():
    """Prompts come in the same order."""
    sample = dict(do_sample=True, num_return_sequences=4, eos_token_id=None)
    found, wanted = (run(0, ids_of(0), **sample).sequences for run in (ours, theirs))
    np.testing.assert_array_equal(found[:, :WIDTH], wanted[:, :WIDTH])
    assert found.shape == tuple(wanted.shape)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_guessed_tokens_are_those_of_plain_greedy_decoding(rows):
    """That of the reference; by prompt lookup and by the model of another seed."""
    for seed in SEEDS:
        # Few different tokens, so that lookup finds some.
        ids, settings = ids_of(seed, rows) % 6, dict(eos_token_id=ENDS, repetition_penalty=0.8)
        wanted = theirs(seed, ids, **settings).sequences
        _, model, params = models(seed + 1)
        lookup = dict(prompt_lookup_num_tokens=3, max_cache_len=25)
        draft = dict(assistant=(model, params), num_assistant_tokens=3, max_cache_len=25)
        for way in (lookup, draft):
            plain = dict(output_scores=False, output_logits=False)
            found = ours(seed, ids, **settings, **way, **plain)
            np.testing.assert_array_equal(found.sequences, wanted)


def test_going_on_from_a_cache():
    """With tokens of the caller's behind those that were generated."""
    for seed in SEEDS:
        more = ids_of(seed + 50, width=4)
        settings = dict(eos_token_id=None, max_new_tokens=5)
        begun, begun_there = (run(seed, ids_of(seed), **settings) for run in (ours, theirs))
        assert_same(begun, begun_there)
        ids = np.concatenate([begun.sequences, more], axis=1)
        wanted = theirs(seed, ids, past_key_values=begun_there.past_key_values, **settings)
        assert_same(ours(seed, ids, cache=begun.cache, **settings), wanted)
