"""Beam search and beam sampling: their compiled programs.

How an item flows: its M running beams are rows of the cache, side by side. A step runs the token
that each beam chose last and adds the log-probabilities of the next to the beam's score; the C best
continuations among all beams, or C drawn ones, are the candidates (`next_candidates`). Of those
that stop, the first M compete for the item's M finished places; of the others the best M run on,
and take the cache rows of their beams along (`choose_beams`). `beam_loop` repeats the two inside
one compiled program, up to the longrope line, as decode_loop does.

Letters beside those of model.py: I items of the batch, M beams of an item, C candidates of an item.
B are the rows that tokens are chosen for, I * M, and R those of the cache, as in decoding.py.

Source: GenerationMixin._beam_search of transformers. A place without a hypothesis has the score
-inf here; the reference's -1e9 lets a beam without any continuation end in it.
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
from phi3_jax.generation.choice import NO_TOKEN
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.decoding import (
    Plan,
    StepOutputs,
    Wanted,
    crossing_rows,
    forward,
    goes_on,
    guide,
    readable,
    settled,
)
from phi3_jax.generation.settings import Past
from phi3_jax.rope import rows_are_long


@flax.struct.dataclass
class Search:
    """What a GenerationConfig says of beams.

    Attributes:
      length_penalty: float32, the power of the length that a finished score is divided by.
      limit: int32, the new tokens at which every beam ends.
      early, never: bool, whether early_stopping is True or "never". An item ends when its best
        beam would not get among its M finished hypotheses if it ended now (False), as soon as
        there are M of them (True), or when it would not at any length ("never").
      num_beams: M (static).
      candidates: C, so many that M go on whichever of them are end tokens (static).
    """

    length_penalty: jax.Array
    limit: jax.Array
    early: jax.Array
    never: jax.Array
    num_beams: int = flax.struct.field(pytree_node=False)
    candidates: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, config: GenerationConfig, vocab_size: int, max_new_tokens: int) -> "Search":
        """The search that a config asks for."""
        beams, ends = config.num_beams, len(config.eos_token_ids)
        return cls(
            length_penalty=jnp.asarray(config.length_penalty, jnp.float32),
            limit=jnp.asarray(max_new_tokens, jnp.int32),
            early=jnp.asarray(config.early_stopping is True),
            never=jnp.asarray(config.early_stopping == "never"),
            num_beams=beams,
            candidates=min(max(2, 1 + ends), vocab_size) * beams,
        )


@flax.struct.dataclass
class Hypotheses:
    """Continuations of each item, X of them.

    Attributes:
      tokens_IXS: int32, the new tokens, padding behind them.
      source_IXS: int32, the row that each token was chosen for, -1 behind them.
      score_IX: float32, the sum of log-probabilities, of finished ones over length **
        length_penalty; -inf for what is none.
    """

    tokens_IXS: jax.Array
    source_IXS: jax.Array
    score_IX: jax.Array

    def take(self, index_IX: jax.Array) -> "Hypotheses":
        """Those with these numbers in their item."""
        expand = lambda x: jnp.expand_dims(index_IX, tuple(range(2, x.ndim)))  # noqa: E731
        return jax.tree.map(lambda x: jnp.take_along_axis(x, expand(x), axis=1), self)

    def best(self, score_IX: jax.Array, number: int) -> tuple["Hypotheses", jax.Array]:
        """The best by these scores, which become theirs, in falling order; and their numbers."""
        score_IX, index_IX = lax.top_k(score_IX, number)
        return dataclasses.replace(self.take(index_IX), score_IX=score_IX), index_IX


@flax.struct.dataclass
class Candidates:
    """Continuations of the running beams by one token, C for each item.

    Attributes:
      hypotheses: best first, or in the order in which they were drawn.
      stopped_IC: bool, those that end with an end token or a stop string.
      stop_IC: int32, how far each is into a stop string; None without stop strings.
    """

    hypotheses: Hypotheses
    stopped_IC: jax.Array
    stop_IC: jax.Array | None


@flax.struct.dataclass
class BeamState:
    """Everything that a step changes; what decoding.py asks of a DecodeState, it has too.

    Attributes:
      cache, position_R, long_R, past, stop_B, key: as in DecodeState.
      running: the M beams that go on, best first.
      finished: the M best hypotheses that have ended, best first.
      open_I: bool, items whose finished hypotheses can still get better; the others are computed
        on and change no more.
    """

    cache: KVCache
    position_R: jax.Array
    long_R: jax.Array
    running: Hypotheses
    finished: Hypotheses
    open_I: jax.Array
    past: Past
    stop_B: jax.Array | None
    key: jax.Array

    @property
    def new_BS(self) -> jax.Array:
        """The tokens of the running beams."""
        tokens_IMS = self.running.tokens_IXS
        return tokens_IMS.reshape(-1, tokens_IMS.shape[2])

    @property
    def done_B(self) -> jax.Array:
        """Rows whose item has ended."""
        return jnp.repeat(~self.open_I, self.running.score_IX.shape[1])


@functools.partial(jax.jit, static_argnames=("columns", "mesh", "wanted"), donate_argnames="cache")
def first_candidates(
    logits_RV, cache, long_R, position_R, past, stop_B, plan: Plan, search: Search, key, allowed_BW,
    columns: int, mesh: Mesh | None, wanted: Wanted,
) -> tuple[BeamState, Candidates, StepOutputs]:  # fmt: skip
    """The state after a prefill whose rows are spread to the beams, and the first candidates;
    arguments as in first_state of decoding.py.
    """
    beams = search.num_beams
    items = len(logits_RV) // (1 if plan.guidance is None else 2) // beams
    nothing = Hypotheses(
        tokens_IXS=jnp.full((items, beams, columns), plan.settings.pad_id),
        source_IXS=jnp.full((items, beams, columns), -1, jnp.int32),
        score_IX=jnp.full((items, beams), -jnp.inf, jnp.float32),
    )
    # The beams of an item are alike: one of them is continued.
    first_IM = nothing.score_IX.at[:, 0].set(0.0)
    state = BeamState(
        cache=cache,
        position_R=position_R,
        long_R=long_R,
        running=dataclasses.replace(nothing, score_IX=first_IM),
        finished=nothing,
        open_I=jnp.ones(items, bool),
        past=past,
        stop_B=stop_B,
        key=key,
    )
    found, outputs = _candidates(state, logits_RV, plan, search, allowed_BW, wanted, StepOutputs())
    return settled(state, mesh), readable(found, mesh), readable(outputs, mesh)


@functools.partial(jax.jit, static_argnames=("model", "wanted"), donate_argnames="state")
def next_candidates(
    model: nn.Module,
    params: Any,
    state: BeamState,
    plan: Plan,
    search: Search,
    allowed_BW: jax.Array | None,
    wanted: Wanted,
) -> tuple[BeamState, Candidates, StepOutputs]:
    """Runs the tokens chosen last and finds the candidates; arguments as in `decode_step`.

    Scores among the outputs are the processed log-probabilities of the next token, without those
    before it.
    """
    state, found, outputs = _next(model, params, state, plan, search, allowed_BW, wanted)
    return settled(state, model.mesh), readable(found, model.mesh), readable(outputs, model.mesh)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def choose_beams(
    state: BeamState,
    found: Candidates,
    search: Search,
    stopped_IC: jax.Array | None,
    mesh: Mesh | None,
) -> BeamState:
    """The state with one more token of every beam.

    stopped_IC: bool, candidates that stop for a reason of the host's.
    """
    if stopped_IC is not None:
        found = dataclasses.replace(found, stopped_IC=found.stopped_IC | stopped_IC)
    return settled(_choose(state, found, search), mesh)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def beam_loop(
    model: nn.Module,
    params: Any,
    state: BeamState,
    plan: Plan,
    search: Search,
    pause: jax.Array,
) -> BeamState:
    """Repeats the step until every item has ended, there are `pause` tokens, or a row crosses.

    Unlike search.limit, `pause` ends no beam.
    """

    def runs_on(state: Any) -> jax.Array:
        return goes_on(state, pause) & ~crossing_rows(model.config, state).any()

    def step(state: Any) -> BeamState:
        state, found, _ = _next(model, params, state, plan, search, None, Wanted())
        return _choose(state, found, search)

    return settled(lax.while_loop(runs_on, step, state), model.mesh)


def _next(model, params, state, plan, search, allowed_BW, wanted):
    token_B = lax.dynamic_index_in_dim(state.new_BS, state.past.step - 1, axis=1, keepdims=False)
    long_R1 = rows_are_long(model.config, state.position_R[:, None])
    logits_RV, cache, outputs = forward(
        model, params, state.cache, token_B, state.position_R, plan.rope, wanted
    )
    state = dataclasses.replace(
        state, cache=cache, position_R=state.position_R + 1, long_R=state.long_R | long_R1[:, 0]
    )
    return state, *_candidates(state, logits_RV, plan, search, allowed_BW, wanted, outputs)


def _candidates(state, logits_RV, plan, search, allowed_BW, wanted, outputs):
    settings, step, before_IM = plan.settings, state.past.step, state.running.score_IX
    items, beams = before_IM.shape
    # As in the reference, the processors see log-probabilities.
    log_probs_BV = guide(jax.nn.log_softmax(logits_RV, axis=-1), plan.guidance)
    scores_BV = settings.process(state.past, log_probs_BV, allowed_BW)
    if wanted.scores:
        outputs = dataclasses.replace(outputs, scores=scores_BV)
    if wanted.logits:
        outputs = dataclasses.replace(outputs, logits=logits_RV[: len(scores_BV)])

    vocab = scores_BV.shape[1]
    total_IMV = scores_BV.reshape(items, beams, vocab) + before_IM[:, :, None]
    # What a beam without a hypothesis was given for scores may even be NaN.
    total_IMV = jnp.where(jnp.isneginf(before_IM)[:, :, None], -jnp.inf, total_IMV)
    total_IX = total_IMV.reshape(items, beams * vocab)
    order_IX = total_IX
    if settings.do_sample:
        # The largest sums with Gumbel noise are draws without replacement, in the order of drawing
        # (arXiv:1903.06059). Each item has a key of its own.
        key = jax.random.fold_in(state.key, step)
        keys_I = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(items))
        order_IX += jax.vmap(lambda key: jax.random.gumbel(key, (beams * vocab,)))(keys_I)
    _, chosen_IC = lax.top_k(order_IX, search.candidates)
    score_IC = jnp.take_along_axis(total_IX, chosen_IC, axis=1)
    parent_IC, token_IC = jnp.divmod(chosen_IC, vocab)
    token_IC = jnp.where(jnp.isnan(score_IC), NO_TOKEN, token_IC)
    row_IC = parent_IC + beams * jnp.arange(items)[:, None]
    parents = state.running.take(parent_IC)
    hypotheses = Hypotheses(
        tokens_IXS=parents.tokens_IXS.at[:, :, step].set(token_IC),
        source_IXS=parents.source_IXS.at[:, :, step].set(row_IC),
        score_IX=score_IC,
    )
    stopped_IC = (token_IC[:, :, None] == settings.eos_ids).any(axis=2)
    stop_IC = None
    if plan.stop is not None and state.stop_B is not None:
        stops, hits = plan.stop.advance(state.stop_B[row_IC.reshape(-1)], token_IC.reshape(-1))
        stop_IC, stopped_IC = stops.reshape(row_IC.shape), stopped_IC | hits.reshape(row_IC.shape)
    return Candidates(hypotheses, stopped_IC, stop_IC), outputs


def _choose(state: BeamState, found: Candidates, search: Search) -> BeamState:
    step, beams = state.past.step, search.num_beams
    stopped_IC = found.stopped_IC | (step + 1 >= search.limit)
    score_IC = found.hypotheses.score_IX
    running, going_IM = found.hypotheses.best(jnp.where(stopped_IC, -jnp.inf, score_IC), beams)

    # Candidates beyond the first M are there to go on with, not to end.
    ends_IC = stopped_IC & (jnp.arange(search.candidates) < beams) & state.open_I[:, None]
    length = (step + 1).astype(jnp.float32)
    ended_IC = jnp.where(ends_IC, score_IC / length**search.length_penalty, -jnp.inf)
    join = lambda *arrays: jnp.concatenate(arrays, axis=1)  # noqa: E731
    finished, _ = jax.tree.map(join, state.finished, found.hypotheses).best(
        join(state.finished.score_IX, ended_IC), beams
    )

    better_I = _can_get_better(search, running.score_IX[:, 0], finished.score_IX[:, -1], length)

    token_B = running.tokens_IXS[:, :, step].reshape(-1)
    row_B = running.source_IXS[:, :, step].reshape(-1)
    stop_B = state.stop_B
    if found.stop_IC is not None:
        stop_B = jnp.take_along_axis(found.stop_IC, going_IM, axis=1).reshape(-1)
    return dataclasses.replace(
        state,
        cache=_take_within(state.cache, row_B.reshape(-1, beams) % beams),
        running=running,
        finished=finished,
        open_I=state.open_I & better_I,
        past=state.past.take(row_B).append(token_B),
        stop_B=stop_B,
    )


def _can_get_better(search: Search, best_I, worst_I, length) -> jax.Array:
    """Whether the best running beams could end better than the worst finished places (Search)."""
    length = jnp.where(search.never & (search.length_penalty > 0), search.limit, length)
    full_I = worst_I > -jnp.inf
    return (best_I / length**search.length_penalty > worst_I) & ~(search.early & full_I)


def _take_within(cache: KVCache, parent_IM: jax.Array) -> KVCache:
    """The cache of other beams of the same items, without a look at other items: they may be on
    other devices. Under guidance the rows of the negative prompts follow those of the prompts.
    """
    items, beams = parent_IM.shape

    def take(x: jax.Array, names: Any) -> jax.Array:
        axis = names.index("batch")
        groups = x.shape[axis] // beams
        grouped = x.reshape(*x.shape[:axis], groups, beams, *x.shape[axis + 1 :])
        index = jnp.tile(parent_IM, (groups // items, 1))
        index = index.reshape(*[1] * axis, groups, beams, *[1] * (x.ndim - axis - 1))
        return jnp.take_along_axis(grouped, index, axis=axis + 1).reshape(x.shape)

    return cache.mapped(take)
