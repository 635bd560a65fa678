"""The whole chain of processors against the reference's own, with one of them on and with many.

Every row is compared as far as the reference decides: which of several equally likely tokens a cut
leaves is open there (torch's sort is not stable), how many of them is not. Rows of unequal length
are compared with the reference on the row alone, whose processors take padding for tokens.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.settings import Past, Settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

B, V, T, CAPACITY, NEW = 6, 61, 7, 16, 8
ENDS = [3, 5]

run = jax.jit(lambda settings, past, logits, allowed: settings.process(past, logits, allowed))
grown = jax.jit(lambda past, token_B: past.append(token_B))


class Model(transformers.GenerationMixin):
    config = transformers.Phi3Config(vocab_size=V, pad_token_id=0)


def theirs(settings, ids, step, logits, **more) -> np.ndarray:
    """The reference's scores for tokens `ids` of which `step` are no longer the prompt."""
    config = transformers.GenerationConfig(**settings)
    width = ids.shape[1] - step
    if config.max_new_tokens is not None:
        config.max_length = config.max_new_tokens + width
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + width
    ends = config.eos_token_id
    config._eos_token_tensor = None if ends is None else torch.tensor(ends)
    prompt = torch.from_numpy(ids[:: config.num_beams, :width])
    chain = Model._get_logits_processor(
        Model(), config, width, prompt, device="cpu",
        model_kwargs={"attention_mask": torch.ones_like(prompt)}, **more,
    )  # fmt: skip
    return chain(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()


def ours(settings, ids, step, logits, mask=None, allowed=None, processors=()) -> np.ndarray:
    width = ids.shape[1] - step
    config = GenerationConfig(**settings)
    compiled = Settings.of(config, V, width, settings.get("max_new_tokens"), processors)
    prompt = ids[:, :width].astype(np.int32)
    past = Past.of(compiled, prompt, np.ones_like(prompt, bool) if mask is None else mask, CAPACITY)
    for token_B in ids[:, width:].T.astype(np.int32):
        past = grown(past, token_B)
    return np.array(run(compiled, past, jnp.asarray(logits), allowed))


def logits_of(rng) -> np.ndarray:
    """Ties everywhere; impossible tokens; plain; certain and extreme ones."""
    logits = rng.normal(0, 3, (B, V)).astype(np.float32)
    logits[0] = np.round(logits[0])
    logits[1, rng.choice(V, 40, replace=False)] = -np.inf
    logits[3, rng.integers(V)] = 60
    logits[4, rng.choice(V, 2, replace=False)] = [1e30, -1e30]
    return logits


def tokens_of(rng, width=T, low=6, high=12) -> np.ndarray:
    """Few different tokens, so that some come again and n-grams do."""
    return rng.integers(low, high, (B, width)).astype(np.int64)


def assert_equal(ours, theirs, rtol=2e-6):
    ours[0], theirs[0] = np.sort(ours[0]), np.sort(theirs[0])
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-6)


def some(rng, count, low=0, high=V):
    return rng.choice(np.arange(low, high), count, replace=False).tolist()


def sequences(rng):
    """Tokens, pairs and longer sequences, some of which the rows of tokens_of hold."""
    lengths = [1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 5, 12]
    return {tuple(rng.integers(6, 12, n).tolist()): float(rng.normal(0, 5)) for n in lengths}


ONE = {
    "sequence_bias": sequences,
    "encoder_repetition_penalty": lambda rng: float(rng.uniform(0.5, 2)),
    "repetition_penalty": lambda rng: float(rng.uniform(0.5, 2)),
    "no_repeat_ngram_size": lambda rng: int(rng.integers(1, 5)),
    "encoder_no_repeat_ngram_size": lambda rng: int(rng.integers(1, 5)),
    # An end among them alone is left out.
    "bad_words_ids": lambda rng: [[ENDS[0]], [ENDS[1], 7], *map(list, sequences(rng))],
    "min_length": lambda rng: T + int(rng.integers(1, NEW)),
    "min_new_tokens": lambda rng: int(rng.integers(1, NEW)),
    # Forced tokens must not be suppressed ones.
    "forced_bos_token_id": lambda rng: int(rng.integers(V - 3, V)),
    "forced_eos_token_id": lambda rng: some(rng, int(rng.integers(1, 4)), V - 3),
    "remove_invalid_values": lambda rng: True,
    "exponential_decay_length_penalty": lambda rng: (int(rng.integers(3)), rng.uniform(0.5, 3)),
    "suppress_tokens": lambda rng: some(rng, int(rng.integers(1, 20)), high=V - 3),
    "begin_suppress_tokens": lambda rng: some(rng, int(rng.integers(1, 20))),
    "renormalize_logits": lambda rng: True,
    "temperature": lambda rng: float(rng.uniform(0.1, 3)),
    "top_h": lambda rng: float(rng.uniform(0.05, 0.99)),
    "top_k": lambda rng: int(rng.integers(1, V + 9)),
    "top_p": lambda rng: float(rng.uniform(0.05, 0.99)),
    "min_p": lambda rng: float(rng.uniform(0.01, 0.5)),
    "typical_p": lambda rng: float(rng.uniform(0.05, 0.99)),
    "epsilon_cutoff": lambda rng: float(rng.uniform(0.001, 0.2)),
    "eta_cutoff": lambda rng: float(rng.uniform(0.001, 0.2)),
}
WARPERS = list(ONE)[-8:]


def drawn(rng, names, **more):
    """Settings with random values for these names; sampled, so that warpers count."""
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": ENDS, "max_new_tokens": NEW}
    return settings | {name: ONE[name](rng) for name in names} | more


@pytest.mark.parametrize("name", list(ONE))
def test_one_alone(name):
    """20 seeds, at steps on both sides of every limit."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        settings = drawn(rng, [name])
        step = [0, NEW - 1, int(rng.integers(NEW))][seed % 3]
        # The first token is forced behind a prompt of one; the second then is where texts begin.
        width = 1 if name == "forced_bos_token_id" and seed % 2 else T
        ids, logits = tokens_of(rng, width + step), logits_of(rng)
        if name in (
            "remove_invalid_values",
            "repetition_penalty",
            "exponential_decay_length_penalty",
        ):
            logits[5, some(rng, 9)] = [np.nan, np.inf, -np.inf] * 3
        assert_equal(ours(settings, ids, step, logits), theirs(settings, ids, step, logits))


@pytest.mark.parametrize("name", sorted(set(WARPERS) - {"top_h", "eta_cutoff"}))
def test_infinite_logits(name):
    """The reference refuses them where it asks for the entropy."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        settings, ids, logits = drawn(rng, [name]), tokens_of(rng), logits_of(rng)
        logits[2, some(rng, 2)] = np.inf
        assert_equal(ours(settings, ids, 0, logits), theirs(settings, ids, 0, logits))


@pytest.mark.parametrize("width, step", [(1, 0), (1, 1), (1, 2), (T, 0), (T, 1)])
def test_texts_begin_behind_a_forced_token(width, step):
    rng = np.random.default_rng(0)
    settings = drawn(rng, ["forced_bos_token_id", "begin_suppress_tokens"])
    ids, logits = tokens_of(rng, width + step), logits_of(rng)
    assert_equal(ours(settings, ids, step, logits), theirs(settings, ids, step, logits))


@pytest.mark.parametrize("name", WARPERS[2:])
def test_beams_keep_a_token_beside_the_ends(name):
    """Of equal logits, which are cut is open; the certain token makes the cut go to the limit."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        settings = drawn(rng, [name], num_beams=2)
        settings[name] = {"top_k": 1, "top_p": 0.01, "min_p": 0.9, "typical_p": 0.05}.get(name, 0.5)
        ids, logits = tokens_of(rng), logits_of(rng)
        logits[4] = 2 * logits[5]
        ours_BV, theirs_BV = ours(settings, ids, 0, logits), theirs(settings, ids, 0, logits)
        assert_equal(ours_BV, theirs_BV)
        assert (np.isfinite(ours_BV).sum(axis=1) >= 3).all()


@pytest.mark.parametrize("seed", range(20))
def test_many_in_the_references_order(seed):
    """Half of the settings; which half has four variants, each of them compiled once."""
    half, rng = np.random.default_rng(seed % 4), np.random.default_rng(seed)
    settings = drawn(rng, [name for name in ONE if half.random() < 0.5])
    if "forced_eos_token_id" in settings:
        # Of several, all equally likely, the cuts would leave any.
        settings["forced_eos_token_id"] = settings["forced_eos_token_id"][0]
    step = int(rng.integers(NEW))
    ids, logits = tokens_of(rng, T + step), logits_of(rng)
    assert_equal(ours(settings, ids, step, logits), theirs(settings, ids, step, logits), 2e-5)


CONTENT = list(ONE)[:6]


@pytest.mark.parametrize("seed", range(20))
def test_padded_rows_are_as_alone(seed):
    """What looks at a row's tokens; the reference sees the row without its padding."""
    rng = np.random.default_rng(seed)
    settings, step = drawn(rng, CONTENT), int(rng.integers(NEW))
    ids, logits = tokens_of(rng, T + step), logits_of(rng)
    pads = rng.integers(0, T, B)
    mask = np.arange(T) >= pads[:, None]
    ids[:, :T][~mask] = rng.integers(0, 12)
    ours_BV = ours(settings, ids, step, logits, mask)
    for row in range(B):
        alone = ids[row : row + 1, pads[row] :]
        one = theirs(settings, alone, step, logits[row : row + 1])
        np.testing.assert_allclose(ours_BV[row : row + 1], one, rtol=2e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_allowed_tokens(beams):
    """Also where all of them have been removed: of one row, of all beams of an item."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        settings = {"eos_token_id": ENDS, "num_beams": beams, "suppress_tokens": [40]}
        ids, logits = tokens_of(rng), logits_of(rng)
        lists = [some(rng, int(rng.integers(1, 9))) for _ in range(B)]
        for row in range(seed % 5):
            logits[row, lists[row]] = -np.inf
        bits = np.zeros((B, 64), bool)
        for row, allowed in enumerate(lists):
            bits[row, allowed] = True
        words = np.packbits(bits, axis=1, bitorder="little").view("<u4").astype(np.uint32)
        rows = {tuple(row): allowed for row, allowed in zip(ids.tolist(), lists, strict=True)}
        assert len(rows) == B
        expected = theirs(
            settings, ids, 0, logits,
            prefix_allowed_tokens_fn=lambda _, row, rows=rows: rows[tuple(row.tolist())],
        )  # fmt: skip
        ours_BV = ours(settings, ids, 0, logits, allowed=words)
        np.testing.assert_array_equal(ours_BV, expected)


def test_users_processors_come_before_the_warpers():
    rng = np.random.default_rng(0)
    settings = drawn(rng, ["repetition_penalty", "temperature", "top_k"])
    ids, logits = tokens_of(rng, T + 2), logits_of(rng)
    logits[0] = logits[2]

    class Last(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + 3 * torch.nn.functional.one_hot(input_ids[:, -1], V)

    def last(tokens_BS, length_B, logits_BV):
        last_B1 = jnp.take_along_axis(tokens_BS, length_B[:, None] - 1, axis=1)
        return logits_BV + 3 * jax.nn.one_hot(last_B1[:, 0], V)

    expected = theirs(settings, ids, 2, logits, logits_processor=[Last()])
    assert_equal(ours(settings, ids, 2, logits, processors=(last,)), expected)


@pytest.mark.parametrize("ratio, context, key", [(0.25, 1, 15485863), (0.6, 3, 2**50 + 7)])
@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_watermark(scheme, ratio, context, key):
    """Also a key whose products overflow; rows shorter than the context are left alone."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mark = dict(
            greenlist_ratio=ratio, bias=2.5, hashing_key=key, seeding_scheme=scheme,
            context_width=context,
        )  # fmt: skip
        width = 2 if seed == 0 else T
        ids, logits = tokens_of(rng, width, low=0, high=V), logits_of(rng)
        # Which of equal logits are candidates is left open there.
        logits[0], logits[1], logits[4] = logits[2][::-1], logits[2] * 2, logits[5] * 2
        ours_BV = ours({"watermarking_config": mark}, ids, 0, logits)
        config = transformers.WatermarkingConfig(**mark)
        expected = theirs({"watermarking_config": config}, ids, 0, logits)
        np.testing.assert_array_equal(ours_BV, expected)
        assert (ours_BV != logits).any() or width < context


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("scheme, context", [("lefthash", 1), ("lefthash", 3), ("selfhash", 2)])
def test_watermark_detector(scheme, context, repeated):
    from phi3_jax.generation.config import WatermarkingConfig
    from phi3_jax.generation.watermark import WatermarkDetector

    mark = dict(seeding_scheme=scheme, context_width=context, greenlist_ratio=0.4)
    model = types.SimpleNamespace(vocab_size=V, bos_token_id=1, is_encoder_decoder=False)
    theirs = transformers.WatermarkDetector(
        model, "cpu", transformers.WatermarkingConfig(**mark), repeated
    )
    ours = WatermarkDetector(V, 1, WatermarkingConfig(**mark), repeated)
    ids = np.random.default_rng(0).integers(2, 20, (4, 60))
    for first in (ids[:, :1], np.ones((4, 1), int)):
        rows = np.concatenate([first, ids], axis=1)
        expected = theirs(torch.from_numpy(rows), z_threshold=0.5, return_dict=True)
        result = ours(rows, z_threshold=0.5)
        for name in vars(result):
            np.testing.assert_allclose(getattr(result, name), getattr(expected, name), rtol=1e-12)
