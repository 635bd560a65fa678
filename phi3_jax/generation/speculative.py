"""Assisted generation: several tokens are guessed, and one call of the model checks all of them.

Guesses come from a draft model, or from the row itself (prompt lookup). Greedy tokens are those of
plain decoding; sampled ones have the distribution of plain sampling, by rejection (speculative
sampling, arXiv:2211.17192). A round:

    chosen last   guesses             one call of the model gives the logits behind each of them
    t             g1  g2  g3          t -> a1 = g1, g1 -> a2 = g2, g2 -> a3 != g3: a1 a2 a3 are new

All rows of a batch keep the same columns: a round ends where the first row departs from its
guesses, and what the others guessed beyond that is guessed again. The caches are cut there.

No guess goes over the line of longrope: there the row has to be computed anew.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from phi3_jax.config import Phi3Config
from phi3_jax.generation.decoding import (
    NOTHING,
    DecodeState,
    Plan,
    StepOutputs,
    Wanted,
    crossing_rows,
    forward,
    goes_on,
    guide,
    push,
    readable,
    settled,
)
from phi3_jax.generation.settings import Past, Settings


@flax.struct.dataclass
class Drafter:
    """Where guesses come from, alike in every round.

    Attributes:
      params, rope: of the draft model; None for prompt lookup.
      most: int32, guesses a round at most.
      confidence: float32, drafting ends behind a token less likely than this; None for never.
      max_ngram: int32, the most tokens that prompt lookup compares; None for a draft model.
      model: the draft model (static), None for prompt lookup.
      width: room for guesses (static).
      adapts: whether fewer are made after a failure (static).
    """

    params: Any
    rope: Any
    most: Any
    confidence: Any
    max_ngram: Any
    model: Any = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)
    adapts: bool = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class AssistedState:
    """What a round changes.

    Attributes:
      decode: the state of plain decoding.
      cache: of the draft model, the same columns as the model's; None for prompt lookup.
      long_B: bool, rows whose draft cache was computed with the draft model's long factors.
      history: the rows' own tokens, for prompt lookup; else None.
      guesses: int32, how many the next round makes.
    """

    decode: DecodeState
    cache: Any
    long_B: Any
    history: Past | None
    guesses: jax.Array


@flax.struct.dataclass
class _Round:
    """A round on its way through its guesses: `taken` of them are checked, `agreed` says all."""

    decode: DecodeState
    history: Past | None
    outputs: StepOutputs
    taken: jax.Array
    agreed: jax.Array


_STATIC = ("model", "wanted")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def assisted_step(
    model: nn.Module,
    params: Any,
    state: AssistedState,
    plan: Plan,
    drafter: Drafter,
    limit: jax.Array,
    wanted: Wanted = NOTHING,
) -> tuple[AssistedState, StepOutputs]:
    """One round: one token of every row at least, and at most one more than there are guesses.

    limit: int32, the number of tokens after which nothing is to come.

    Returns:
      the state, and scores and logits [width + 1, B, V] as wanted, in their first columns.
    """
    state, outputs = _round(model, params, state, plan, drafter, limit, wanted)
    return _settled(state, model), readable(outputs, model.mesh)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def assisted_loop(
    model: nn.Module,
    params: Any,
    state: AssistedState,
    plan: Plan,
    drafter: Drafter,
    limit: jax.Array,
    pause: jax.Array,
) -> AssistedState:
    """Rounds until every row has ended, there are `pause` tokens or more, or a row crosses the
    line of either model.
    """
    state = lax.while_loop(
        lambda state: goes_on(state.decode, pause) & ~any_crossing(model.config, state, drafter),
        lambda state: _round(model, params, state, plan, drafter, limit, NOTHING)[0],
        state,
    )
    return _settled(state, model)


def any_crossing(config: Phi3Config, state: AssistedState, drafter: Drafter) -> jax.Array:
    """Whether a row's next token makes it long, for the model or for the draft model."""
    crossing = crossing_rows(config, state.decode).any()
    if drafter.model is None or not drafter.model.config.is_longrope:
        return crossing
    return crossing | _draft_crossing(state, drafter.model.config).any()


def _draft_crossing(state: AssistedState, config: Phi3Config) -> jax.Array:
    decode = state.decode
    position_B = decode.position_R[: len(decode.token_B)]
    is_long_B = position_B + 1 > config.original_max_position_embeddings
    return is_long_B & ~state.long_B & ~decode.done_B


def _settled(state: AssistedState, model: nn.Module) -> AssistedState:
    mesh = model.mesh
    cache = None if state.cache is None else state.cache.settled(mesh)
    long_B, history, guesses = readable((state.long_B, state.history, state.guesses), mesh)
    return AssistedState(settled(state.decode, mesh), cache, long_B, history, guesses)


def _round(model, params, state, plan, drafter, limit, wanted):
    decode = state.decode
    most = jnp.minimum(state.guesses, _room(model.config, state, drafter, limit))
    if drafter.model is None:
        guess_BG, count, draft_scores, cache = *_look_up(state, drafter, most), None, None
    else:
        guess_BG, count, draft_scores, cache = _draft(state, plan, drafter, most)

    # One call checks all guesses; those beyond `count` are padding.
    tokens_BT = jnp.concatenate([decode.token_B[:, None], guess_BG], axis=1)
    columns_T = jnp.arange(drafter.width + 1)
    places = len(decode.position_R) // len(decode.token_B)
    tokens_RT = jnp.tile(tokens_BT, (places, 1))
    out: Any = model.apply(
        {"params": params},
        tokens_RT,
        token_mask=jnp.broadcast_to(columns_T <= count, tokens_RT.shape),
        position_ids=decode.position_R[:, None] + columns_T,
        cache=decode.cache,
        rope=plan.rope,
    )
    logits_RTV = out.logits.astype(jnp.float32)
    before, first = decode.cache.length, decode.past.step
    # Without the old cache, which the loop would have to keep beside the new one.
    checked = _check(
        dataclasses.replace(decode, cache=None),
        state.history, plan, logits_RTV, guess_BG, draft_scores, count, limit, wanted,
    )  # fmt: skip
    new = checked.decode.past.step - first
    decode = dataclasses.replace(
        checked.decode,
        cache=out.cache.truncate(before + new),
        position_R=decode.position_R + new,
    )
    guesses = state.guesses
    if drafter.adapts:
        # As the reference's "heuristic": two more after a full success, one fewer after a failure.
        more = jnp.minimum(guesses + 2, drafter.most)
        guesses = jnp.where(new > count, more, jnp.maximum(guesses - 1, 1))
    state = AssistedState(
        decode=decode,
        cache=None if cache is None else cache.truncate(before + new),
        long_B=state.long_B,
        history=checked.history,
        guesses=guesses,
    )
    return state, checked.outputs


def _room(config: Phi3Config, state: AssistedState, drafter: Drafter, limit) -> jax.Array:
    """How many guesses are of use: before the limit, and before the line of every short row."""
    decode = state.decode
    room = limit - decode.past.step - 1
    lines = [(config, decode.long_R, decode.position_R)]
    if drafter.model is not None:
        position_B = decode.position_R[: len(decode.token_B)]
        lines.append((drafter.model.config, state.long_B, position_B))
    for model_config, long_R, position_R in lines:
        if model_config.is_longrope:
            going_R = jnp.tile(~decode.done_B, len(long_R) // len(decode.done_B)) & ~long_R
            left_R = model_config.original_max_position_embeddings - 1 - position_R
            room = jnp.minimum(room, jnp.where(going_R, left_R, limit).min())
    return jnp.maximum(room, 0)


def _draft(state: AssistedState, plan: Plan, drafter: Drafter, most: jax.Array):
    """Guesses of the draft model: tokens [B, G], their number, their scores [G, B, V] (None in
    greedy decoding), and the draft cache with all of them.
    """
    decode, settings = state.decode, plan.settings
    batch, vocab = len(decode.token_B), settings.vocab_size
    position_B = decode.position_R[:batch]
    scores_GBV = jnp.zeros((drafter.width, batch, vocab), jnp.float32)
    start = (
        jnp.zeros((), jnp.int32), jnp.array(True), decode.token_B, decode.past, state.cache,
        jnp.zeros((batch, drafter.width), jnp.int32), scores_GBV if settings.do_sample else None,
    )  # fmt: skip

    def run(token_B, count, cache):
        return forward(drafter.model, drafter.params, cache, token_B, position_B + count,
            drafter.rope)[:2]  # fmt: skip

    def body(carry):
        count, _, token_B, past, cache, guess_BG, scores_GBV = carry
        logits_BV, cache = run(token_B, count, cache)
        scores_BV = settings.process(past, logits_BV)
        token_B = settings.draw(scores_BV, _key(decode.key, past.step, 1))
        sure = jnp.array(True)
        if drafter.confidence is not None:
            chance_BV = jax.nn.softmax(scores_BV, axis=-1)
            chance_B = jnp.take_along_axis(chance_BV, token_B[:, None], axis=1)[:, 0]
            sure = ((chance_B >= drafter.confidence) & ~decode.done_B).any()
        if scores_GBV is not None:
            scores_GBV = scores_GBV.at[count].set(scores_BV)
        guess_BG = lax.dynamic_update_slice_in_dim(guess_BG, token_B[:, None], count, axis=1)
        return count + 1, sure, token_B, past.append(token_B), cache, guess_BG, scores_GBV

    going = lambda carry: (carry[0] < most) & carry[1]  # noqa: E731
    count, _, token_B, _, cache, guess_BG, scores_GBV = lax.while_loop(going, body, start)
    # The last guess too: the next round begins behind it if all of them hold.
    _, cache = run(token_B, count, cache)
    return guess_BG, count, scores_GBV, cache


def _look_up(state: AssistedState, drafter: Drafter, most: jax.Array):
    """Guesses from the rows themselves: what followed the earliest of the longest earlier runs
    that equal the row's last tokens (PromptLookupCandidateGenerator of transformers).

    Returns tokens [B, G] and the number of guesses of the row that has most; rows without as many
    guess at random.
    """
    history: Any = state.history
    tokens_BS, length_B1 = history.tokens_BS, history.length_B[:, None]
    columns_S = jnp.arange(tokens_BS.shape[1])
    longest_B1 = jnp.minimum(drafter.max_ngram, length_B1 - 1)

    def compare(back, equal):
        """`equal` is how many tokens before each column are those before the row's end."""
        mine_BS = jnp.take_along_axis(tokens_BS, jnp.maximum(columns_S - back, 0)[None], axis=1)
        last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B1 - back, 0), axis=1)
        same_BS = (mine_BS == last_B1) & (columns_S >= back) & (back <= longest_B1)
        return jnp.where(same_BS & (equal == back - 1), back, equal)

    equal_BS = lax.fori_loop(1, drafter.max_ngram + 1, compare, jnp.zeros_like(tokens_BS))
    equal_BS = jnp.where(columns_S < length_B1, equal_BS, 0)
    start_B1 = jnp.argmax(equal_BS, axis=1)[:, None]  # the first of equals
    found_B1 = jnp.take_along_axis(equal_BS, start_B1, axis=1) > 0
    follow_BG = start_B1 + jnp.arange(drafter.width)
    guess_BG = jnp.take_along_axis(tokens_BS, jnp.minimum(follow_BG, columns_S[-1]), axis=1)
    count_B1 = jnp.where(found_B1 & ~state.decode.done_B[:, None], length_B1 - start_B1, 0)
    return jnp.maximum(guess_BG, 0), jnp.minimum(count_B1.max(), most)


def _check(decode, history, plan, logits_RTV, guess_BG, draft_scores, count, limit, wanted):
    """Goes through the guesses and appends what plain decoding would, until a row departs."""
    settings, width = plan.settings, guess_BG.shape[1]
    room = (width + 1, len(decode.token_B), settings.vocab_size)

    def outputs_of(scores_BV, logits_RV) -> StepOutputs:
        logits_BV = logits_RV[: room[1]] if wanted.logits else None
        return StepOutputs(scores=scores_BV if wanted.scores else None, logits=logits_BV)

    nothing = jnp.zeros(room, jnp.float32)
    outputs = StepOutputs(
        scores=nothing if wanted.scores else None, logits=nothing if wanted.logits else None
    )

    def body(now: _Round) -> _Round:
        decode, place = now.decode, jnp.minimum(now.taken, width - 1)
        logits_RV = lax.dynamic_index_in_dim(logits_RTV, now.taken, axis=1, keepdims=False)
        scores_BV = settings.process(decode.past, guide(logits_RV, plan.guidance))
        guess_B = lax.dynamic_index_in_dim(guess_BG, place, axis=1, keepdims=False)
        draft_BV = None if draft_scores is None else draft_scores[place]
        is_guessed = now.taken < count
        token_B = _choose(settings, decode, scores_BV, guess_B, draft_BV, is_guessed)
        agreed = is_guessed & ((token_B == guess_B) | decode.done_B).all()
        decode = push(decode, token_B, plan)
        return _Round(
            decode=decode,
            history=None if now.history is None else now.history.append(decode.token_B),
            outputs=jax.tree.map(
                lambda kept, one: kept.at[now.taken].set(one),
                now.outputs,
                outputs_of(scores_BV, logits_RV),
            ),
            taken=now.taken + 1,
            agreed=agreed,
        )

    return lax.while_loop(
        lambda now: now.agreed & goes_on(now.decode, limit),
        body,
        _Round(decode, history, outputs, jnp.zeros((), jnp.int32), jnp.array(True)),
    )


def _choose(settings: Settings, decode, scores_BV, guess_B, draft_BV, is_guessed) -> jax.Array:
    """The next token: greedy, or the guess with the chance min(1, p / q), else one drawn from what
    p has more than q. A looked-up guess has q = 1 for itself.
    """
    key = _key(decode.key, decode.past.step, 0)
    if not settings.do_sample:
        return settings.draw(scores_BV, key)
    p_BV = jax.nn.softmax(scores_BV, axis=-1)
    if draft_BV is None:
        q_BV = jax.nn.one_hot(guess_B, p_BV.shape[-1])
    else:
        q_BV = jax.nn.softmax(draft_BV, axis=-1)
    of_guess = lambda x: jnp.take_along_axis(x, guess_B[:, None], axis=1)[:, 0]  # noqa: E731
    rows_B = jnp.arange(len(guess_B))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(_key(decode.key, decode.past.step, 2), rows_B)
    chance_B = jax.vmap(jax.random.uniform)(keys)
    accepted_B = is_guessed & (chance_B * of_guess(q_BV) < of_guess(p_BV))
    rest_BV = jnp.where(is_guessed, jnp.maximum(p_BV - q_BV, 0), p_BV)
    # Rounding can leave nothing where p and q are equal; then a guess is never refused but for it.
    rest_BV = jnp.where(rest_BV.sum(axis=-1, keepdims=True) > 0, rest_BV, p_BV)
    return jnp.where(accepted_B, guess_B, settings.draw(jnp.log(rest_BV), key))


def _key(key: jax.Array, step: jax.Array, purpose: int) -> jax.Array:
    """A key of its own for each step and purpose; purpose 0 is that of plain decoding."""
    key = jax.random.fold_in(key, step)
    return key if purpose == 0 else jax.random.fold_in(key, 2**31 + purpose)
