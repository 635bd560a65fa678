"""Rope tables and the one rule that says when a row is long."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values

import phi3_jax as phi3
from phi3_jax.rope import (
    apply_rope,
    attention_factor,
    inverse_frequencies,
    rope_cos_sin,
    rope_tables,
    rows_are_long,
)

LONG = phi3.Phi3Config(**config_values("longrope"))  # original 16


def test_a_row_is_long_beyond_original_max():
    """16 tokens are short, 17 are long: > and not >= (trap 10)."""
    for width, long in ((16, False), (17, True)):
        assert rows_are_long(LONG, jnp.arange(width)[None]).tolist() == [[long]]


def test_each_row_decides_for_itself():
    positions = jnp.stack([jnp.arange(20), jnp.arange(20) - 10])
    mask = positions >= 0
    assert rows_are_long(LONG, jnp.maximum(positions, 0), mask).tolist() == [[True], [False]]
    # padding beyond the line does not make a row long
    right = jnp.broadcast_to(jnp.arange(20), (2, 20))
    assert rows_are_long(LONG, right, right < jnp.array([[17], [16]])).tolist() == [[True], [False]]


def test_each_document_of_a_packed_row_decides_for_itself():
    positions = jnp.array([[*range(4), *range(17), *range(5, 16)]])
    documents = jnp.array([[0] * 4 + [1] * 17 + [2] * 11])
    long = rows_are_long(LONG, positions, document_BT=documents)
    assert long.tolist() == [[False] * 4 + [True] * 17 + [False] * 11]


def test_one_position_decides_while_decoding():
    """The rule looks at positions, not at how many tokens a call has (trap 11)."""
    assert rows_are_long(LONG, jnp.array([[15], [16]])).tolist() == [[False], [True]]


def test_attention_factor_is_in_both_tables():
    """cos at position 0 is the factor itself (trap 9)."""
    tables = rope_tables(LONG, 40)
    factor = np.float32(attention_factor(LONG))
    assert factor > 1
    np.testing.assert_array_equal(tables.short_cos_PR[0], np.full(4, factor))
    np.testing.assert_array_equal(tables.long_cos_PR[0], np.full(4, factor))


def test_tables_hold_no_more_than_needed():
    tables = rope_tables(LONG, 40)
    assert tables.short_cos_PR.shape == (16, 4) and tables.long_cos_PR.shape == (40, 4)
    assert rope_tables(LONG, 16).long_cos_PR is None
    plain = rope_tables(phi3.Phi3Config(**config_values("gqa")), 40)
    assert plain.short_cos_PR.shape == (40, 4) and plain.long_cos_PR is None


def test_tables_are_exact_at_position_4095():
    """Close to float64, which angles in bfloat16 would miss by 2 (trap 7)."""
    config = phi3.Phi3Config.preset("phi-3-mini-4k")
    tables = rope_tables(config, 4096)
    exact = 4095 / 10000.0 ** (np.arange(0, 96, 2) / 96)
    assert tables.short_cos_PR.dtype == np.float32
    np.testing.assert_allclose(tables.short_cos_PR[4095], np.cos(exact), rtol=0, atol=2e-4)
    np.testing.assert_allclose(tables.short_sin_PR[4095], np.sin(exact), rtol=0, atol=2e-4)


def test_model_in_bfloat16_uses_float32_tables():
    model = phi3.Phi3ForCausalLM(LONG, dtype="bfloat16", param_dtype="bfloat16")
    params = model.init(jax.random.key(0), jnp.ones((1, 3), jnp.int32))["params"]
    ids = jnp.ones((1, 40), jnp.int32)
    program = jax.make_jaxpr(lambda p: model.apply({"params": p}, ids).logits)(params)
    tables = [c for c in program.consts if getattr(c, "shape", None) in ((16, 4), (40, 4))]
    assert len(tables) == 4 and {str(c.dtype) for c in tables} == {"float32"}


def test_rows_take_their_own_table():
    tables = rope_tables(LONG, 40)
    positions = jnp.array([[3, 5], [3, 20]])
    cos, sin = rope_cos_sin(tables, positions, rows_are_long(LONG, positions))
    np.testing.assert_array_equal(cos[0], tables.short_cos_PR[[3, 5]])
    np.testing.assert_array_equal(sin[1], tables.long_sin_PR[[3, 20]])


def test_a_position_beyond_the_table_is_nan():
    cos, _ = rope_cos_sin(rope_tables(LONG, 40), jnp.array([[40]]), jnp.array([[True]]))
    assert np.isnan(cos).all()


def test_dimensions_beyond_the_rotated_pass_through():
    """Phi-4-mini rotates 96 of 128 (trap 43)."""
    config = phi3.Phi3Config.preset("phi-4-mini")
    pairs = len(inverse_frequencies(config))
    assert pairs == 48
    x = jax.random.normal(jax.random.key(0), (1, 7, 2, 3, 128))
    table = rope_tables(config, 7)
    out = apply_rope(x, table.short_cos_PR[None], table.short_sin_PR[None])
    np.testing.assert_array_equal(out[..., 96:], x[..., 96:])
    assert (out[:, 1:, ..., :96] != x[:, 1:, ..., :96]).mean() > 0.99


def test_halves_are_rotated_not_neighbours():
    """A quarter turn of pair 0 takes dimension 0 to dimension R (trap 3)."""
    x = jnp.zeros((1, 1, 1, 1, 8)).at[..., 0].set(1.0)
    cos, sin = jnp.ones((1, 1, 4)).at[..., 0].set(0.0), jnp.zeros((1, 1, 4)).at[..., 0].set(1.0)
    np.testing.assert_array_equal(apply_rope(x, cos, sin).ravel(), [0, 0, 0, 0, 1, 0, 0, 0])


@pytest.mark.parametrize("long", [False, True])
def test_frequencies_divide_by_factor_and_theta(long):
    config = dataclasses.replace(LONG)
    factors = LONG.rope_parameters["long_factor" if long else "short_factor"]
    expected = 1 / (np.array(factors) * 10000 ** (np.arange(4) / 4))
    np.testing.assert_allclose(inverse_frequencies(config, long), expected, rtol=1e-6)
