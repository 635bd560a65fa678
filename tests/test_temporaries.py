"""What compiled programs hold beside arguments and results on a CPU, at 4096 tokens."""

import jax
import jax.numpy as jnp
import pytest

import phi3_jax as phi3
from phi3_jax.generation import driver
from phi3_jax.generation.prepare import prepare
from phi3_jax.sharding import init_params

TOKENS = 4096
CONFIG = phi3.Phi3Config(
    vocab_size=32064,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    pad_token_id=0,
    max_position_embeddings=5000,
)
# Of one row and one layer, float32: 512 MiB of scores, 501 MiB of logits.
SCORES, LOGITS = 4 * CONFIG.num_attention_heads * TOKENS**2, 4 * CONFIG.vocab_size * TOKENS
pytestmark = pytest.mark.usefixtures("optimized")


def temporaries(function, *arguments, **settings) -> int:
    return function.lower(*arguments, **settings).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("split", [True, False])
def test_a_prompt_has_scores_in_pieces_and_logits_of_one_token(monkeypatch, split):
    model = phi3.Phi3ForCausalLM(CONFIG)
    params = init_params(model)
    if not split:
        mesh = phi3.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        model = model.clone(mesh=mesh)
        params = phi3.shard_params(model, params)
    prompt = [[3 + index % 7000 for index in range(TOKENS)]]
    request = prepare(model, params, prompt, max_new_tokens=9, eos_token_id=None)
    found = []
    prefill = driver.prefill

    def measured(*arguments):
        found.append(temporaries(prefill, *arguments))
        return prefill(*arguments)

    monkeypatch.setattr(driver, "prefill", measured)
    request.start()
    assert len(found) == 1 and found[0] < min(SCORES, LOGITS) / 2, found


@pytest.mark.parametrize("remat", ["full", "attention", "none"])
def test_a_training_step_has_scores_and_logits_in_pieces(remat):
    model = phi3.Phi3ForCausalLM(CONFIG, remat=remat)
    params = jax.eval_shape(lambda: init_params(model))
    ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)

    @jax.jit
    def step(params, ids):
        return jax.value_and_grad(
            lambda params: model.apply({"params": params}, ids, labels=ids).loss
        )(params)

    assert temporaries(step, params, ids) < min(SCORES, LOGITS)
