"""What the features of generate() cost: decoding with each, beside a bare greedy loop, in one run.

    python benchmarks/generate.py --layers 4 --tokens 64               # a small model, on CPU
    python benchmarks/generate.py --preset phi-3-mini-4k-instruct --dtype bfloat16 --batch 8

The bare loop is the model, argmax and the cache in a lax.while_loop: no ends, no processors,
nothing kept. "plain" is generate() without options, each further line has one. Weights are random.
Rounds take turns, after one that compiles; ratios are medians over the rounds.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import phi3_jax as phi3
from phi3_jax.generation.prepare import prepare
from phi3_jax.sharding import init_params

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampling": {"do_sample": True},
    "sampling, top_p": {"do_sample": True, "top_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7], [8, 9, 10]]},
    "guidance_scale": {"guidance_scale": 1.5},
    "num_beams=4": {"num_beams": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "int8 cache": {"cache_implementation": "quantized"},
    "scores (step by step)": {"output_scores": True},
    "watermark": {"watermarking_config": {"bias": 2.0}},
}


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def bare_loop(model, params, cache, token_B, position_B, rope, tokens) -> Any:
    """Greedy decoding with nothing around it."""

    def step(carry):
        count, token_B, position_B, cache, new_BS = carry
        out = model.apply(
            {"params": params},
            token_B[:, None],
            position_ids=position_B[:, None],
            cache=cache,
            rope=rope,
        )
        token_B = jnp.argmax(out.logits[:, 0].astype(jnp.float32), axis=-1).astype(jnp.int32)
        new_BS = lax.dynamic_update_slice_in_dim(new_BS, token_B[:, None], count, axis=1)
        return count + 1, token_B, position_B + 1, out.cache, new_BS

    new_BS = jnp.zeros((len(token_B), cache.capacity), jnp.int32)
    start = (jnp.int32(0), token_B, position_B, cache, new_BS)
    # The cache too, so that the given one is used in place.
    return lax.while_loop(lambda carry: carry[0] < tokens, step, start)[3:]


def seconds_of(request: Any, bare: bool) -> tuple[float, int]:
    """Seconds of decoding, without the prompt, and the tokens of each row in them."""
    request.start()
    before, state = request.seen.step, request.state
    jax.block_until_ready(state)
    begin = time.perf_counter()
    if bare:
        rest = np.int32(request.max_new_tokens - before)
        jax.block_until_ready(
            bare_loop(
                request.model, request.params, state.cache, state.token_B, state.position_R,
                request.plan.rope, rest,
            )
        )  # fmt: skip
        return time.perf_counter() - begin, int(rest)
    request.run()
    jax.block_until_ready(request.state)
    return time.perf_counter() - begin, request.seen.step - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=None, help="sizes of a published model")
    parser.add_argument("--layers", type=int, default=16, help="of the default model, 1024 wide")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=None, help="the options to time, separated by ';'")
    arguments = parser.parse_args()
    if arguments.preset is None:
        config = phi3.Phi3Config(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=arguments.layers,
            num_attention_heads=16,
        )
    else:
        config = phi3.Phi3Config.preset(arguments.preset)
    model = phi3.Phi3ForCausalLM(config, jnp.dtype(arguments.dtype), jnp.dtype(arguments.dtype))
    params = init_params(model)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 32000, (arguments.batch, arguments.prompt))
    asked = list(OPTIONS) if arguments.only is None else ["plain", *arguments.only.split(";")]
    rates: dict[str, list[float]] = {"bare loop": [], **{name: [] for name in asked}}
    for number in range(arguments.rounds + 1):
        for name, kept in rates.items():
            new: dict[str, Any] = {"max_new_tokens": arguments.tokens, "eos_token_id": None}
            request = prepare(model, params, ids, **new, **OPTIONS.get(name, {}))
            seconds, tokens = seconds_of(request, bare=name == "bare loop")
            if number:
                kept.append(tokens / seconds)
    device = jax.devices()[0].device_kind
    print(f"{device}, {arguments.dtype}, batch {arguments.batch}, {arguments.tokens} new tokens")
    for name, kept in rates.items():
        ratio = statistics.median(a / b for a, b in zip(kept, rates["bare loop"], strict=True))
        print(
            f"{name:24} {statistics.median(kept):8.1f} tokens/s a row {ratio:7.3f} of the bare loop"
        )


if __name__ == "__main__":
    main()
