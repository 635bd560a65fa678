"""What the fields of a Phi3Config may be."""

from collections.abc import Mapping
from typing import Any

from phi3_jax.rope_parameters import MAX_FLOAT

# A hundred times the deepest of the family: what is listed of each must not exhaust the memory.
_MOST_LAYERS = 4000

# Sizes, positions and ids are int32 in arrays.
_MAX_INT = 2**31 - 1

# What `hidden_act` may be; layers.py holds the functions under the same names.
ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)

# What a sequence classifier's labels are; None leaves it to the labels that it is given.
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def as_token_ids(value: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """Token ids given as one id, several or None, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def check_fields(config: Any) -> None:
    """Type and range of every field taken alone."""
    positive = (f"at least 1, at most {_MAX_INT}", lambda x: 1 <= x <= _MAX_INT)
    identity = (f"at least 0, at most {_MAX_INT}", lambda x: 0 <= x <= _MAX_INT)
    few = (f"from 1 to {_MOST_LAYERS}", lambda x: 1 <= x <= _MOST_LAYERS)
    rate = ("in [0, 1)", lambda x: 0 <= x < 1)
    above_zero = ("a finite number above 0", lambda x: 0 < x <= MAX_FLOAT)
    table = [
        (int, ("vocab_size", "hidden_size", "intermediate_size"), positive),
        (int, ("num_hidden_layers",), few),
        (int, ("num_attention_heads", "max_position_embeddings"), positive),
        (int, ("original_max_position_embeddings",), positive),
        (int | None, ("num_key_value_heads", "head_dim", "sliding_window"), positive),
        (int | None, ("bos_token_id", "pad_token_id"), identity),
        (float, ("resid_pdrop", "embd_pdrop", "attention_dropout"), rate),
        (float, ("rms_norm_eps",), above_zero),
        (float, ("initializer_range",), ("0 or above", lambda x: 0 <= x <= MAX_FLOAT)),
        (int | float | None, ("classifier_dropout", "hidden_dropout"), rate),
        (bool, ("use_cache", "tie_word_embeddings", "token_classification_bias"), None),
        (
            str | None,
            ("problem_type",),
            (f"one of {', '.join(PROBLEM_TYPES)}", PROBLEM_TYPES.__contains__),
        ),
        (str, ("hidden_act",), (f"one of {', '.join(ACTIVATIONS)}", ACTIVATIONS.__contains__)),
        (Mapping | None, ("rope_parameters", "id2label", "label2id"), None),
        (Mapping, ("extra",), None),
    ]
    for kind, names, limit in table:
        for name in names:
            value = getattr(config, name)
            accepted = kind | int if kind is float else kind
            if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
                words = str(kind) if "|" in str(kind) else getattr(kind, "__name__", "")
                words = words.removeprefix("collections.abc.")
                raise ValueError(f"{name} is {value!r}, expected {words}")
            if limit and value is not None and not limit[1](value):
                raise ValueError(f"{name} is {value!r}, must be {limit[0]}")
    for token in as_token_ids(config.eos_token_id):
        if not isinstance(token, int) or isinstance(token, bool) or not identity[1](token):
            raise ValueError(
                f"eos_token_id is {config.eos_token_id!r}, expected an id, a list of ids or None"
            )
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ValueError(
            f"pad_token_id is {config.pad_token_id}, outside the vocabulary of "
            f"{config.vocab_size} (vocab_size); give an id below it, or None"
        )


def check_heads(config: Any) -> None:
    """That heads divide the width, and each other."""
    width, heads, kv_heads = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    if config.head_dim is None and width % heads:
        raise ValueError(
            f"hidden_size {width} does not divide into num_attention_heads {heads}; "
            f"use {_divisors(width, heads)} heads, or give head_dim"
        )
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} does not divide into num_key_value_heads {kv_heads}; "
            f"use {_divisors(heads, kv_heads)} key-value heads"
        )


def _divisors(number: int, near: int) -> str:
    """The nearest divisors of a number, as far as they are not too far to look for."""
    near = min(near, number)
    below, above = range(near, 0, -1)[:10_000], range(near, number + 1)[:10_000]
    found = [next((d for d in some if number % d == 0), None) for some in (below, above)]
    return " or ".join(sorted({str(d) for d in found if d}, key=int)) or "1"
