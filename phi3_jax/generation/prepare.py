"""A request to generate, checked before anything runs and laid out for its driver."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from phi3_jax.cache import KVCache
from phi3_jax.config import Phi3Config
from phi3_jax.generation.assisted_request import (
    GUESSES_A_STEP,
    AssistedRequest,
    read_drafter,
)
from phi3_jax.generation.beam import Search
from phi3_jax.generation.beam_request import BeamRequest
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.constraints import All, Constraint, PrefixAllowed
from phi3_jax.generation.decoding import Plan, Wanted, bucket
from phi3_jax.generation.driver import Cached, Criterion, Request
from phi3_jax.generation.prompt import Rows, read_prompt, with_negative_prompts
from phi3_jax.generation.prompt_cache import PromptCache
from phi3_jax.generation.settings import LogitsProcessor, Past, Settings
from phi3_jax.generation.stop_strings import StopStrings
from phi3_jax.generation.token_healing import heal
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.processes import on_host
from phi3_jax.rope import rope_tables
from phi3_jax.sharding import mesh_of, replicate
from phi3_jax.split_layers import decodes_split, split_layers

Assistant = tuple[nn.Module, Any]


def prepare(
    model: nn.Module,
    params: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    *,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[Criterion] = (),
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
    assistant: Assistant | None = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    tokenizer: Any = None,
    grammar: Any = None,
    cache: KVCache | PromptCache | None = None,
    use_model_defaults: bool = True,
    **generation_overrides: Any,
) -> Request:
    """The request of `generate`, checked and not yet begun; arguments and errors as there."""
    begun = time.monotonic()
    if not isinstance(model, Phi3ForCausalLM):
        raise ValueError(
            f"{type(model).__name__} has no head to generate with; use Phi3ForCausalLM"
        )
    logits_processor, stopping_criteria = logits_processor or (), stopping_criteria or ()
    _check_kinds(
        seed, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn,
        assistant, tokenizer, grammar, cache,
    )  # fmt: skip
    config = model.config
    settings = _settings_of(
        model, generation_config, generation_overrides, use_model_defaults, assistant is not None
    )
    assisted = assistant is not None or settings.prompt_lookup_num_tokens is not None

    input_ids, attention_mask = read_prompt(config, settings, input_ids, attention_mask)
    constraints = []
    if settings.token_healing:
        needed = _tokenizer_for("token_healing", tokenizer)
        input_ids, attention_mask, healing = heal(
            needed, input_ids, attention_mask, config.vocab_size
        )
        constraints.append(healing)
    if prefix_allowed_tokens_fn is not None:
        copies = max(settings.num_beams, settings.num_return_sequences)
        constraints.append(PrefixAllowed(prefix_allowed_tokens_fn, config.vocab_size, copies))
    if grammar is not None:
        needed = _tokenizer_for("grammar", tokenizer)
        ends, beams = settings.eos_token_ids, settings.num_beams > 1
        constraints.append(grammar.constraint(needed, config.vocab_size, ends, beams))
    guided = settings.guidance_scale not in (None, 1.0)
    negative_given = negative_prompt_ids is not None or negative_prompt_attention_mask is not None
    _check_together(settings, assisted, assistant, constraints, guided, negative_given, cache)
    if negative_prompt_ids is None and negative_given:
        raise ValueError(
            "negative_prompt_attention_mask came without negative_prompt_ids; give both"
        )

    prompt = input_ids.shape[1]
    max_new_tokens = settings.new_tokens(prompt, config.max_position_embeddings)
    if prompt + max_new_tokens > config.max_position_embeddings:
        warnings.warn(
            f"{prompt} tokens and {max_new_tokens} new ones go beyond the model's "
            f"{config.max_position_embeddings} positions (max_position_embeddings)",
            stacklevel=3,
        )
    rows = Rows(input_ids, attention_mask, len(input_ids))
    if guided:
        negative = None
        if negative_prompt_ids is not None:
            negative = read_prompt(
                config, settings, negative_prompt_ids, negative_prompt_attention_mask,
                "negative_prompt_ids",
            )  # fmt: skip
        rows.ids, rows.mask = with_negative_prompts(input_ids, attention_mask, negative)
    rows.copies = settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences
    columns = _columns(settings, rows.ids.shape[1], max_new_tokens, assisted)

    home = mesh_of(params)
    mesh = mesh or model.mesh
    if mesh is not None and home != mesh and (home is not None or mesh.size > 1):
        place = "one device" if home is None else f"the mesh {dict(home.shape)}"
        raise ValueError(
            f"the parameters are on {place}, not on the mesh {dict(mesh.shape)}; load them with "
            "from_pretrained(..., mesh=mesh), or lay them out with shard_params"
        )
    mesh = home
    split = decodes_split(params)
    if split:
        params = split_layers(params)
    # The folder's settings are in `settings` now; without them the program is the same for all.
    model = model.clone(generation_config=None, mesh=mesh)

    numbers = rows.spread[: len(input_ids) * rows.copies]
    input_ids, attention_mask = input_ids[numbers], attention_mask[numbers]
    chooses = Settings.of(settings, config.vocab_size, prompt, max_new_tokens, logits_processor)
    stop = stop_B = None
    if settings.stop_strings:
        tokens = _tokenizer_for("stop_strings", tokenizer).token_bytes(config.vocab_size)
        stop = StopStrings.of(settings.stop_strings, tokens)
        stop_B = stop.start(input_ids, attention_mask)
    plan = Plan(
        settings=chooses,
        rope=rope_tables(config, columns),
        guidance=jnp.float32(settings.guidance_scale) if guided else None,
        stop=stop,
    )
    before = _cache_before(cache, rows, columns, config)
    if before is not None:
        before = before.split(split, jnp.float32 if split else model.dtype)
    common: dict[str, Any] = dict(
        model=model,
        params=params,
        input_ids=input_ids,
        rows=rows,
        plan=replicate(plan, mesh),
        cached=Cached(
            columns=columns,
            chunk=settings.prefill_chunk_size,
            kind=_cache_kind(settings) | ({"split": True} if split else {}),
            before=before,
        ),
        max_new_tokens=max_new_tokens,
        seed=seed,
        past=Past.of(chooses, input_ids, attention_mask, columns),
        stop_B=stop_B,
        wanted=Wanted(
            scores=settings.output_scores,
            logits=settings.output_logits,
            hidden_states=settings.output_hidden_states,
            attentions=settings.output_attentions,
        ),
        keeps_cache=settings.use_cache,
        constraint=All(constraints) if constraints else None,
        criteria=tuple(stopping_criteria),
        deadline=None if settings.max_time is None else begun + settings.max_time,
    )
    if settings.num_beams > 1:
        search = replicate(Search.of(settings, config.vocab_size, max_new_tokens), mesh)
        returned = settings.num_return_sequences
        return BeamRequest(**common, search=search, num_return_sequences=returned)
    if assisted:
        drafter = read_drafter(settings, assistant, model, columns)
        return AssistedRequest(**common, drafter=drafter)
    return Request(**common)


def _settings_of(
    model: Any,
    passed: GenerationConfig | None,
    overrides: dict[str, Any],
    use_model_defaults: bool,
    assistant: bool,
) -> GenerationConfig:
    """The settings of a call, laid over those passed, the folder's and the model's."""
    settings = GenerationConfig.from_model_config(model.config)
    given = GenerationConfig.from_call(overrides)
    folder = model.generation_config if use_model_defaults else None
    for layer in (folder, passed, given):
        settings = settings if layer is None else layer.over(settings)
    settings.check()
    for name, reason in settings.idle_settings(given.given).items():
        warnings.warn(f"{name}: {reason}", stacklevel=4)
    guesses = ("num_assistant_tokens", "assistant_confidence_threshold")
    if not assistant and (idle := sorted(given.given.intersection(guesses))):
        warnings.warn(f"{', '.join(idle)}: no effect without an assistant", stacklevel=4)
    return settings


def _check_kinds(
    seed, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn,
    assistant, tokenizer, grammar, cache,
) -> None:  # fmt: skip
    """Refuses arguments that are something else, before they fail far from here."""

    def is_pair(value):
        pair = isinstance(value, tuple | list) and len(value) == 2
        return pair and isinstance(value[0], Phi3ForCausalLM)

    def are_functions(value):
        return not callable(value) and all(callable(function) for function in value)

    def has(name):
        return lambda value: callable(getattr(value, name, None))

    def is_seed(value):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        return whole and 0 <= value < 2**63

    def is_cache(value):
        return isinstance(value, KVCache | PromptCache)

    config = lambda value: isinstance(value, GenerationConfig)  # noqa: E731
    table = {
        "seed": (seed, is_seed, "a whole number in [0, 2**63)"),
        "generation_config": (generation_config, config, "a phi3_jax.GenerationConfig"),
        "logits_processor": (logits_processor, are_functions, "a list of functions"),
        "stopping_criteria": (stopping_criteria, are_functions, "a list of functions"),
        "prefix_allowed_tokens_fn": (prefix_allowed_tokens_fn, callable, "a function"),
        "assistant": (assistant, is_pair, "a pair (model, params) of a Phi3ForCausalLM"),
        "tokenizer": (tokenizer, has("token_bytes"), "a phi3_jax.Tokenizer"),
        "grammar": (grammar, has("constraint"), "a phi3_jax.Grammar (from_json_schema, ...)"),
        "cache": (cache, is_cache, "the cache of a result, or a PromptCache (PromptCache.load)"),
    }
    for name, (value, holds, wanted) in table.items():
        if (value is not None or name == "seed") and not holds(value):
            shown = repr(value) if isinstance(value, int | float | str) else type(value).__name__
            raise ValueError(f"{name} is {shown}, must be {wanted}")


def _tokenizer_for(setting: str, tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError(f"{setting} needs the tokenizer: generate(..., tokenizer=tokenizer)")
    return tokenizer


def _check_together(
    settings: GenerationConfig,
    assisted: bool,
    assistant: Assistant | None,
    constraints: Sequence[Constraint],
    guided: bool,
    negative_given: bool,
    cache: Any,
) -> None:
    """Refuses what does not go together."""
    before = cache.cache if isinstance(cache, PromptCache) else cache
    ring = _cache_kind(settings).get("ring") or getattr(before, "ring_capacity", None) is not None
    whole = settings.output_hidden_states or settings.output_attentions
    table = [
        (assisted and settings.num_beams > 1, "assisted generation and num_beams > 1"),
        (assisted and constraints, "assisted generation and what decides token by token on the "
            "host (prefix_allowed_tokens_fn, grammar, token_healing)"),
        (assisted and whole, "assisted generation and output_hidden_states or output_attentions"),
        (assisted and ring, "assisted generation and a sliding-window cache, which cannot be cut"),
        (assistant is not None and settings.prompt_lookup_num_tokens is not None,
            "an assistant and prompt_lookup_num_tokens"),
        (whole and (settings.prefill_chunk_size or cache is not None),
            "outputs of the whole prompt and a prompt in parts (prefill_chunk_size, cache)"),
        (settings.output_attentions and ring,
            "output_attentions and a sliding-window cache, which forgets keys"),
        (negative_given and not guided,
            "negative_prompt_ids and no guidance_scale"),
        (cache is not None and guided, "a cache from before and guidance_scale"),
        (cache is not None and _cache_kind(settings), "a cache from before, which has its kind, "
            "and another cache_implementation"),
    ]  # fmt: skip
    for together, what in table:
        if together:
            raise ValueError(f"{what} do not go together: leave one of them out")


def _cache_kind(settings: GenerationConfig) -> dict[str, bool]:
    """Arguments of KVCache.init."""
    kinds = {"full": {}, "sliding_window": {"ring": True}, "quantized": {"quantized": True}}
    return kinds[settings.cache_kind]


def _columns(settings: GenerationConfig, prompt: int, max_new_tokens: int, assisted: bool) -> int:
    """Room for prompt and continuation, rounded up so that other lengths compile nothing."""
    needed, room = prompt + max_new_tokens, settings.max_cache_len
    if room is not None and needed > room:
        way = f"ask for at most {room - prompt} new tokens" if prompt < room else "shorten it"
        raise ValueError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones need {needed} places, and "
            f"the cache has {room}; {way}, or make a longer cache"
        )
    columns = room or needed
    if assisted:  # the last round may look beyond the end
        guesses = settings.prompt_lookup_num_tokens or settings.num_assistant_tokens
        columns += GUESSES_A_STEP + guesses
    if settings.prefill_chunk_size is not None:  # so does the last chunk, as wide as the others
        columns += bucket(min(settings.prefill_chunk_size, prompt))
    return bucket(columns)


def _cache_before(
    cache: KVCache | PromptCache | None, rows: Rows, columns: int, config: Phi3Config
) -> KVCache | None:
    """A copy of a cache that holds the first columns of these rows, or None.

    Raises:
      ValueError: for a cache of other rows or padding, or one that leaves nothing to compute.
    """
    if cache is None:
        return None
    original, width = config.original_max_position_embeddings, rows.ids.shape[1]
    if isinstance(cache, PromptCache):
        cache.check(config)
        prompts = zip(rows.ids, rows.mask, strict=True)
        kept = min(cache.reusable(ids[mask], original) for ids, mask in prompts)
        # Rows that are padded on the left have the prefix in other columns.
        if not kept or not rows.mask.all():
            return None
        before = cache.cache.truncate(kept).repeated(len(rows.ids))
        return before.resized(columns)
    kept = int(cache.length)
    if kept >= width or len(cache.valid_BS) != len(rows.ids):
        raise ValueError(
            f"the cache holds {kept} columns of {len(cache.valid_BS)} rows and input_ids have "
            f"{width} of {len(rows.ids)}; give the rows that it holds, and at least one token more"
        )
    held_RS, columns_RS = map(on_host, (cache.valid_BS, cache.columns))
    held_RS, columns_RS = np.broadcast_arrays(held_RS & (columns_RS < kept), columns_RS)
    wanted_RS = np.take_along_axis(rows.mask, np.minimum(columns_RS, width - 1), axis=1)
    if not np.array_equal(held_RS, wanted_RS & (columns_RS < kept)):
        raise ValueError(
            "the cache holds other rows than attention_mask says: padding is not where it was; "
            "give the rows padded as they were"
        )
    # What was computed with the short factors is of no use to a row that has become long.
    was_long_R, is_long_R = (
        rows.mask[:, :columns].sum(axis=1) > original for columns in (kept, width)
    )
    if config.is_longrope and (was_long_R != is_long_R).any():
        return None
    # A copy: the steps write into theirs.
    return jax.tree.map(jnp.copy, cache).resized(columns)
