"""The compiled programs of generation: prefill, the decoding step, and the loop around it.

How a request flows: `prefill` runs the prompt into a fresh cache and gives the logits of its last
token; `decode_step` runs the token chosen last and chooses the next; `decode_loop` repeats that
step inside one compiled program. Prompts are padded on the right to a few widths (`bucket`), so
that a new length compiles nothing; the padding is cut from the cache again.

Longrope: a row that grows past original_max_position_embeddings changes to the long factors, and
what is cached of it is stale in every layer. The loop ends there, `prefill` computes that row
anew from its own tokens and leaves the other rows' slots alone, and the loop goes on. request.py
drives all that.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from phi3_jax.cache import KVCache
from phi3_jax.generation.processors import Settings
from phi3_jax.rope import RopeTables, rows_are_long
from phi3_jax.sharding import constrain


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


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity"))
def empty_cache(model: nn.Module, batch: int, capacity: int) -> KVCache:
    """A cache of `capacity` slots a row, in the model's dtype, laid out on its mesh."""
    return KVCache.init(model.config, batch, capacity, model.dtype, model.mesh)


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
    logits_BV = constrain(out.logits[:, 0].astype(jnp.float32), None, None, mesh=model.mesh)
    return logits_BV, out.cache.truncate(length).settled(model.mesh)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode_step(
    model: nn.Module, params: Any, state: DecodeState, settings: Settings, rope: RopeTables
) -> DecodeState:
    """Runs the token chosen last and chooses the next; arguments as in `prefill`."""
    return _settled(_step(model, params, state, settings, rope), model.mesh)


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
        lambda state: goes_on(state, max_new_tokens) & ~crossing_rows(model.config, state).any(),
        lambda state: _step(model, params, state, settings, rope),
        state,
    )
    return _settled(state, model.mesh)


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
        long_B=state.long_B | rows_are_long(config, position_B1)[:, 0],
    )
    return _append(state, out.logits[:, 0].astype(jnp.float32), settings)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="cache")
def first_state(logits_BV, cache, long_B, position_B, seen_BV, settings, key, mesh) -> DecodeState:
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
    return _settled(_append(state, logits_BV, settings), mesh)


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


def _settled(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """The state in the one layout that every step takes and gives, so that none compiles twice.

    What the driver reads is on every device: each process's host can see it.
    """
    everywhere = ("token_B", "position_B", "long_B", "done_B", "new_BS", "step")
    arrays = {name: getattr(state, name) for name in everywhere}
    arrays = {
        name: constrain(array, *[None] * array.ndim, mesh=mesh) for name, array in arrays.items()
    }
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = constrain(seen_BV, "batch", None, mesh=mesh)
    cache = state.cache.settled(mesh)
    return dataclasses.replace(state, **arrays, seen_BV=seen_BV, cache=cache)


def goes_on(state: DecodeState, max_new_tokens: jax.typing.ArrayLike) -> jax.Array:
    """Whether there is another token to choose, bool scalar."""
    return (state.step < max_new_tokens) & ~state.done_B.all()


def crossing_rows(config, state: DecodeState) -> jax.Array:
    """Rows whose next token makes them long while their cache is short, bool [B]."""
    if not config.is_longrope:
        return jnp.zeros_like(state.done_B)
    long_B = rows_are_long(config, state.position_B[:, None])[:, 0]
    return long_B & ~state.long_B & ~state.done_B


def positions_of(attention_mask: jax.Array) -> jax.Array:
    """Positions that count a row's own tokens only, 0 for padding: int32 [B, T]."""
    counted = jnp.cumsum(jnp.asarray(attention_mask, jnp.int32), axis=1) - 1
    return jnp.where(attention_mask, counted, 0)
