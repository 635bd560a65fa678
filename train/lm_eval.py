"""A model as EleutherAI's lm-evaluation-harness takes it (extra `eval`):

    import lm_eval
    from train.lm_eval import Phi3LM

    lm = Phi3LM.from_pretrained("microsoft/Phi-3-mini-4k-instruct", max_length=4096)
    results = lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"], num_fewshot=0)

Texts are tokenised, cut and scored as the harness' own model for transformers does, so that the
numbers compare.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import phi3_jax as phi3
from phi3_jax.generation.decoding import bucket
from phi3_jax.generation.request import stream
from phi3_jax.rope import RopeTables, rope_tables
from phi3_jax.sharding import constrain, replicate

# Between two looks for stop strings in what was generated.
TOKENS_A_LOOK = 8


class Phi3LM(TemplateLM):
    """Phi-3 behind the harness' interface.

    Args:
      model: from `phi3_jax.from_pretrained`.
      params: from `phi3_jax.from_pretrained`.
      tokenizer: of the same folder.
      batch_size: rows that are computed together. Scoring holds logits of as many tokens of each
        as the longest continuation has; a rolling window is all continuation.
      max_length: tokens that a row may have; what is longer loses its beginning. By default the
        model's max_position_embeddings.
      name: what caches of tokenised requests are told apart by.
    """

    # The base class has None and a property of these.
    tokenizer: Any
    tokenizer_name: str = ""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        tokenizer: phi3.Tokenizer,
        batch_size: int = 8,
        max_length: int | None = None,
        name: str = "phi3",
    ):
        super().__init__()
        self.model: Any = model
        self.params, self.tokenizer = params, tokenizer
        self.batch_size = batch_size
        self.max_length = max_length or model.config.max_position_embeddings
        self.tokenizer_name = name

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: str = "bfloat16",
        mesh: Mesh | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> "Phi3LM":
        """The model of a folder of either format, or of a hub id; errors as loading them has."""
        model, params = phi3.from_pretrained(folder, dtype=dtype, mesh=mesh)
        tokenizer = phi3.Tokenizer.from_pretrained(folder)
        name = str(folder).replace("/", "__")
        return cls(model, params, tokenizer, batch_size, max_length, name)

    # --- Text -------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer's folder names no eos token; give its config one")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; a text that begins with the prefix token gets no other."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a prompt for an answer its last message stays open."""
        *before, last = chat_history
        render = functools.partial(
            self.tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False
        )
        return render(chat_history) if add_generation_prompt else render(before) + last["content"]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The folder's own template, "" for Phi-3's format."""
        return self.tokenizer.chat_template or ""

    # --- Scoring ----------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests, **kwargs: Any) -> list[tuple[float, bool]]:
        """The summed log-probability of each continuation, and whether it is the greedy one.

        requests: (context and continuation or None, ids of the context, ids of the continuation).

        Raises:
          ValueError: for a continuation without tokens, or of more than max_length.
        """
        rows = []
        for texts, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"the continuation {texts and texts[1]!r} has {len(continuation)} tokens, must "
                    f"have at least 1 and at most max_length = {self.max_length}"
                )
            whole = [*context, *continuation][-(self.max_length + 1) :]
            rows.append((whole, len(continuation)))
        found = [(0.0, False)] * len(rows)
        for some in _batches([len(whole) for whole, _ in rows], self.batch_size):
            scores = self._scores([rows[index] for index in some])
            for index, score in zip(some, scores, strict=True):
                found[index] = score
                if (texts := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def _scores(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Scores rows of ids, of which the last so many are the continuation, as one batch."""
        width = bucket(max(len(whole) for whole, _ in rows) - 1)
        kept = bucket(max(count for _, count in rows))
        # A column more than a row is wide holds what follows its last token. Rows that fill the
        # batch up have a token too: a row of padding alone would see nothing.
        ids = np.zeros((self.batch_size, width + 1), np.int32)
        mask = np.zeros((self.batch_size, width), np.int32)
        mask[:, 0] = 1
        columns = np.zeros((self.batch_size, kept), np.int32)
        for row, (whole, count) in enumerate(rows):
            ids[row, : len(whole)] = whole
            mask[row, : len(whole) - 1] = 1
            columns[row, :count] = np.arange(len(whole) - 1 - count, len(whole) - 1)
        targets = np.take_along_axis(ids, columns + 1, axis=1)
        mesh, rope = self.model.mesh, rope_tables(self.model.config, width)
        placed = replicate((ids[:, :-1], mask, columns, targets, rope), mesh)
        logprobs, greedy = map(np.asarray, _scored(self.model, self.params, *placed))
        return [
            (float(logprobs[row, :count].sum(dtype=np.float64)), bool(greedy[row, :count].all()))
            for row, (_, count) in enumerate(rows)
        ]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of max_length tokens."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- Generating -------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, cut before the first of its stop strings.

        Raises:
          ValueError: for settings that `phi3_jax.generate` does not have, and for as many tokens
            to generate as max_length.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        found = [""] * len(requests)
        for members in groups.values():
            contexts = [requests[index].args[0] for index in members]
            settings = dict(normalize_gen_kwargs(requests[members[0]].args[1]))
            for index, text in zip(members, self._continued(contexts, settings), strict=True):
                found[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    def _continued(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        new_tokens, until = settings.pop("max_gen_toks"), settings.pop("until")
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {new_tokens} of max_length = {self.max_length} tokens, which "
                "leaves none for a context; give fewer, or another max_length"
            )
        rows = [self.tok_encode(context)[-room:] for context in contexts]
        found = [""] * len(rows)
        for number, some in enumerate(_batches([len(row) for row in rows], self.batch_size)):
            filled = some + some[-1:] * (self.batch_size - len(some))
            tokens = stream(
                self.model,
                self.params,
                *self.tokenizer.pad([rows[index] for index in filled]),
                seed=number,
                max_new_tokens=new_tokens,
                max_cache_len=max(map(len, rows)) + new_tokens,
                **settings,
            )
            for index, text in zip(some, self._texts(tokens, until), strict=False):
                found[index] = text
        return found

    def _texts(self, tokens: Iterator[np.ndarray], until: Sequence[str]) -> list[str]:
        """The texts of a batch, cut; generating ends when each has a stop string or its end."""
        stops = [stop for stop in until if stop]
        # What a row that has ended emits.
        ends = [self.eot_token_id, self.tokenizer.pad_token_id]
        columns: list[np.ndarray] = []
        for token_B in tokens:
            columns.append(token_B)
            if stops and len(columns) % TOKENS_A_LOOK == 0:
                stopped = [any(stop in text for stop in stops) for text in self._decoded(columns)]
                if (np.isin(token_B, ends) | stopped).all():
                    break
        texts = self._decoded(columns)
        return [
            min((text.split(stop)[0] for stop in stops), key=len, default=text) for text in texts
        ]

    def _decoded(self, columns: Sequence[np.ndarray]) -> list[str]:
        rows = np.stack(columns, axis=1)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in groups of similar length, longest first: what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), size):
        yield order[start : start + size]


@functools.partial(jax.jit, static_argnames="model")
def _scored(
    model: nn.Module,
    params: Any,
    ids_BT: jax.Array,
    mask_BT: jax.Array,
    columns_Bn: jax.Array,
    targets_Bn: jax.Array,
    rope: RopeTables,
) -> tuple[jax.Array, ...]:
    """Log-probabilities of targets behind these columns, and whether each is the largest."""
    out: Any = model.apply(
        {"params": params}, ids_BT, mask_BT, logits_to_keep=columns_Bn, rope=rope
    )
    logits = out.logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets_Bn[..., None], axis=-1)[..., 0]
    scores = picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets_Bn
    # On every device: each process's host can see them.
    return tuple(constrain(score, None, None, mesh=model.mesh) for score in scores)
