"""Prefill, the decoding step, and the two drivers of that step: a compiled loop, and a stream.

How a request flows: `prefill` runs the prompt into a fresh cache and gives the logits of its last
token; `decode_step` runs the token chosen last and chooses the next; `decode_loop` repeats that
step inside one compiled program. Prompts are padded on the right to a few widths (`bucket`), so
that a new length compiles nothing; the padding is cut from the cache again.

Longrope: a row that grows past original_max_position_embeddings changes to the long factors, and
what is cached of it is stale in every layer. The loop ends there, `prefill` computes that row
anew from its own tokens and leaves the other rows' slots alone, and the loop goes on.
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from phi3_jax.cache import KVCache
from phi3_jax.generation.config import SAMPLING_SETTINGS, GenerationConfig
from phi3_jax.generation.processors import Settings
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.rope import RopeTables, rope_tables, rows_are_long
from phi3_jax.sharding import active_mesh, constrain, mesh_of, replicate


@flax.struct.dataclass
class GenerateResult:
    """What `generate` returns.

    Attributes:
      sequences: int32 numpy [B, prompt width + new tokens], prompt and continuation, left-padded
        as the prompt was; finished rows end in padding.
    """

    sequences: np.ndarray


@flax.struct.dataclass
class DecodeState:
    """Everything that a decoding step changes.

    Attributes:
      cache: all tokens but the last chosen one.
      token_B: int32, the token chosen last; the next step runs it.
      position_B: int32, its position in its row.
      long_B: bool, rows whose cache was computed with the long rope factors.
      done_B: bool, rows that have ended; they emit padding.
      new_BS: int32, the tokens chosen so far, in the first `step` columns.
      step: int32, how many those are.
      seen_BV: bool, the ids that each row holds; None without a repetition penalty.
      key: the request's random key.
    """

    cache: KVCache
    token_B: jax.Array
    position_B: jax.Array
    long_B: jax.Array
    done_B: jax.Array
    new_BS: jax.Array
    step: jax.Array
    seen_BV: jax.Array | None
    key: jax.Array


def bucket(tokens: int) -> int:
    """The width that so many tokens are padded to: a multiple of 16, at most a quarter too wide
    beyond 64 tokens.
    """
    grain = max(16, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // grain) * grain


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
    model: nn.Module,
    params: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    length: jax.Array,
    cache: KVCache,
    rope: RopeTables,
) -> tuple[jax.Array, KVCache]:
    """Computes rows from their first token on and writes them into the cache from its start.

    Args:
      model: a Phi3ForCausalLM (static).
      params: its parameters.
      input_ids: int32 [B, T], rows padded on the left, and all of them on the right from
        `length` on.
      attention_mask: bool [B, T], False for padding. A row that is False throughout is not
        touched: what the cache holds of it stays.
      length: int32 scalar, the columns in use; the cache is cut there.
      cache: at least T slots wide; donated.
      rope: tables at least as long as the longest row.

    Returns:
      float32 logits [B, V] of the last column in use, and the cache.
    """
    out: Any = model.apply(
        {"params": params},
        input_ids,
        attention_mask=attention_mask,
        position_ids=positions_of(attention_mask),
        cache=cache.rewind(),
        logits_to_keep=jnp.reshape(length - 1, (1,)),
        rope=rope,
    )
    logits_BV = constrain(out.logits[:, 0].astype(jnp.float32), None, None)
    return logits_BV, out.cache.truncate(length).settled()


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode_step(
    model: nn.Module, params: Any, state: DecodeState, settings: Settings, rope: RopeTables
) -> DecodeState:
    """Runs the token chosen last and chooses the next; arguments as in `prefill`."""
    return _settled(_step(model, params, state, settings, rope))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode_loop(
    model: nn.Module,
    params: Any,
    state: DecodeState,
    settings: Settings,
    rope: RopeTables,
    max_new_tokens: jax.Array,
) -> DecodeState:
    """Repeats the step until every row has ended, there are max_new_tokens, or a row crosses."""
    state = lax.while_loop(
        lambda state: _goes_on(state, max_new_tokens) & ~crossing_rows(model.config, state).any(),
        lambda state: _step(model, params, state, settings, rope),
        state,
    )
    return _settled(state)


def _step(model, params, state, settings, rope) -> DecodeState:
    config, position_B1 = model.config, state.position_B[:, None]
    out: Any = model.apply(
        {"params": params},
        state.token_B[:, None],
        position_ids=position_B1,
        cache=state.cache,
        rope=rope,
    )
    state = dataclasses.replace(
        state,
        cache=out.cache,
        position_B=state.position_B + 1,
        long_B=state.long_B | rows_are_long(config, position_B1),
    )
    return _append(state, out.logits[:, 0].astype(jnp.float32), settings)


@functools.partial(jax.jit, donate_argnames="cache")
def _first_state(logits_BV, cache, long_B, position_B, seen_BV, settings, key) -> DecodeState:
    """The state after a prefill: the first token chosen."""
    batch = logits_BV.shape[0]
    state = DecodeState(
        cache=cache,
        token_B=jnp.zeros(batch, jnp.int32),
        position_B=position_B,
        long_B=long_B,
        done_B=jnp.zeros(batch, bool),
        new_BS=jnp.zeros((batch, cache.capacity), jnp.int32),
        step=jnp.zeros((), jnp.int32),
        seen_BV=seen_BV,
        key=key,
    )
    return _settled(_append(state, logits_BV, settings))


def _append(state: DecodeState, logits_BV: jax.Array, settings: Settings) -> DecodeState:
    seen_BV, rows_B = state.seen_BV, jnp.arange(len(logits_BV))
    token_B = settings.choose(logits_BV, jax.random.fold_in(state.key, state.step), seen_BV)
    token_B = jnp.where(state.done_B, settings.pad_id, token_B)
    ended_B = (token_B[:, None] == settings.eos_ids[None, :]).any(axis=1)
    new_BS = lax.dynamic_update_slice_in_dim(state.new_BS, token_B[:, None], state.step, axis=1)
    return dataclasses.replace(
        state,
        token_B=token_B,
        done_B=state.done_B | ended_B,
        new_BS=new_BS,
        step=state.step + 1,
        seen_BV=None if seen_BV is None else seen_BV.at[rows_B, token_B].set(True),
    )


def _settled(state: DecodeState) -> DecodeState:
    """The state in the one layout that every step takes and gives, so that none compiles twice.

    What the driver reads is on every device: each process's host can see it.
    """
    everywhere = ("token_B", "position_B", "long_B", "done_B", "new_BS", "step")
    arrays = {name: getattr(state, name) for name in everywhere}
    arrays = {name: constrain(array, *[None] * array.ndim) for name, array in arrays.items()}
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = constrain(seen_BV, "batch", None)
    return dataclasses.replace(state, **arrays, seen_BV=seen_BV, cache=state.cache.settled())


def _goes_on(state: DecodeState, max_new_tokens) -> jax.Array:
    return (state.step < max_new_tokens) & ~state.done_B.all()


def crossing_rows(config, state: DecodeState) -> jax.Array:
    """Rows whose next token makes them long while their cache is short, bool [B]."""
    if not config.is_longrope:
        return jnp.zeros_like(state.done_B)
    return rows_are_long(config, state.position_B[:, None]) & ~state.long_B & ~state.done_B


def positions_of(attention_mask: jax.Array) -> jax.Array:
    """Positions that count a row's own tokens only, 0 for padding: int32 [B, T]."""
    counted = jnp.cumsum(jnp.asarray(attention_mask, jnp.int32), axis=1) - 1
    return jnp.where(attention_mask, counted, 0)


@dataclass
class _Request:
    """A checked request on its way: host arrays, and the state on the devices."""

    model: nn.Module
    params: Any
    mesh: Mesh | None
    input_ids: np.ndarray
    attention_mask: np.ndarray
    max_new_tokens: int
    settings: Settings
    rope: RopeTables
    capacity: int
    seed: int
    state: Any = None  # a DecodeState, from start() on

    def start(self) -> None:
        """Runs the prompt and chooses the first token."""
        batch = len(self.input_ids)
        with active_mesh(self.mesh):
            cache = _empty_cache(self.model, batch, self.capacity)
            logits_BV, cache = self._prefill(self.input_ids, self.attention_mask, cache)
            tokens_B = self.attention_mask.sum(axis=1, dtype=np.int32)
            long_B = tokens_B > self.model.config.original_max_position_embeddings
            placed = replicate((long_B, tokens_B, self._seen(), self.settings), self.mesh)
            key = jax.random.key(self.seed)
            self.settings = placed[-1]
            self.state = _first_state(logits_BV, cache, *placed, key)

    def _seen(self) -> np.ndarray | None:
        """Which ids each row of the prompt holds, where that is asked for."""
        if self.settings.repetition_penalty is None:
            return None
        seen_BV = np.zeros((len(self.input_ids), self.model.config.vocab_size), bool)
        rows, columns = np.nonzero(self.attention_mask)
        seen_BV[rows, self.input_ids[rows, columns]] = True
        return seen_BV

    def _prefill(self, ids_BT, mask_BT, cache, length=None):
        width = bucket(ids_BT.shape[1])
        right = ((0, 0), (0, width - ids_BT.shape[1]))
        length = np.int32(ids_BT.shape[1] if length is None else length)
        arguments = (np.pad(ids_BT, right), np.pad(mask_BT, right), length)
        placed = replicate(arguments, self.mesh)
        return prefill(self.model, self.params, *placed, cache, self.rope)

    @property
    def goes_on(self) -> bool:
        """Whether there is another token to choose."""
        return bool(_goes_on(self.state, self.max_new_tokens))

    def step(self) -> None:
        """Chooses one more token of every row."""
        self._cross()
        with active_mesh(self.mesh):
            self.state = decode_step(self.model, self.params, self.state, self.settings, self.rope)

    def run(self) -> None:
        """Chooses all the tokens that are left, inside compiled loops."""
        limit = np.int32(self.max_new_tokens)
        while self.goes_on:
            self._cross()
            with active_mesh(self.mesh):
                self.state = decode_loop(
                    self.model, self.params, self.state, self.settings, self.rope, limit
                )

    def _cross(self) -> None:
        """Computes the rows anew, with the long factors, that the next token makes long."""
        rows_B = np.asarray(crossing_rows(self.model.config, self.state))
        if not rows_B.any():
            return
        ids_BT = self.sequences
        new = np.ones((len(ids_BT), ids_BT.shape[1] - self.input_ids.shape[1]), bool)
        mask_BT = np.concatenate([self.attention_mask, new], axis=1) & rows_B[:, None]
        with active_mesh(self.mesh):
            # The token chosen last is part of what makes the row long; the cache is cut before
            # it, since the next step runs it.
            length = ids_BT.shape[1] - 1
            _, cache = self._prefill(ids_BT, mask_BT, self.state.cache, length)
        long_B = self.state.long_B | rows_B
        self.state = dataclasses.replace(self.state, cache=cache, long_B=long_B)

    @property
    def sequences(self) -> np.ndarray:
        """Prompt and tokens chosen so far, int32 [B, T]."""
        new = np.asarray(self.state.new_BS)[:, : int(self.state.step)]
        return np.concatenate([self.input_ids, new], axis=1)


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity"))
def _empty_cache(model, batch, capacity) -> KVCache:
    return KVCache.init(model.config, batch, capacity, model.dtype)


def generate(
    model: nn.Module,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    **generation_overrides: Any,
) -> GenerateResult:
    """Continues prompts, greedily or by sampling, inside one compiled loop.

    Args:
      model: a Phi3ForCausalLM.
      params: its parameters.
      input_ids: integers [B, T]; rows shorter than T are padded on the left.
      attention_mask: [B, T], 1 for tokens, 0 for padding; by default all are tokens, unless the
        padding id occurs and is no end id (the reference's rule).
      generation_config: settings laid over those of the model's folder.
      seed: of sampling; the same seed gives the same tokens.
      mesh: where to compute; by default where the parameters are.
      **generation_overrides: any field of GenerationConfig, laid over both.

    Raises:
      ValueError: before anything runs, for ids outside the vocabulary, padding on the right, an
        unknown setting, or a request that does not fit max_cache_len.
    """
    request = _request(
        model, params, input_ids, attention_mask, generation_config, seed, mesh,
        generation_overrides,
    )  # fmt: skip
    request.start()
    request.run()
    return GenerateResult(sequences=request.sequences)


def stream(
    model: nn.Module,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    **generation_overrides: Any,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, each as soon as it is chosen: int32 [B] a step.

    Arguments and errors as in `generate`; a request is checked when `stream` is called.
    """
    request = _request(
        model, params, input_ids, attention_mask, generation_config, seed, mesh,
        generation_overrides,
    )  # fmt: skip

    def tokens():
        request.start()
        yield np.asarray(request.state.token_B)
        while request.goes_on:
            request.step()
            yield np.asarray(request.state.token_B)

    return tokens()


def _request(
    model, params, input_ids, attention_mask, generation_config, seed, mesh, overrides
) -> _Request:
    """Everything that can be refused is refused here, on the host."""
    if not isinstance(model, Phi3ForCausalLM):
        raise ValueError(
            f"{type(model).__name__} has no head to generate with: Phi3ForCausalLM has"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, must be in [0, 2**63)")
    config = model.config
    settings = GenerationConfig.from_model_config(config)
    given = GenerationConfig.from_call(overrides)
    for layer in (model.generation_config, generation_config, given):
        settings = settings if layer is None else layer.over(settings)
    settings.check()
    if not settings.do_sample and (idle := sorted(given.given & set(SAMPLING_SETTINGS))):
        warnings.warn(f"{', '.join(idle)}: no effect without do_sample=True", stacklevel=3)

    input_ids, attention_mask = _checked_prompt(config, settings, input_ids, attention_mask)
    prompt = input_ids.shape[1]
    max_new_tokens = settings.new_tokens(prompt, config.max_position_embeddings)
    needed = prompt + max_new_tokens
    room = settings.max_cache_len
    if room is not None and needed > room:
        way = f"ask for at most {room - prompt} new tokens" if prompt < room else "shorten it"
        raise ValueError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones need {needed} places, and "
            f"the cache has {room}; {way}, or make a longer cache"
        )
    capacity = bucket(room or needed)
    home = mesh_of(params)
    if mesh is not None and home not in (None, mesh):
        raise ValueError(
            f"the parameters are on the mesh {dict(home.shape)}, not on {dict(mesh.shape)}; load "
            "them with from_pretrained(..., mesh=mesh)"
        )
    mesh = home if mesh is None else mesh
    return _Request(
        # The folder's settings are in `settings` now; without them the program is the same for all.
        model=model.clone(generation_config=None),
        params=params,
        mesh=mesh,
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        settings=Settings.of(settings, config.vocab_size),
        rope=replicate(rope_tables(config, capacity), mesh),
        capacity=capacity,
        seed=seed,
    )


def _checked_prompt(config, settings, input_ids, attention_mask):
    try:
        ids = np.asarray(input_ids)
    except ValueError:  # rows of unequal length
        ids = np.empty(0)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"input_ids has shape {ids.shape} and dtype {ids.dtype}, expected whole numbers "
            "[batch, tokens] with at least one token; pad shorter rows on the left"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        bad = ids[(ids < 0) | (ids >= config.vocab_size)][0]
        raise ValueError(
            f"input_ids holds {bad}, outside the vocabulary of {config.vocab_size}; "
            "does the tokenizer belong to this model?"
        )
    pad_id = settings.pad_token_id
    if attention_mask is None and pad_id is not None and pad_id not in settings.eos_token_ids:
        attention_mask = ids != pad_id
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {mask.shape}, expected that of input_ids, {ids.shape}"
        )
    for row, last in enumerate(mask[:, -1]):
        if not last:
            what = "padding on the right" if mask[row].any() else "no token at all"
            raise ValueError(
                f"row {row} of the prompt has {what}; rows must hold a token in their last "
                "column: pad on the left"
            )
    return ids.astype(np.int32), mask
