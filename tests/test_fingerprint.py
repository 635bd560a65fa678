"""The number by which runs and prompt caches know weights."""

import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from reference import config_values, hf_weights, on_mesh, params_of

import phi3_jax as phi3
from phi3_jax.fingerprint import fingerprint

QKV = ("model", "layers", "self_attn", "qkv_proj", "weight")


@pytest.fixture(scope="module")
def model_and_params():
    config = phi3.Phi3Config(**config_values("longrope_partial_tied"))
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, "tied"))


def changed(params, change):
    leaves = flatten_dict(jax.tree.map(np.array, params))
    change(leaves[QKV])
    return unflatten_dict(leaves)


def exchange(matrix, first, second):
    matrix[[first, second]] = matrix[[second, first]]


def of_axis(axis):
    return lambda qkv: exchange(np.moveaxis(qkv, axis, 0), 0, 1)


def one_bit(qkv):
    qkv.view(np.uint32)[1, 0, 1] ^= 1


def sign(qkv):
    qkv[1, 0, 1] *= -1


def signs(qkv):
    """Of two numbers that are one but for it."""
    qkv[0, 0, 0, 0, :2] = -qkv[0, 0, 0, 0, 0], qkv[0, 0, 0, 0, 0]


def test_other_bits_and_other_places_are_another_number(model_and_params):
    _, params = model_and_params
    same_but_sign = changed(params, signs)
    exchanged = changed(same_but_sign, lambda qkv: exchange(qkv[0, 0, 0, 0], 0, 1))
    axes = flatten_dict(params)[QKV].ndim
    others = [changed(params, change) for change in (one_bit, sign, *map(of_axis, range(axes)))]
    numbers = [fingerprint(tree) for tree in (params, same_but_sign, exchanged, *others)]
    assert len(set(numbers)) == len(numbers) == 5 + axes
    assert fingerprint(params, "bfloat16") not in numbers


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 1, 7), (2, 2, 2)])
def test_it_is_the_same_on_every_mesh(model_and_params, sizes):
    model, params = model_and_params
    mesh = phi3.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    _, sharded = on_mesh(model, params, mesh)
    for dtype in (None, "bfloat16"):
        assert fingerprint(sharded, dtype) == fingerprint(params, dtype)
