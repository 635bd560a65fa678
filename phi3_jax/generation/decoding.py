"""The compiled programs of generation: prefill, the decoding step, and the loop around it.

How a request flows: `prefill` runs the prompt into a fresh cache and gives the logits of its last
token; `decode_step` runs the token chosen last and chooses the next; `decode_loop` repeats that
step inside one compiled program. Prompts are padded on the right to a few widths (`bucket`), so
that a new length compiles nothing; the padding is cut from the cache again.

Under classifier-free guidance a row has two places in the cache: the rows 0 to B - 1 hold the
prompts and B to 2 B - 1 the negative prompts, and both are run with the token chosen for the row.
R is the number of rows in the cache, B or 2 B.

Longrope: a row that grows past original_max_position_embeddings changes to the long factors, and
what is cached of it is stale in every layer. The loop ends there, `prefill` computes that row
anew from its own tokens and leaves the other rows' slots alone, and the loop goes on. driver.py
drives all that.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from phi3_jax.cache import KVCache
from phi3_jax.generation.choice import NO_TOKEN
from phi3_jax.generation.settings import Past, Settings
from phi3_jax.generation.stop_strings import StopStrings
from phi3_jax.rope import RopeTables, rows_are_long
from phi3_jax.sharding import constrain


class Wanted(NamedTuple):
    """What a step gives beside its token."""

    scores: bool = False
    logits: bool = False
    hidden_states: bool = False
    attentions: bool = False


NOTHING = Wanted()


@flax.struct.dataclass
class StepOutputs:
    """What came of one step; None for what was not asked for.

    Attributes:
      scores: float32 [B, V], after all processors.
      logits: float32 [B, V], as the model gave them.
      hidden_states: L + 1 of [B, T, D].
      attentions: L of [B, N, T, slots].
    """

    scores: jax.Array | None = None
    logits: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class Plan:
    """What every step of a request needs alike; arrays, so that other values compile nothing.

    Attributes:
      settings: how tokens are chosen.
      rope: tables as long as the longest row can get.
      guidance: float32 scalar, the scale of classifier-free guidance, or None.
      stop: the stop strings, or None.
    """

    settings: Settings
    rope: RopeTables
    guidance: jax.Array | None = None
    stop: StopStrings | None = None


@flax.struct.dataclass
class DecodeState:
    """Everything that a decoding step changes.

    Attributes:
      cache: of R rows, all tokens but the last chosen one.
      token_B: int32, the token chosen last; the next step runs it.
      position_R: int32, its position in its row.
      long_R: bool, rows whose cache was computed with the long rope factors.
      done_B: bool, rows that have ended; they emit padding.
      new_BS: int32, the tokens chosen so far, in the first `past.step` columns.
      past: what the processors know of the rows, the number of tokens chosen among it.
      stop_B: int32, how far each row is into a stop string; None without stop strings.
      key: the request's random key.
    """

    cache: KVCache
    token_B: jax.Array
    position_R: jax.Array
    long_R: jax.Array
    done_B: jax.Array
    new_BS: jax.Array
    past: Past
    stop_B: jax.Array | None
    key: jax.Array


def bucket(tokens: int) -> int:
    """The width that so many tokens are padded to: a multiple of 16, at most a quarter too wide
    beyond 64 tokens.
    """
    grain = max(16, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // grain) * grain


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity", "kind"))
def empty_cache(
    model: nn.Module, batch: int, capacity: int, kind: tuple[tuple[str, bool], ...] = ()
) -> KVCache:
    """A cache for `capacity` tokens a row, in the model's dtype, laid out on its mesh; a split one,
    which is a CPU's, in float32, since there narrower ones are widened at every token.

    kind: further arguments of KVCache.init, by name.
    """
    arguments = dict(kind)
    dtype = jnp.float32 if arguments.get("split") else model.dtype
    cache = KVCache.init(model.config, batch, capacity, dtype, model.mesh, **arguments)
    # As when rows are computed anew: one program does both.
    return dataclasses.replace(cache, filled=True)


@functools.partial(jax.jit, static_argnames=("model", "fresh", "wanted"), donate_argnames="cache")
def prefill(
    model: nn.Module,
    params: Any,
    input_ids: jax.Array,
    token_mask: jax.Array,
    position_ids: jax.Array,
    rows_R: jax.Array,
    length: jax.Array,
    cache: KVCache,
    rope: RopeTables,
    fresh: bool = True,
    wanted: Wanted = NOTHING,
) -> tuple[jax.Array, KVCache, StepOutputs]:
    """Computes the tokens of rows, from the first on or behind those in the cache.

    Args:
      model: a Phi3ForCausalLM (static).
      params: its parameters.
      input_ids: int32 [R, T], rows padded on the left, and all of them on the right from
        `length` on.
      token_mask: bool [R, T], False for padding. A row that is False throughout is not touched:
        what the cache holds of it stays.
      position_ids: int32 [R, T].
      rows_R: bool, the rows that are computed; with `fresh` what the cache holds of them is
        forgotten first.
      length: int32 scalar, the columns in use afterwards; the cache is cut there.
      cache: with room for T more slots; donated.
      rope: tables at least as long as the longest row, with long_B for rows that are long as a
        whole.
      fresh: write from the first column on (static); otherwise behind the cache's last.
      wanted: outputs to give (static); no scores.

    Returns:
      float32 logits [R, V] of the last column in use, the cache, and the outputs.
    """
    if fresh:
        cache = cache.rewind(rows_R)
    start = cache.length
    out: Any = model.apply(
        {"params": params},
        input_ids,
        token_mask=token_mask,
        position_ids=position_ids,
        cache=cache,
        logits_to_keep=jnp.reshape(length - start - 1, (1,)),
        rope=rope,
        output_hidden_states=wanted.hidden_states,
        output_attentions=wanted.attentions,
    )
    outputs = StepOutputs(hidden_states=out.hidden_states, attentions=out.attentions)
    logits_RV = out.logits[:, 0].astype(jnp.float32)
    logits_RV, outputs = readable((logits_RV, outputs), model.mesh)
    return logits_RV, out.cache.truncate(length, rows_R).settled(model.mesh), outputs


@functools.partial(jax.jit, static_argnames=("copies", "mesh"))
def spread(
    logits_RV: jax.Array, cache: KVCache, outputs: StepOutputs, copies: int, mesh: Mesh | None
) -> tuple[jax.Array, KVCache, StepOutputs]:
    """What a prefill gave, each row so many times side by side, for its continuations."""
    repeat = lambda x: jnp.repeat(x, copies, axis=0)  # noqa: E731
    logits_RV, outputs = readable(jax.tree.map(repeat, (logits_RV, outputs)), mesh)
    return logits_RV, cache.repeated(copies).settled(mesh), outputs


@functools.partial(jax.jit, static_argnames=("model", "wanted"), donate_argnames="state")
def decode_step(
    model: nn.Module,
    params: Any,
    state: DecodeState,
    plan: Plan,
    allowed_BW: jax.Array | None = None,
    wanted: Wanted = NOTHING,
) -> tuple[DecodeState, StepOutputs]:
    """Runs the token chosen last and chooses the next.

    allowed_BW: uint32 [B, ceil(V / 32)], a bit for each token that may be chosen, or None for all;
    the other arguments as in `prefill`.
    """
    state, outputs = _step(model, params, state, plan, allowed_BW, wanted)
    return settled(state, model.mesh), readable(outputs, model.mesh)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode_loop(
    model: nn.Module, params: Any, state: DecodeState, plan: Plan, limit: jax.Array
) -> DecodeState:
    """Repeats the step until every row has ended, there are `limit` tokens, or a row crosses."""
    state = lax.while_loop(
        lambda state: goes_on(state, limit) & ~crossing_rows(model.config, state).any(),
        lambda state: _step(model, params, state, plan, None, NOTHING)[0],
        state,
    )
    return settled(state, model.mesh)


def forward(
    model: nn.Module,
    params: Any,
    cache: KVCache,
    token_B: jax.Array,
    position_R: jax.Array,
    rope: RopeTables,
    wanted: Wanted = NOTHING,
) -> tuple[jax.Array, KVCache, StepOutputs]:
    """Runs one token of every row, also for the row's negative prompt where R is 2 B.

    Returns:
      float32 logits [R, V], the grown cache, and hidden states and attentions as wanted.
    """
    token_R = jnp.tile(token_B, len(position_R) // len(token_B))
    out: Any = model.apply(
        {"params": params},
        token_R[:, None],
        position_ids=position_R[:, None],
        cache=cache,
        rope=rope,
        output_hidden_states=wanted.hidden_states,
        output_attentions=wanted.attentions,
    )
    outputs = StepOutputs(hidden_states=out.hidden_states, attentions=out.attentions)
    return out.logits[:, 0].astype(jnp.float32), out.cache, outputs


def guide(logits_RV: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The logits of the prompts, drawn away from those of the negative prompts: [B, V].

    log-probabilities s (c - u) + u (arXiv:2306.17806, UnbatchedClassifierFreeGuidanceLogits-
    Processor of transformers); without a scale the logits as they are.
    """
    if scale is None:
        return logits_RV
    prompt_BV, negative_BV = jnp.split(jax.nn.log_softmax(logits_RV, axis=-1), 2)
    return scale * (prompt_BV - negative_BV) + negative_BV


def _step(model, params, state, plan, allowed_BW, wanted) -> tuple[DecodeState, StepOutputs]:
    config, position_R1 = model.config, state.position_R[:, None]
    logits_RV, cache, outputs = forward(
        model, params, state.cache, state.token_B, state.position_R, plan.rope, wanted
    )
    state = dataclasses.replace(
        state,
        cache=cache,
        position_R=state.position_R + 1,
        long_R=state.long_R | (rows_are_long(config, position_R1)[:, 0] & _going(state)),
    )
    return append(state, logits_RV, plan, allowed_BW, wanted, outputs)


@functools.partial(jax.jit, static_argnames=("columns", "mesh", "wanted"), donate_argnames="cache")
def first_state(
    logits_RV, cache, long_R, position_R, past, stop_B, plan, key, allowed_BW,
    columns: int, mesh: Mesh | None, wanted: Wanted,
) -> tuple[DecodeState, StepOutputs]:  # fmt: skip
    """The state after a prefill: the first token chosen; `columns` is the room for tokens."""
    batch = len(logits_RV) // (1 if plan.guidance is None else 2)
    state = DecodeState(
        cache=cache,
        token_B=jnp.zeros(batch, jnp.int32),
        position_R=position_R,
        long_R=long_R,
        done_B=jnp.zeros(batch, bool),
        new_BS=jnp.zeros((batch, columns), jnp.int32),
        past=past,
        stop_B=stop_B,
        key=key,
    )
    state, outputs = append(state, logits_RV, plan, allowed_BW, wanted, StepOutputs())
    return settled(state, mesh), readable(outputs, mesh)


def append(
    state: DecodeState,
    logits_RV: jax.Array,
    plan: Plan,
    allowed_BW: jax.Array | None,
    wanted: Wanted,
    outputs: StepOutputs,
) -> tuple[DecodeState, StepOutputs]:
    """The state with one more token of every row, chosen by these logits."""
    settings, step, batch = plan.settings, state.past.step, len(state.token_B)
    scores_BV = settings.process(state.past, guide(logits_RV, plan.guidance), allowed_BW)
    token_B = settings.draw(scores_BV, jax.random.fold_in(state.key, step))
    if wanted.scores:
        outputs = dataclasses.replace(outputs, scores=scores_BV)
    if wanted.logits:
        outputs = dataclasses.replace(outputs, logits=logits_RV[:batch])
    return push(state, token_B, plan), outputs


def push(state: DecodeState, token_B: jax.Array, plan: Plan) -> DecodeState:
    """The state with one more token of every row; rows that have ended get padding, and a row
    with NO_TOKEN ends.
    """
    token_B = jnp.where(state.done_B, plan.settings.pad_id, token_B)
    ends_B = (token_B[:, None] == plan.settings.eos_ids[None, :]).any(axis=1)
    done_B = state.done_B | ends_B | (token_B == NO_TOKEN)
    stop_B = state.stop_B
    if plan.stop is not None and stop_B is not None:
        stop_B, stopped_B = plan.stop.advance(stop_B, token_B)
        done_B |= stopped_B
    column = state.past.step
    return dataclasses.replace(
        state,
        token_B=token_B,
        done_B=done_B,
        new_BS=lax.dynamic_update_slice_in_dim(state.new_BS, token_B[:, None], column, axis=1),
        past=state.past.append(token_B),
        stop_B=stop_B,
    )


def readable(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays whole on every device, so that each process's host can read them."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim, mesh=mesh), tree)


def settled(state: Any, mesh: Mesh | None) -> Any:
    """A DecodeState or BeamState in the one layout that every step takes and gives, so that none
    compiles twice.

    What the driver reads, all but the fields named here, is on every device: each process's host
    can see it.
    """
    names = {field.name for field in dataclasses.fields(state)}
    names -= {"cache", "past", "stop_B", "key"}
    arrays = readable({name: getattr(state, name) for name in sorted(names)}, mesh)
    rows = lambda x: constrain(x, *["batch", None, None][: x.ndim], mesh=mesh)  # noqa: E731
    past, stop_B = jax.tree.map(rows, (state.past, state.stop_B))
    cache = state.cache.settled(mesh)
    return dataclasses.replace(state, **arrays, past=past, stop_B=stop_B, cache=cache)


def goes_on(state: DecodeState, limit: jax.typing.ArrayLike) -> jax.Array:
    """Whether there is another token to choose, bool scalar."""
    return (state.past.step < limit) & ~state.done_B.all()


def crossing_rows(config, state: DecodeState) -> jax.Array:
    """Rows of the cache whose next token makes them long while they are short, bool [R]."""
    if not config.is_longrope:
        return jnp.zeros_like(state.long_R)
    long_R = rows_are_long(config, state.position_R[:, None])[:, 0]
    return long_R & ~state.long_R & _going(state)


def _going(state: DecodeState) -> jax.Array:
    """Rows of the cache that have not ended, bool [R]."""
    return jnp.tile(~state.done_B, len(state.long_R) // len(state.done_B))
