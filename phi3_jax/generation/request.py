"""One request to generate: checked on the host, then driven through the compiled programs.

`generate` leaves the steps to the compiled loop, `stream` makes them one by one; both are the same
step, so they choose the same tokens.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from phi3_jax.generation.config import SAMPLING_SETTINGS, GenerationConfig
from phi3_jax.generation.decoding import (
    bucket,
    crossing_rows,
    decode_loop,
    decode_step,
    empty_cache,
    first_state,
    goes_on,
    prefill,
)
from phi3_jax.generation.processors import Settings
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.rope import RopeTables, rope_tables
from phi3_jax.sharding import mesh_of, replicate


@dataclass(frozen=True)
class GenerateResult:
    """What `generate` returns.

    Attributes:
      sequences: int32 numpy [B, prompt width + new tokens], prompt and continuation, left-padded
        as the prompt was; finished rows end in padding.
    """

    sequences: np.ndarray


@dataclass
class Request:
    """A checked request on its way: host arrays, and the state on the devices."""

    model: nn.Module
    params: Any
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
        mesh = self.model.mesh
        cache = empty_cache(self.model, batch, self.capacity)
        logits_BV, cache = self._prefill(self.input_ids, self.attention_mask, cache)
        tokens_B = self.attention_mask.sum(axis=1, dtype=np.int32)
        long_B = tokens_B > self.model.config.original_max_position_embeddings
        placed = replicate((long_B, tokens_B, self._seen(), self.settings), mesh)
        key = jax.random.key(self.seed)
        self.settings = placed[-1]
        self.state = first_state(logits_BV, cache, *placed, key, mesh)

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
        placed = replicate(arguments, self.model.mesh)
        return prefill(self.model, self.params, *placed, cache, self.rope)

    @property
    def goes_on(self) -> bool:
        """Whether there is another token to choose."""
        return bool(goes_on(self.state, self.max_new_tokens))

    def step(self) -> None:
        """Chooses one more token of every row."""
        self._cross()
        self.state = decode_step(self.model, self.params, self.state, self.settings, self.rope)

    def run(self) -> None:
        """Chooses all the tokens that are left, inside compiled loops."""
        limit = np.int32(self.max_new_tokens)
        while self.goes_on:
            self._cross()
            self.state = decode_loop(
                self.model, self.params, self.state, self.settings, self.rope, limit
            )

    def _cross(self) -> None:
        """Computes the rows anew, with the long factors, that the next token makes long."""
        if not self.model.config.is_longrope:
            return
        rows_B = np.asarray(crossing_rows(self.model.config, self.state))
        if not rows_B.any():
            return
        ids_BT = self.sequences
        new = np.ones((len(ids_BT), ids_BT.shape[1] - self.input_ids.shape[1]), bool)
        mask_BT = np.concatenate([self.attention_mask, new], axis=1) & rows_B[:, None]
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
    request = prepare(
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
    request = prepare(
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


def prepare(
    model, params, input_ids, attention_mask, generation_config, seed, mesh, overrides
) -> Request:
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
    mesh = mesh or model.mesh
    if mesh is not None and home != mesh and (home is not None or mesh.size > 1):
        place = "one device" if home is None else f"the mesh {dict(home.shape)}"
        raise ValueError(
            f"the parameters are on {place}, not on the mesh {dict(mesh.shape)}; load them with "
            "from_pretrained(..., mesh=mesh), or lay them out with shard_params"
        )
    mesh = home
    return Request(
        # The folder's settings are in `settings` now; without them the program is the same for all.
        model=model.clone(generation_config=None, mesh=mesh),
        params=params,
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
