"""Drives a request whose tokens are guessed first (speculative.py)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.decoding import empty_cache
from phi3_jax.generation.driver import Request
from phi3_jax.generation.settings import Past, aligned_left
from phi3_jax.generation.speculative import (
    AssistedState,
    Drafter,
    assisted_loop,
    assisted_step,
)
from phi3_jax.rope import RopeTables, rope_tables
from phi3_jax.sharding import mesh_of, replicate
from phi3_jax.split_layers import decodes_split, split_layers

# What room for guesses is a multiple of.
GUESSES_A_STEP = 4


def read_drafter(
    settings: GenerationConfig,
    assistant: tuple[nn.Module, Any] | None,
    model: nn.Module,
    columns: int,
) -> Drafter:
    """Where the guesses of a request come from: the draft model, or prompt lookup.

    Raises:
      ValueError: for a draft model with another vocabulary or on another mesh.
    """
    rope: RopeTables | None = None
    draft_model: Any = None
    params: Any = None
    confidence = max_ngram = None
    most = settings.prompt_lookup_num_tokens or settings.num_assistant_tokens
    if assistant is None:
        max_ngram = np.int32(settings.max_matching_ngram_size or 2)
    else:
        draft_model, params = assistant
        ours, theirs = model.config.vocab_size, draft_model.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"the assistant has a vocabulary of {theirs} and the model one of {ours}; an "
                "assistant has to have the model's tokenizer"
            )
        if mesh_of(params) != model.mesh:
            raise ValueError(
                "the assistant's parameters are not on the mesh of the model's; load both with the "
                "same mesh"
            )
        draft_model = draft_model.clone(generation_config=None, mesh=model.mesh)
        rope = rope_tables(draft_model.config, columns)
        if settings.assistant_confidence_threshold:
            confidence = np.float32(settings.assistant_confidence_threshold)
    drafter = Drafter(
        params=None,
        rope=rope,
        confidence=confidence,
        max_ngram=max_ngram,
        model=draft_model,
        most=np.int32(most),
        # Rounded up, so that a guess more compiles nothing.
        width=-(-most // GUESSES_A_STEP) * GUESSES_A_STEP,
        adapts=settings.num_assistant_tokens_schedule != "constant",
    )
    if params is not None and decodes_split(params):
        params = split_layers(params)
    return dataclasses.replace(replicate(drafter, model.mesh), params=params)


@dataclass
class AssistedRequest(Request):
    """A request whose tokens are guessed by a draft model or by prompt lookup."""

    drafter: Any = None
    assisted: Any = None  # an AssistedState, from start() on

    def start(self) -> None:
        """Runs the prompt, also through the draft model, and chooses the first token."""
        super().start()
        history = cache = long_B = None
        draft_model = self.drafter.model
        if draft_model is None:
            history = self._history()
        else:
            line = draft_model.config.original_max_position_embeddings
            numbers = self.rows.spread[: len(self.input_ids)]
            ids_BT, mask_BT = self.rows.ids[numbers], self.rows.mask[numbers]
            split = (("split", True),) if decodes_split(self.drafter.params) else ()
            cache = empty_cache(draft_model, len(ids_BT), self.cached.columns, split)
            cache = self._fill_draft(ids_BT, mask_BT, cache, mask_BT)
            long_B = replicate(mask_BT.sum(axis=1) > line, self.mesh)
        # A copy: the rounds write into their state.
        guesses = jnp.copy(self.drafter.most)
        self.assisted = AssistedState(self.state, cache, long_B, history, guesses)

    def _history(self) -> Past:
        ids_BT, mask_BT = self.cache_rows
        batch = len(self.input_ids)
        ids_BT, mask_BT = ids_BT[:batch], mask_BT[:batch]
        tokens_BS = aligned_left(ids_BT, mask_BT, self.cached.columns)
        length_B = mask_BT.sum(axis=1, dtype=np.int32)
        return replicate(Past(np.int32(1), tokens_BS, length_B), self.mesh)  # ty: ignore

    def _fill_draft(self, ids_BT, mask_BT, cache, whole_BT):
        drafter = self.drafter
        draft = (drafter.model, drafter.params, drafter.rope)
        return self.fill(ids_BT, mask_BT, cache, whole_BT, of=draft)[1]

    def step(self) -> None:
        """One round: one token of every row at least."""
        self.cross()
        before = self.seen.step
        state, outputs = assisted_step(
            self.model, self.params, self._with_state(), self.plan, self.drafter,
            np.int32(self.max_new_tokens), self.wanted,
        )  # fmt: skip
        self._take(state)
        self.look()
        for index in range(self.seen.step - before):
            self.keep_outputs(jax.tree.map(lambda x: x[index], outputs))  # noqa: B023
        self.ask_criteria()

    def loop(self, pause: int) -> None:
        """Rounds inside a compiled loop."""
        limits = np.int32(self.max_new_tokens), np.int32(pause)
        state = self._with_state()
        self._take(assisted_loop(self.model, self.params, state, self.plan, self.drafter, *limits))

    def cross(self) -> None:
        """Computes anew what the next token makes long, in the model and in the draft model."""
        super().cross()
        draft_model = self.drafter.model
        if draft_model is None or not draft_model.config.is_longrope:
            return
        line, batch = draft_model.config.original_max_position_embeddings, len(self.seen.done_B)
        was_long_B = np.asarray(self.assisted.long_B)
        long_B = self.seen.position_R[:batch] + 1 > line
        rows_B = long_B & ~was_long_B & ~self.seen.done_B
        if not rows_B.any():
            return
        ids_RT, mask_RT = self.cache_rows
        ids_BT, mask_BT = ids_RT[:batch], mask_RT[:batch] & rows_B[:, None]
        cache = self._fill_draft(ids_BT[:, :-1], mask_BT[:, :-1], self.assisted.cache, mask_BT)
        self.assisted = dataclasses.replace(
            self.assisted, cache=cache, long_B=replicate(was_long_B | rows_B, self.mesh)
        )

    # The state of plain decoding is kept where Request looks for it.
    def _with_state(self) -> AssistedState:
        return dataclasses.replace(self.assisted, decode=self.state)

    def _take(self, state: AssistedState) -> None:
        self.assisted, self.state = state, state.decode
