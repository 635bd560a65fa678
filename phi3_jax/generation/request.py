"""Generation as callers know it.

`generate` returns when all tokens are there, `stream` gives them one by one; both drive the same
steps (driver.py), so they choose the same tokens.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from phi3_jax.cache import KVCache
from phi3_jax.fingerprint import fingerprint
from phi3_jax.generation.beam_request import BeamRequest
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.driver import Criterion, Request
from phi3_jax.generation.outputs import GenerateResult
from phi3_jax.generation.prepare import Assistant, prepare
from phi3_jax.generation.prompt_cache import PromptCache
from phi3_jax.generation.settings import LogitsProcessor


def generate(
    model: nn.Module,
    params: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    streamer: Any = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[Criterion] = (),
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
    assistant: Assistant | None = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    tokenizer: Any = None,
    *,
    grammar: Any = None,
    cache: KVCache | PromptCache | None = None,
    custom_generate: Callable[[Request], Any] | None = None,
    use_model_defaults: bool = True,
    **generation_overrides: Any,
) -> GenerateResult:
    """Continues prompts, by the strategy that the settings ask for.

    num_beams > 1 searches with beams, do_sample draws, neither takes the likeliest token; an
    `assistant` or prompt_lookup_num_tokens guesses tokens ahead, and guidance_scale draws the
    prompts away from negative ones. The tokens are chosen inside compiled loops. Where Python has
    a part in it (streamer, stopping_criteria, prefix_allowed_tokens_fn, grammar, outputs), the
    same steps are called one by one.

    Args:
      model: a Phi3ForCausalLM.
      params: its parameters.
      input_ids: integers [B, T]; rows shorter than T are padded on the left. None for one row of
        bos_token_id.
      attention_mask: [B, T], 1 for tokens, 0 for padding; by default all are tokens, unless the
        padding id occurs and is no end id (the reference's rule).
      generation_config: settings laid over those of the model's folder.
      seed: of sampling; the same seed gives the same tokens.
      mesh: where to compute; by default where the parameters are.
      streamer: has put(ids) and end(): gets the prompt, then each token; one row and no beams.
      logits_processor: functions f(tokens [B, S], lengths [B], logits [B, V]) -> logits, traced by
        jax into the step. Row b holds tokens[b, :lengths[b]] without padding, -1 behind them.
        Another function object compiles another program.
      stopping_criteria: functions f(sequences, scores) -> bool or bool [B], called on the host with
        the ids so far, padding included, and the scores if they are asked for (else None); in
        assisted generation once a round, as in the reference.
      prefix_allowed_tokens_fn: f(row of input_ids, its tokens without padding) -> ids that may
        follow.
      assistant: (model, params) of a draft model with the same vocabulary, on the same mesh.
      negative_prompt_ids: for guidance_scale, [B or 1, any width]; by default the last token of
        each prompt.
      negative_prompt_attention_mask: of the same shape.
      tokenizer: needed for stop_strings, token_healing and grammar.
      grammar: a phi3_jax.Grammar, what the new tokens of every row have to spell.
      cache: of an earlier result, or a PromptCache, that holds the first columns of input_ids;
        those are not computed again. It stays as it is.
      custom_generate: takes the place of the strategy: gets the checked request (driver.Request:
        start(), step(), run(), result()), and what it returns is returned.
      use_model_defaults: False leaves out the settings of the model's folder.
      **generation_overrides: any field of GenerationConfig, laid over both.

    Raises:
      ValueError: before anything runs, for ids outside the vocabulary, padding on the right, an
        unknown setting, settings that contradict one another, or a request that does not fit
        max_cache_len.
    """
    if streamer is not None and custom_generate is not None:
        raise ValueError(
            "custom_generate chooses the tokens, and only it could put them into a streamer: "
            "leave the streamer out, or let custom_generate hold it"
        )
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(f"streamer is a {type(streamer).__name__}, must have put(ids) and end()")
    if custom_generate is not None and not callable(custom_generate):
        raise ValueError("custom_generate must be a function; no code is loaded from the hub")
    prepared = functools.partial(
        prepare, model, params, input_ids, attention_mask, generation_config, seed, mesh,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        assistant=assistant,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        tokenizer=tokenizer,
        grammar=grammar,
        cache=cache,
        use_model_defaults=use_model_defaults,
        **generation_overrides,
    )  # fmt: skip
    if streamer is not None:
        return _streamed(prepared, streamer)
    request = prepared()
    if custom_generate is not None:
        return custom_generate(request)
    request.start()
    request.run()
    return request.result()


def _streamed(prepared: Callable[[], Request], streamer: Any) -> GenerateResult:
    try:
        request = prepared()
        if len(request.input_ids) > 1 or isinstance(request, BeamRequest):
            raise ValueError(
                "a streamer takes one row, token by token: give one prompt, num_beams=1 and "
                "num_return_sequences=1, or leave the streamer out"
            )
        streamer.put(request.input_ids)
        for token_B in request.tokens():
            streamer.put(token_B)
    except BaseException as error:
        # Who waits for text in another thread is to hear of it.
        if hasattr(streamer, "fail"):
            streamer.fail(error)
        raise
    streamer.end()
    return request.result()


def stream(
    model: nn.Module,
    params: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    **arguments: Any,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, each as soon as it is chosen: int32 [B] a step.

    Arguments and errors as in `generate`, without streamer and custom_generate, and beams are
    refused; a request is checked when `stream` is called.
    """
    request = prepare(
        model, params, input_ids, attention_mask, generation_config, seed, mesh, **arguments
    )
    if isinstance(request, BeamRequest):
        raise ValueError("beams are known when all are there; use generate, or num_beams=1")
    return request.tokens()


def make_prompt_cache(
    model: nn.Module,
    params: Any,
    input_ids: Any,
    mesh: Mesh | None = None,
    **settings: Any,
) -> PromptCache:
    """Computes a prompt once, for all prompts that begin with it: `generate(..., cache=)`. Besides
    all weights are read, for a number by which `PromptCache.load` knows them.

    Args:
      model: as in `generate`.
      params: as in `generate`.
      input_ids: integers [1, T] without padding.
      mesh: as in `generate`.
      **settings: those of GenerationConfig that say how a prompt is computed and kept
        (cache_implementation, prefill_chunk_size).

    Raises:
      ValueError: for more than one row, and as `generate`.
    """
    settings = {"max_new_tokens": 1, "eos_token_id": None, **settings}
    ones = np.ones(np.shape(input_ids), bool)
    request = prepare(
        model, params, input_ids, ones, mesh=mesh, use_model_defaults=False, **settings
    )
    if len(request.input_ids) != 1:
        raise ValueError(
            f"a prompt cache holds one row, input_ids have {len(request.input_ids)}; give the "
            "tokens that the prompts share as one row"
        )
    _, cache, _ = request.run_prompt()
    cache = cache.split(False, model.dtype)
    return PromptCache(cache, request.input_ids[0], model.config, fingerprint(params))
