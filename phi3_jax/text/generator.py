"""A model and its tokenizer together: conversations in, text out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from phi3_jax.generation.beam_request import BeamRequest
from phi3_jax.generation.config import SAMPLING_SETTINGS, GenerationConfig
from phi3_jax.generation.driver import Request
from phi3_jax.generation.prepare import prepare
from phi3_jax.generation.prompt_cache import PromptCache
from phi3_jax.generation.request import make_prompt_cache
from phi3_jax.text.tokenizer import StreamDecoder, Tokenizer

Messages = str | Sequence[Mapping[str, str]]

_OWN = "it is the TextGenerator's own; make another one"
_FROM_MESSAGES = "the prompt is made of the messages; use generate for token ids"
_NOT_TAKEN = {
    "streamer": "stream gives the text piece by piece; use generate for a streamer",
    "custom_generate": "use generate",
    "model": _OWN,
    "params": _OWN,
    "tokenizer": _OWN,
    "mesh": _OWN,
    "input_ids": _FROM_MESSAGES,
    "attention_mask": _FROM_MESSAGES,
}
_FIELDS = {field.name for field in dataclasses.fields(GenerationConfig)}


def with_implied_sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with do_sample as a chat means it: naming a temperature or a cut asks for sampling,
    temperature 0 for the most likely tokens, unless do_sample is given.
    """
    settings = dict(settings)
    if settings.get("temperature") == 0:
        del settings["temperature"]
        settings.setdefault("do_sample", False)
    if any(settings.get(name) is not None for name in SAMPLING_SETTINGS):
        settings.setdefault("do_sample", True)
    return settings


class TextGenerator:
    """Answers conversations, with one cache length for all of them, so that nothing compiles anew.

        chat = TextGenerator(model, params, tokenizer)
        chat("What is the capital of France?", max_new_tokens=50)
        for piece in chat.stream(messages, temperature=0.7, seed=1):
            print(piece, end="", flush=True)

    Each call stands alone: a conversation goes on by passing its earlier messages too.

    Args:
      model: from `from_pretrained`.
      params: from `from_pretrained`.
      tokenizer: of the same folder.
      mesh: where to compute; by default where the parameters are.
      cache_length: tokens of prompt and answer together that a conversation may have; by default
        4096, or the model's max_position_embeddings where that is less.

    Raises:
      ValueError: for a tokenizer with ids outside the model's vocabulary; for a cache_length
        below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        cache_length: int | None = None,
    ):
        tokenizer.check_fits(model.config.vocab_size)
        self.model, self.params, self.tokenizer, self.mesh = model, params, tokenizer, mesh
        if cache_length is None:
            cache_length = min(4096, model.config.max_position_embeddings)
        if cache_length < 1:
            raise ValueError(f"cache_length is {cache_length}, must be at least 1")
        self.cache_length = cache_length

    def encode(self, messages: Messages) -> list[int]:
        """The prompt's token ids: the conversation, and the opening of the answer.

        messages: a list of {"role", "content"}, or a string for one message of the user.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def __call__(self, messages: Messages, seed: int = 0, **settings: Any) -> str:
        """The whole answer; arguments and errors as in `stream`."""
        arguments = self._arguments(messages, settings)
        return "".join(self._decode(prepare(self.model, self.params, seed=seed, **arguments)))

    def stream(self, messages: Messages, seed: int = 0, **settings: Any) -> Iterator[str]:
        """The answer, one piece a token ("" where it completes no character), then what is left.

        With beams all pieces come at the end, when it is known which beam is the best.

        Args:
          messages: a list of {"role", "content"}, or a string for one message of the user.
          seed: of sampling.
          **settings: arguments of `generate`, fields of GenerationConfig among them; but no
            input_ids, attention_mask, streamer, custom_generate, mesh, tokenizer, max_cache_len
            and no more than one sequence. Without max_new_tokens or max_length, here, in a
            generation_config passed or in the model's folder, the answer may fill the cache.
            Naming a temperature or a cut of the distribution (top_k, top_p, min_p, ...), here or
            in a generation_config passed, asks for sampling, and temperature 0 for the most
            likely tokens, unless do_sample says otherwise.

        Raises:
          ValueError: for messages that are none, arguments that are not taken, and as `generate`,
            before anything runs.
        """
        arguments = self._arguments(messages, settings)
        # Called here and in __call__, where a warning of prepare's points at their callers.
        return self._decode(prepare(self.model, self.params, seed=seed, **arguments))

    def _arguments(self, messages: Messages, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What `prepare` is called with."""
        for name in settings:
            if name in _NOT_TAKEN:
                raise ValueError(f"TextGenerator takes no {name}; {_NOT_TAKEN[name]}")
        prompt = self.encode(messages)
        settings = with_implied_sampling(settings)
        asked = GenerationConfig.from_call({k: v for k, v in settings.items() if k in _FIELDS})
        if (passed := settings.get("generation_config")) is not None:
            given = {name: getattr(passed, name) for name in passed.given}
            passed = GenerationConfig(**with_implied_sampling(given), extra=passed.extra)
            settings["generation_config"], asked = passed, asked.over(passed)
        if asked.max_cache_len is not None:
            raise ValueError("max_cache_len is fixed: give TextGenerator another cache_length")
        folder = self.model.generation_config
        if folder is not None and settings.get("use_model_defaults", True):
            asked = asked.over(folder)
        if asked.num_return_sequences != 1:
            raise ValueError(
                f"num_return_sequences is {asked.num_return_sequences} and TextGenerator gives "
                "one answer; give num_return_sequences=1, or use generate for several"
            )
        if asked.max_new_tokens is None and asked.max_length is None:
            if len(prompt) >= self.cache_length:
                raise ValueError(
                    f"the conversation has {len(prompt)} tokens and the cache {self.cache_length} "
                    "places, which leaves none for an answer; shorten it, or give a larger "
                    "cache_length"
                )
            settings["max_new_tokens"] = self.cache_length - len(prompt)
        own = {"mesh": self.mesh, "tokenizer": self.tokenizer, "max_cache_len": self.cache_length}
        return {**settings, **own, "input_ids": [prompt]}

    def cache_prompt(self, messages: Messages, **settings: Any) -> PromptCache:
        """What the model computes of a prompt, for `stream(..., cache=...)`, which then leaves out
        as much as its own prompt has in common with this one.

        Args:
          messages: a list of {"role", "content"}, or a string for one message of the user.
          **settings: as `make_prompt_cache` takes them, such as cache_implementation.

        Raises:
          ValueError: for messages that are none, and such as fill the cache.
        """
        settings["max_cache_len"] = self.cache_length
        prompt = [self.encode(messages)]
        return make_prompt_cache(self.model, self.params, prompt, self.mesh, **settings)

    def _decode(self, request: Request) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer, skip_special_tokens=True)
        for token_B in _new_tokens(request):
            yield decoder.put(int(token_B[0]))
        yield decoder.flush()


def _new_tokens(request: Request) -> Iterator[np.ndarray]:
    if not isinstance(request, BeamRequest):
        return request.tokens()
    request.start()
    request.run()
    return iter(request.result().sequences[:, request.input_ids.shape[1] :].T)
