"""Every way to generate compiles for eight chips of a TPU."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from reference import config_values, hf_weights, params_of, tokens
from reference import on_mesh as laid_out

import phi3_jax as phi3
from phi3_jax.generation.beam import beam_loop
from phi3_jax.generation.decoding import decode_loop
from phi3_jax.generation.prepare import prepare
from phi3_jax.generation.speculative import assisted_loop
from phi3_jax.sharding import abstract_params

CUTS = dict(top_k=9, top_p=0.9, min_p=0.01, top_h=0.9, typical_p=0.9, epsilon_cutoff=1e-3,
    eta_cutoff=1e-3, temperature=0.7)  # fmt: skip
LISTS = dict(
    repetition_penalty=1.1, encoder_repetition_penalty=1.1, no_repeat_ngram_size=3,
    bad_words_ids=[[5], [6, 7]], sequence_bias={(8, 9): 1.0}, suppress_tokens=[4], min_new_tokens=2,
    exponential_decay_length_penalty=(2, 1.1), forced_eos_token_id=2, remove_invalid_values=True,
)  # fmt: skip
WAYS = {
    "sampling": dict(do_sample=True, **CUTS),
    "processors": LISTS,
    "watermark": dict(watermarking_config=dict(seeding_scheme="selfhash")),
    "guidance": dict(guidance_scale=1.5),
    "ring": dict(cache_implementation="sliding_window"),
    "int8": dict(cache_implementation="quantized"),
    "beams": dict(num_beams=3, guidance_scale=1.5),
    "beam sampling": dict(num_beams=3, do_sample=True),
    "lookup": dict(prompt_lookup_num_tokens=3),
    "lookup, sampling": dict(prompt_lookup_num_tokens=3, do_sample=True),
    "draft": dict(num_assistant_tokens=3, do_sample=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_loop_compiles(tpu_mesh, way):
    """The state is made on a mesh of one CPU device, and only its shapes go to the compiler."""
    case = "longrope_window"
    config = phi3.Phi3Config(**config_values(case))
    alone = phi3.make_mesh(devices=jax.devices("cpu")[:1])
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))
    model, params = laid_out(model, params, alone)
    assistant = {"assistant": (model, params)} if way == "draft" else {}
    asked = dict(max_new_tokens=9, pad_token_id=0, **WAYS[way], **assistant)
    request = prepare(model, params, tokens(2, 7), **asked)
    request.start()

    mesh = tpu_mesh("v5e:2x4", (2, 2, 2))
    whole = NamedSharding(mesh, PartitionSpec())
    there = lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=whole)  # noqa: E731
    on_mesh = lambda tree: jax.tree.map(there, tree)  # noqa: E731
    model = model.clone(mesh=mesh)
    params, plan, limit = abstract_params(model), on_mesh(request.plan), on_mesh(np.int32(9))
    if way == "draft" or "lookup" in way:
        drafter = on_mesh(request.drafter.replace(params=None))
        if way == "draft":
            drafter = drafter.replace(model=model, params=params)
        state = on_mesh(request.assisted.replace(decode=request.state))
        lowered = assisted_loop.lower(model, params, state, plan, drafter, limit, limit)
    elif "beam" in way:
        state = on_mesh(request.state)
        search = on_mesh(request.search)
        lowered = beam_loop.lower(model, params, state, plan, search, limit)
    else:
        state = on_mesh(request.state)
        lowered = decode_loop.lower(model, params, state, plan, limit)
    lowered.compile()
