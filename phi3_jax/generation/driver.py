"""Drives one request through the compiled programs, from its prompt to its last token.

All tokens that nobody on the host has a part in are chosen inside compiled loops; where a streamer,
a constraint, stopping criteria or outputs are asked for, the same step is called once a token.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from phi3_jax.cache import KVCache
from phi3_jax.generation.choice import check_chosen
from phi3_jax.generation.constraints import Constraint
from phi3_jax.generation.decoding import (
    NOTHING,
    Plan,
    StepOutputs,
    Wanted,
    bucket,
    decode_loop,
    decode_step,
    empty_cache,
    first_state,
    prefill,
    spread,
)
from phi3_jax.generation.outputs import GenerateResult
from phi3_jax.generation.prompt import Rows
from phi3_jax.generation.settings import Past
from phi3_jax.rope import RopeTables
from phi3_jax.sharding import replicate

# Tokens between two looks at the clock.
TOKENS_A_LOOK = 8

Criterion = Callable[[np.ndarray, tuple[np.ndarray, ...] | None], Any]


def stops(criterion: Criterion, sequences: np.ndarray, scores: Any) -> np.ndarray:
    """Which rows a caller's criterion ends, bool [B] or [].

    Raises:
      ValueError: where it returns neither a bool nor one for each row.
    """
    answer = np.asarray(criterion(sequences, scores))
    if answer.shape not in ((), (1,), (len(sequences),)) or answer.dtype.kind not in "biu":
        raise ValueError(
            f"a stopping criterion returned {answer.dtype} of shape {answer.shape}, must be a bool "
            f"or one for each of {len(sequences)} rows"
        )
    return answer.astype(bool)


def random_key(seed: int) -> jax.Array:
    """The key of a seed below 2**63, whose upper half jax.random.key alone would drop."""
    upper, lower = divmod(seed, 2**32)
    key = jax.random.key(lower)
    return jax.random.fold_in(key, upper) if upper else key


@dataclass
class Cached:
    """Where the cache of a request comes from.

    Attributes:
      columns: room for tokens, prompt and continuation.
      chunk: tokens of a prompt that are computed in one call, None for all.
      kind: arguments of KVCache.init.
      before: a cache that holds the first columns of the prompt, or None.
    """

    columns: int
    chunk: int | None = None
    kind: dict[str, bool] = field(default_factory=dict)
    before: KVCache | None = None


class Seen(NamedTuple):
    """What the host knows of a DecodeState, as numpy arrays; `step` is the number of tokens."""

    step: int
    done_B: np.ndarray
    new_BS: np.ndarray
    position_R: np.ndarray
    long_R: np.ndarray


@dataclass
class Request:
    """A checked request on its way: host arrays, and the state on the devices."""

    model: nn.Module
    params: Any
    input_ids: np.ndarray  # as they came in, a row for each continuation
    rows: Rows
    plan: Plan
    cached: Cached
    max_new_tokens: int
    seed: int
    past: Past
    stop_B: np.ndarray | None = None
    wanted: Wanted = NOTHING
    keeps_cache: bool = True
    constraint: Constraint | None = None
    criteria: Sequence[Criterion] = ()
    deadline: float | None = None
    outputs: list[Any] = field(default_factory=list)
    timed_out: bool = False
    state: Any = None  # a DecodeState, from start() on
    seen: Seen = field(init=False)

    def __post_init__(self):
        batch = len(self.input_ids)
        none = np.zeros(batch, bool)
        self.seen = Seen(0, none, np.empty((batch, 0), np.int32), none, none)

    @property
    def mesh(self) -> Mesh | None:
        return self.model.mesh

    @property
    def _several_processes(self) -> bool:
        devices = [] if self.mesh is None else self.mesh.devices.flat
        return len({device.process_index for device in devices}) > 1

    @property
    def host_takes_part(self) -> bool:
        """Whether Python is needed between two tokens."""
        return bool(self.criteria) or self.constraint is not None or any(self.wanted)

    # -- the prompt

    def start(self) -> None:
        """Runs the prompt and chooses the first token."""
        logits_RV, cache, outputs = self.run_prompt()
        *placed, allowed_BW = self.first_rows()
        self.state, chosen = first_state(
            logits_RV, cache, *placed, self.plan, random_key(self.seed), allowed_BW,
            self.cached.columns, self.mesh, self.wanted,
        )  # fmt: skip
        outputs = dataclasses.replace(outputs, scores=chosen.scores, logits=chosen.logits)
        self.after_step(outputs)

    def first_rows(self) -> tuple[Any, ...]:
        """What the first state needs to know of the rows: which are long, the position of their
        next token, the past, how far they are into a stop string, and what they may begin with.
        """
        tokens_R = self.rows.mask.sum(axis=1, dtype=np.int32)[self.rows.spread]
        long_R = tokens_R > self.model.config.original_max_position_embeddings
        host = (long_R, tokens_R, self.past, self.stop_B, self.allowed())
        return replicate(host, self.mesh)

    def run_prompt(self) -> tuple[jax.Array, KVCache, StepOutputs]:
        """Logits [R, V] after the prompts, their cache, and outputs, spread to continuations."""
        rows, before = self.rows, self.cached.before
        start = 0 if before is None else int(before.length)
        cache = before
        if cache is None:
            kind = tuple(self.cached.kind.items())
            cache = empty_cache(self.model, len(rows.ids), self.cached.columns, kind)
        # The program has no scores and always logits: asking for them compiles no other.
        wanted = self.wanted._replace(scores=False, logits=False)
        logits_RV, cache, outputs = self.fill(
            rows.ids, rows.mask, cache, rows.mask, start=start, wanted=wanted
        )
        if rows.copies > 1:
            return spread(logits_RV, cache, outputs, rows.copies, self.mesh)
        return logits_RV, cache, outputs

    def fill(
        self,
        ids_RT: np.ndarray,
        mask_RT: np.ndarray,
        cache: KVCache,
        whole_RT: np.ndarray,
        start: int = 0,
        wanted: Wanted = NOTHING,
        of: tuple[nn.Module, Any, RopeTables] | None = None,
    ) -> tuple[jax.Array, KVCache, StepOutputs]:
        """Computes columns `start` and later of rows into a cache, chunk by chunk.

        Args:
          ids_RT, mask_RT: the columns; rows that are False throughout keep their slots.
          cache: where to; donated.
          whole_RT: mask of the rows as long as they will be when the next token is chosen, which
            decides whether they are long.
          start: columns that the cache holds already.
          wanted: outputs to give.
          of: another model than the request's, its parameters and tables.
        """
        model, params, rope = of or (self.model, self.params, self.plan.rope)
        config, total = model.config, ids_RT.shape[1]
        position_RT = np.where(mask_RT, np.cumsum(mask_RT, axis=1) - 1, 0).astype(np.int32)
        long_R = whole_RT.sum(axis=1) > config.original_max_position_embeddings
        rows_R = replicate(mask_RT.any(axis=1), self.mesh)
        if config.is_longrope:
            rope = rope._replace(long_B=replicate(long_R, self.mesh))
        chunk = self.cached.chunk or total
        logits_RV: Any = None
        outputs = StepOutputs()
        for begin in range(start, total, chunk):
            end = min(begin + chunk, total)
            width = min(bucket(end - begin), self.cached.columns - begin)
            right = ((0, 0), (0, width - (end - begin)))
            pieces = [np.pad(x[:, begin:end], right) for x in (ids_RT, mask_RT, position_RT)]
            *placed, length = replicate((*pieces, np.int32(end)), self.mesh)
            logits_RV, cache, outputs = prefill(
                model, params, *placed, rows_R, length, cache, rope, begin == 0, wanted
            )
        return logits_RV, cache, outputs

    # -- the tokens

    @property
    def goes_on(self) -> bool:
        """Whether there is another token to choose."""
        if self.deadline is not None and not self.timed_out:
            late = np.bool_(time.monotonic() > self.deadline)
            # All processes stop after the same token: the first one's clock counts.
            if self._several_processes:
                late = multihost_utils.broadcast_one_to_all(late)
            self.timed_out = bool(late)
        left = self.seen.step < self.max_new_tokens and not self.seen.done_B.all()
        return bool(left) and not self.timed_out

    def step(self) -> None:
        """Chooses one more token of every row."""
        if self.seen.step >= self.max_new_tokens:
            raise ValueError(
                f"all {self.max_new_tokens} tokens that were asked for are there; begin with a "
                "larger max_new_tokens"
            )
        self.cross()
        allowed_BW = replicate(self.allowed(), self.mesh)
        self.state, outputs = decode_step(
            self.model, self.params, self.state, self.plan, allowed_BW, self.wanted
        )
        self.after_step(outputs)

    def run(self) -> None:
        """Chooses all the tokens that are left."""
        while self.goes_on:
            if self.host_takes_part:
                self.step()
                continue
            self.cross()
            pause = self.max_new_tokens
            if self.deadline is not None:
                pause = min(pause, self.seen.step + TOKENS_A_LOOK)
            self.loop(pause)
            self.look()

    def loop(self, pause: int) -> None:
        """Chooses tokens inside a compiled loop until there are `pause`, or a row crosses."""
        self.state = decode_loop(self.model, self.params, self.state, self.plan, np.int32(pause))

    def tokens(self) -> Iterator[np.ndarray]:
        """All new tokens one by one, int32 [N] each, as soon as they are chosen."""
        self.start()
        given = 0
        while True:
            for column in range(given, self.seen.step):
                yield self.seen.new_BS[:, column]
            given = self.seen.step
            if not self.goes_on:
                return
            self.step()

    def cross(self) -> None:
        """Computes the rows anew, with the long factors, that the next token makes long."""
        config = self.model.config
        if not config.is_longrope:
            return
        long_R = self.seen.position_R + 1 > config.original_max_position_embeddings
        going_R = np.tile(~self.seen.done_B, len(long_R) // len(self.seen.done_B))
        rows_R = long_R & ~self.seen.long_R & going_R
        if not rows_R.any():
            return
        ids_RT, mask_RT = self.cache_rows
        mask_RT = mask_RT & rows_R[:, None]
        # The token chosen last is part of what makes the row long; the next step runs it.
        _, cache, _ = self.fill(ids_RT[:, :-1], mask_RT[:, :-1], self.state.cache, mask_RT)
        long_R = replicate(self.seen.long_R | rows_R, self.mesh)
        self.state = dataclasses.replace(self.state, cache=cache, long_R=long_R)

    def allowed(self) -> np.ndarray | None:
        """Bits of the tokens that may be chosen next, uint32 [B, ceil(V / 32)]; None for all."""
        if self.constraint is None:
            return None
        live = zip(self.own_tokens, self.live_B, strict=True)
        rows = [tokens if is_live else None for tokens, is_live in live]
        allowed_BW = self.constraint.allowed(rows, self.seen.step)
        if allowed_BW is None:  # nor will it ever have anything to say again
            self.constraint = None
        return allowed_BW

    def after_step(self, outputs: StepOutputs) -> None:
        """What the host has to do with a new token."""
        self.look()
        self.keep_outputs(outputs)
        self.ask_criteria()

    def keep_outputs(self, outputs: StepOutputs) -> None:
        """Fetches what was asked for of one token."""
        if any(self.wanted):
            batch = len(self.seen.done_B)
            self.outputs.append(jax.tree.map(lambda x: np.asarray(x)[:batch], outputs))

    def ask_criteria(self) -> None:
        """Ends the rows that the stopping criteria end."""
        if not self.criteria:
            return
        done_B = self.seen.done_B
        scores = tuple(step.scores for step in self.outputs) if self.wanted.scores else None
        for criterion in self.criteria:
            done_B = done_B | stops(criterion, self.sequences, scores)
        self.seen = self.seen._replace(done_B=done_B)
        self.state = dataclasses.replace(self.state, done_B=replicate(done_B, self.mesh))

    def look(self) -> None:
        """Fetches what the host has to know of the state, in one go.

        Raises:
          ValueError: where a token had to be chosen by scores with NaN.
        """
        state = self.state
        names = ("done_B", "new_BS", "position_R", "long_R")
        step, *arrays = jax.device_get((state.past.step, *(getattr(state, n) for n in names)))
        self.seen = Seen(int(step), *arrays)
        check_chosen(self.seen.new_BS[:, : self.seen.step], self.model.dtype)

    # -- what there is so far

    @property
    def sequences(self) -> np.ndarray:
        """Prompt and tokens chosen so far, int32 [N, T]."""
        return np.concatenate([self.input_ids, self.seen.new_BS[:, : self.seen.step]], axis=1)

    @property
    def cache_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of all that the cache's rows hold, and of the tokens chosen last [R, T]."""
        numbers, new_BS = self.rows.spread, self.seen.new_BS[:, : self.seen.step]
        new_RS = np.tile(new_BS, (len(numbers) // len(new_BS), 1))
        ids_RT = np.concatenate([self.rows.ids[numbers], new_RS], axis=1)
        new_mask = np.ones(new_RS.shape, bool)
        return ids_RT, np.concatenate([self.rows.mask[numbers], new_mask], axis=1)

    @property
    def live_B(self) -> np.ndarray:
        """Rows that have not ended, bool [B]."""
        return ~self.seen.done_B

    @property
    def own_tokens(self) -> list[np.ndarray]:
        """The tokens of every continuation without padding."""
        ids_RT, mask_RT = self.cache_rows
        batch = len(self.input_ids)
        return [ids[mask] for ids, mask in zip(ids_RT[:batch], mask_RT[:batch], strict=True)]

    def result(self) -> GenerateResult:
        """All that was asked for."""
        wanted, steps = self.wanted, self.outputs
        return GenerateResult(
            sequences=self.sequences,
            scores=tuple(step.scores for step in steps) if wanted.scores else None,
            logits=tuple(step.logits for step in steps) if wanted.logits else None,
            hidden_states=self._hidden_states() if wanted.hidden_states else None,
            attentions=self._attentions() if wanted.attentions else None,
            cache=self.state.cache if self.keeps_cache and not self._outdated else None,
        )

    @property
    def _outdated(self) -> bool:
        """Whether a row has ended and its padding gone over the line of longrope."""
        config = self.model.config
        over_R = self.seen.position_R > config.original_max_position_embeddings
        return config.is_longrope and bool((over_R & ~self.seen.long_R).any())

    # A prompt was padded on the right to its bucket, and on the left to its negative prompt.
    def _hidden_states(self) -> tuple[tuple[np.ndarray, ...], ...]:
        prompt, *rest = [step.hidden_states for step in self.outputs]
        own = slice(self.rows.ids.shape[1] - self.input_ids.shape[1], self.rows.ids.shape[1])
        return (tuple(x[:, own] for x in prompt), *rest)

    def _attentions(self) -> tuple[tuple[np.ndarray, ...], ...]:
        width, steps = self.rows.ids.shape[1], [step.attentions for step in self.outputs]
        first = width - self.input_ids.shape[1]
        prompt = tuple(x[:, :, first:width, first:width] for x in steps[0])
        rest = [
            tuple(x[..., first : width + index + 1] for x in step)
            for index, step in enumerate(steps[1:])
        ]
        return (prompt, *rest)
