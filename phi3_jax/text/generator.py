"""A model and its tokenizer together: conversations in, text out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from phi3_jax.generation.decoding import stream
from phi3_jax.text.tokenizer import StreamDecoder, Tokenizer

Messages = str | Sequence[Mapping[str, str]]


class TextGenerator:
    """Answers conversations, with one cache length for all of them, so that nothing compiles anew.

        chat = TextGenerator(model, params, tokenizer)
        chat("What is the capital of France?", max_new_tokens=50)
        for piece in chat.stream(messages, temperature=0.7, do_sample=True):
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
        self.cache_length = cache_length or min(4096, model.config.max_position_embeddings)

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
            the model's folder, the answer may fill the cache.

        Raises:
          ValueError: for messages that are none, and as `generate`, before anything runs.
        """
        prompt = self.encode(messages)
        given = self.model.generation_config
        lengths = {"max_new_tokens", "max_length"}
        if not lengths & settings.keys() and not (given and lengths & given.given):
            settings["max_new_tokens"] = max(1, self.cache_length - len(prompt))
        settings["max_cache_len"] = self.cache_length
        tokens = stream(self.model, self.params, [prompt], seed=seed, mesh=self.mesh, **settings)
        return self._decode(tokens)

    def _decode(self, tokens) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer, skip_special_tokens=True)
        for token_B in tokens:
            yield decoder.put(int(token_B[0]))
        yield decoder.flush()
