"""A model and its tokenizer together: conversations in, text out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from phi3_jax.generation.config import SAMPLING_SETTINGS
from phi3_jax.generation.request import stream
from phi3_jax.text.tokenizer import StreamDecoder, Tokenizer

Messages = str | Sequence[Mapping[str, str]]


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
      model, params: from `from_pretrained`.
      tokenizer: of the same folder.
      mesh: where to compute; by default where the parameters are.
      cache_length: tokens of prompt and answer together that a conversation may have; by default
        4096, or the model's max_position_embeddings where that is less.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        cache_length: int | None = None,
    ):
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
        return "".join(self.stream(messages, seed, **settings))

    def stream(self, messages: Messages, seed: int = 0, **settings: Any) -> Iterator[str]:
        """The answer, one piece a token ("" where it completes no character), then what is left.

        Args:
          messages: a list of {"role", "content"}, or a string for one message of the user.
          seed: of sampling.
          **settings: fields of GenerationConfig. Without max_new_tokens or max_length, here or in
            the model's folder, the answer may fill the cache. Naming temperature, top_k, top_p or
            min_p asks for sampling, and temperature 0 for the most likely tokens, unless do_sample
            says otherwise.

        Raises:
          ValueError: for messages that are none, and as `generate`, before anything runs.
        """
        prompt = self.encode(messages)
        if "max_cache_len" in settings:
            raise ValueError("max_cache_len is fixed: give TextGenerator another cache_length")
        settings = with_implied_sampling(settings)
        given = self.model.generation_config
        lengths = {"max_new_tokens", "max_length"}
        if not lengths & settings.keys() and not (given and lengths & given.given):
            if len(prompt) >= self.cache_length:
                raise ValueError(
                    f"the conversation has {len(prompt)} tokens and the cache {self.cache_length} "
                    "places, which leaves none for an answer; shorten it, or make a longer cache"
                )
            settings["max_new_tokens"] = self.cache_length - len(prompt)
        settings["max_cache_len"] = self.cache_length
        tokens = stream(self.model, self.params, [prompt], seed=seed, mesh=self.mesh, **settings)
        return self._decode(tokens)

    def _decode(self, tokens) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer, skip_special_tokens=True)
        for token_B in tokens:
            yield decoder.put(int(token_B[0]))
        yield decoder.flush()
