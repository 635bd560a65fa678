"""Prompts kept: how much of one serves another, and files that any mesh restores."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values, hf_weights, on_mesh, params_of, tokens
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import phi3_jax as phi3
from phi3_jax.fingerprint import fingerprint
from phi3_jax.generation import prompt_cache
from phi3_jax.generation.prompt_cache import PromptCache

KINDS = [{}, {"ring": True}, {"quantized": True}, {"ring": True, "quantized": True}]


@functools.cache
def model_and_params(case: str, dtype=jnp.float32, **changes):
    config = phi3.Phi3Config(**{**config_values(case), **changes})
    return phi3.Phi3ForCausalLM(config, dtype=dtype), params_of(config, hf_weights(config, case))


# Less optimised code: half the time to compile, and nothing else changes.
@functools.partial(
    jax.jit, static_argnames="model", compiler_options={"xla_backend_optimization_level": 0}
)
def call(model, params, ids, cache):
    return model.apply({"params": params}, ids, cache=cache)


@functools.partial(jax.jit, static_argnames=("model", "ring", "quantized"))
def empty(model, ring=False, quantized=False):
    return phi3.KVCache.init(model.config, 1, 16, model.dtype, model.mesh, ring, quantized)


def kept(model, params, ids, **kind) -> PromptCache:
    cache = empty(model, **kind)
    cache = call(model, params, ids, cache).cache
    return PromptCache(cache, ids[0], model.config, fingerprint(params))


def described(config: phi3.Phi3Config, number: int, slots: int = 99) -> PromptCache:
    """Of tokens 1, 2, 3, ... without having computed any."""
    cache = phi3.KVCache.init(config, 1, slots, jnp.float32)
    return PromptCache(cache, np.arange(1, number + 1, dtype=np.int32), config, weights=0)


@pytest.mark.parametrize(
    "number, row, common",
    [
        (5, [1, 2, 3, 4, 5, 6, 7], 5),
        (5, [1, 2, 3, 4, 5], 4),  # the last one is run for its logits
        (5, [1, 2, 9, 4, 5, 6], 2),
        (5, [1, 2], 1),
        (5, [9, 2, 3], 0),
        (5, [1], 0),
        (16, range(1, 17), 15),
        (16, range(1, 18), 0),  # kept with the short factors
        (17, range(1, 17), 0),  # and with the long ones
        (17, [*range(1, 9), *range(40, 50)], 8),
    ],
)
def test_how_much_is_reusable(number, row, common):
    config = model_and_params("longrope")[0].config
    assert described(config, number).reusable(list(row), 16) == common


def test_only_longrope_has_a_line():
    config = model_and_params("gqa")[0].config
    assert described(config, 16).reusable(range(1, 31), 16) == 16


@pytest.mark.parametrize("number, row, common", [(9, 12, 9), (9, 9, 8), (9, 8, 0), (5, 4, 3)])
def test_a_ring_serves_where_it_has_lost_nothing(number, row, common):
    """Five slots: what comes behind the kept prompt, or behind all of it but the last token."""
    config = model_and_params("mha_window")[0].config
    assert described(config, number, slots=5).reusable(range(1, row + 1), 16) == common


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_file_goes_on_as_the_cache_itself(kind, tmp_path):
    model, params = model_and_params("mha_window")
    ids = tokens(1, 12)
    prompt = kept(model, params, ids[:, :9], **kind)
    prompt.save(tmp_path / "a.safetensors")
    again = PromptCache.load(tmp_path / "a.safetensors", model)
    assert again.config == prompt.config and again.cache.filled
    np.testing.assert_array_equal(again.tokens, prompt.tokens)
    assert jax.tree.structure(again.cache) == jax.tree.structure(prompt.cache)
    wanted = call(model, params, ids[:, 9:], prompt.cache)
    found = call(model, params, ids[:, 9:], again.cache)
    np.testing.assert_array_equal(found.logits, wanted.logits)
    if not kind:  # in the file are the tokens' slots alone
        assert load_file(tmp_path / "a.safetensors")["k_LBKSH"].shape == (3, 1, 6, 9, 8)


def test_resized_caches_go_on():
    model, params = model_and_params("mha_window")
    ids = tokens(1, 20)
    whole = call(model, params, ids, None).logits
    for kind in ({}, {"ring": True}):
        cache = kept(model, params, ids[:, :9], **kind).cache
        for capacity in (9, 20):
            cache = cache.resized(capacity)
            assert cache.capacity == capacity
        found = call(model, params, ids[:, 9:], cache).logits
        np.testing.assert_allclose(found, whole[:, 9:], rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="holds 9 columns, more than 8"):
            cache.resized(8)


def test_any_mesh_restores_any_file(tmp_path):
    """6 key-value heads: padded to 8 on 4 devices, and not on 3; the file has 6."""
    plain, plain_params = model_and_params("mha_window")
    devices = jax.devices()
    meshes = [
        None,
        phi3.make_mesh(1, 1, 4, devices=devices[:4]),
        phi3.make_mesh(1, 1, 3, devices=devices[:3]),
    ]
    ids = tokens(1, 12)
    kind = {"ring": True, "quantized": True}
    prompt = kept(plain, plain_params, ids[:, :9], **kind)
    wanted = call(plain, plain_params, ids[:, 9:], prompt.cache).logits
    on = [
        (plain, plain_params) if mesh is None else on_mesh(plain, plain_params, mesh)
        for mesh in meshes
    ]
    for number, (model, params) in enumerate(on):
        kept(model, params, ids[:, :9], **kind).save(tmp_path / f"{number}.safetensors")
        shape = load_file(tmp_path / f"{number}.safetensors")["k_LBKSH.values"].shape
        assert shape == (3, 1, 6, 5, 8)
    for number, (model, params) in zip((1, 2, 0), on, strict=True):
        prompt = PromptCache.load(tmp_path / f"{number}.safetensors", plain, model.mesh, params)
        for x in (*prompt.cache.k_LBKSH, *prompt.cache.v_LBKSH):
            assert x.addressable_shards[0].data.shape[2] == (6 if model.mesh is None else 2)
        found = call(model, params, ids[:, 9:], prompt.cache).logits
        # Another order of sums, and now and then another last bit of eight.
        assert np.abs(found - wanted).max() < 0.05 * wanted.std()


def test_bfloat16_and_what_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    model, params = model_and_params("longrope_window", jnp.bfloat16)
    prompt = kept(model, params, tokens(1, 5))
    prompt.save(path)
    again = PromptCache.load(path, model)
    assert again.cache.k_LBKSH.dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.cache.k_LBKSH, prompt.cache.k_LBKSH)

    with pytest.raises(ValueError, match="holds bfloat16, this model computes in float32"):
        PromptCache.load(path, model_and_params("longrope_window")[0])
    for change, words in (
        ({"sliding_window": 6}, "its sliding_window is 7, that of this model 6"),
        ({"num_hidden_layers": 2}, "its num_hidden_layers is 3"),
        ({"original_max_position_embeddings": 15}, "its original_max_position_embeddings is 16"),
        ({"rope_parameters": None}, "its rope_parameters is"),
    ):
        other, _ = model_and_params("longrope_window", jnp.bfloat16, **change)
        with pytest.raises(ValueError, match=f"made by another model: {words}"):
            PromptCache.load(path, other)
    finer_tuned = {**params, "lm_head": {"weight": params["lm_head"]["weight"].at[0, 3].add(1e-3)}}
    with pytest.raises(ValueError, match="made with other weights"):
        PromptCache.load(path, model, params=finer_tuned)
    # What only matters elsewhere does not.
    config = dataclasses.replace(model.config, eos_token_id=5)
    PromptCache.load(path, model.clone(config=config))

    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["model"])["head_dim"] == 8
    newer = tmp_path / "newer"
    save_file(load_file(path), newer, {**metadata, "version": "4"})
    with pytest.raises(ValueError, match="of version 4, this is 3"):
        PromptCache.load(newer, model)
    for name, text in (
        ("model", "[" * 10**5),
        ("model", "[]"),
        ("ring", "yes"),
        ("capacity", ""),
        ("capacity", "9.5"),
        ("weights", "null"),
    ):
        save_file(load_file(path), newer, {**metadata, name: text})
        with pytest.raises(ValueError, match=f"whose {name} cannot be read; make it again"):
            PromptCache.load(newer, model)
    arrays = load_file(path)
    for change in (
        {"tokens": np.zeros(4, np.int32)},
        {"tokens": np.zeros((5, 1), np.int32)},
        {"tokens": np.zeros(5, np.int64)},
        {"v_LBKSH": arrays["v_LBKSH"][:, :, 1:]},
        {"v_LBKSH": arrays["v_LBKSH"].view(np.float16)},
        {"more": np.zeros(5)},
    ):
        save_file({**arrays, **change}, newer, metadata)
        with pytest.raises(ValueError, match="holds other arrays than a prompt cache of [45] tok"):
            PromptCache.load(newer, model)
    save_file({"k_LBKSH": arrays["k_LBKSH"]}, newer, metadata)
    with pytest.raises(ValueError, match="holds other arrays than a prompt cache of 0 tokens"):
        PromptCache.load(newer, model)
    save_file({"k": np.zeros(3)}, tmp_path / "else")
    with pytest.raises(ValueError, match="is not a prompt cache"):
        PromptCache.load(tmp_path / "else", model)
    (tmp_path / "half").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        PromptCache.load(tmp_path / "half", model)
    with pytest.raises(FileNotFoundError, match="nothing"):
        PromptCache.load(tmp_path / "nothing", model)
    for use in (prompt.save, lambda place: PromptCache.load(place, model)):
        with pytest.raises(FileNotFoundError, match="no/file' is in a folder that does not exist"):
            use(tmp_path / "no" / "file")
        with pytest.raises(IsADirectoryError, match=f"{tmp_path.name}' is a directory"):
            use(tmp_path)
    assert "k_LBKSH" not in repr(prompt) and "tokens=" in repr(prompt)


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    model, params = model_and_params("longrope_window", jnp.bfloat16)
    first, second = (kept(model, params, tokens(1, 5, seed=seed)) for seed in (0, 1))
    first.save(path)
    with monkeypatch.context() as patched:

        def fails(arrays, part, metadata):
            part.write_bytes(b"half")
            raise OSError("disk full")

        patched.setattr(prompt_cache, "save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            second.save(path)
    np.testing.assert_array_equal(PromptCache.load(path, model).tokens, first.tokens)
    second.save(path)
    np.testing.assert_array_equal(PromptCache.load(path, model).tokens, second.tokens)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    (tmp_path / "any file").touch()
    assert path.stat().st_mode == (tmp_path / "any file").stat().st_mode
