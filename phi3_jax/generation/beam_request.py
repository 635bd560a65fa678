"""Drives a request with beams; what there is to all requests is in driver.py."""

import dataclasses
from dataclasses import dataclass, field

import jax
import numpy as np

from phi3_jax.generation.beam import (
    Candidates,
    Search,
    beam_loop,
    choose_beams,
    first_candidates,
    next_candidates,
)
from phi3_jax.generation.decoding import StepOutputs
from phi3_jax.generation.driver import Request, random_key, stops
from phi3_jax.generation.outputs import GenerateResult
from phi3_jax.sharding import replicate


@dataclass
class BeamRequest(Request):
    """A Request whose continuations are the beams of its prompts.

    Attributes:
      search: how the beams are kept.
      num_return_sequences: how many hypotheses of each prompt to return, the best ones.
    """

    search: Search = field(kw_only=True)
    num_return_sequences: int = field(kw_only=True, default=1)

    def start(self) -> None:
        """Runs the prompt and chooses the first token of every beam."""
        logits_RV, cache, outputs = self.run_prompt()
        *placed, allowed_BW = self.first_rows()
        self.state, found, chosen = first_candidates(
            logits_RV, cache, *placed, self.plan, self.search, random_key(self.seed),
            allowed_BW, self.cached.columns, self.mesh, self.wanted,
        )  # fmt: skip
        outputs = dataclasses.replace(outputs, scores=chosen.scores, logits=chosen.logits)
        self._choose(found, outputs)

    def step(self) -> None:
        """Chooses one more token of every beam."""
        self.cross()
        allowed_BW = replicate(self.allowed(), self.mesh)
        self.state, found, outputs = next_candidates(
            self.model, self.params, self.state, self.plan, self.search, allowed_BW, self.wanted
        )
        self._choose(found, outputs)

    def run(self) -> None:
        """Chooses all the tokens that are left."""
        super().run()
        if self.timed_out and not self.seen.done_B.all():
            # The beams end with one more token, as they would at their greatest length.
            self.search = dataclasses.replace(self.search, limit=np.int32(self.seen.step + 1))
            self.step()

    def loop(self, pause: int) -> None:
        """Chooses tokens inside a compiled loop until there are `pause`, or a row crosses."""
        self.state = beam_loop(
            self.model, self.params, self.state, self.plan, self.search, np.int32(pause)
        )

    def _choose(self, found: Candidates, outputs: StepOutputs) -> None:
        self.keep_outputs(outputs)
        stopped_IC = replicate(self._stopped(found), self.mesh)
        self.state = choose_beams(self.state, found, self.search, stopped_IC, self.mesh)
        self.look()

    def _stopped(self, found: Candidates) -> np.ndarray | None:
        """Which candidates the caller's criteria stop."""
        if not self.criteria:
            return None
        items, width = found.stopped_IC.shape
        prompts = np.repeat(self.input_ids[:: self.search.num_beams], width, axis=0)
        new = np.asarray(found.hypotheses.tokens_IXS)[:, :, : self.seen.step + 1]
        sequences = np.concatenate([prompts, new.reshape(items * width, -1)], axis=1)
        scores = tuple(step.scores for step in self.outputs) if self.wanted.scores else None
        stopped = np.zeros(len(sequences), bool)
        for criterion in self.criteria:
            stopped |= stops(criterion, sequences, scores)
        return stopped.reshape(items, width)

    @property
    def live_B(self) -> np.ndarray:
        """Beams whose item has not ended, and that are not given up."""
        if self.state is None:
            return super().live_B
        return super().live_B & np.isfinite(np.asarray(self.state.running.score_IX)).reshape(-1)

    def result(self) -> GenerateResult:
        """The best hypotheses of each prompt side by side, cut behind the longest."""
        best = jax.tree.map(
            lambda x: np.concatenate(np.asarray(x)[:, : self.num_return_sequences]),
            self.state.finished,
        )
        new = int((best.source_IXS >= 0).sum(axis=1).max())
        prompts = self.input_ids[:: self.search.num_beams]
        prompts = np.repeat(prompts, self.num_return_sequences, axis=0)
        return dataclasses.replace(
            super().result(),
            sequences=np.concatenate([prompts, best.tokens_IXS[:, :new]], axis=1),
            sequences_scores=best.score_IX,
            beam_indices=best.source_IXS[:, :new],
            cache=None,
        )
