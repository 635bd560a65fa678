"""transformers' models with the random weights of reference.py; needs the extra `parity`."""

import functools

import jax
import numpy as np
import torch
import transformers
from reference import HEADS, config_values, hf_weights, params_of

import phi3_jax as phi3
from phi3_jax.hf_format import Head


def head_of(class_name: str, config: phi3.Phi3Config) -> Head:
    """The head that the class of this name has under a config."""
    head = HEADS[class_name]
    return "score" if head == "score_bias" and not config.token_classification_bias else head


def hf_model(values: dict, weights: dict, class_name: str = "Phi3ForCausalLM") -> torch.nn.Module:
    """The reference with these weights, eager attention, float32."""
    config = transformers.Phi3Config(**values, attn_implementation="eager")
    model = getattr(transformers, class_name)(config).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = class_name == "Phi3ForCausalLM" and values.get("tie_word_embeddings")
    assert missing == (["lm_head.weight"] if tied else []) and not unexpected, (missing, unexpected)
    return model


def both(values: dict, class_name: str = "Phi3ForCausalLM", name: str = "") -> tuple:
    """The same random model in transformers and here: theirs, ours, our parameters."""
    config = phi3.Phi3Config(**values)
    head = head_of(class_name, config)
    weights = hf_weights(config, name, head)
    model = getattr(phi3, class_name)(config)
    return hf_model(values, weights, class_name), model, params_of(config, weights, head)


@functools.cache
def case(name: str, class_name: str = "Phi3ForCausalLM", **changes) -> tuple:
    """`both` for one of reference.CASES, with changes to its config."""
    return both({**config_values(name), **changes}, class_name, name)


@functools.cache
def _compiled(model, static: tuple):
    return jax.jit(
        lambda params, ids, arrays: model.apply({"params": params}, ids, **arrays, **dict(static))
    )


def apply(model, params, ids=None, **inputs):
    """Our output, compiled; what is no array is part of the program."""
    static = {name: x for name, x in inputs.items() if isinstance(x, bool | int | None)}
    arrays = {name: value for name, value in inputs.items() if name not in static}
    return _compiled(model, tuple(static.items()))(params, ids, arrays)


def run(reference: torch.nn.Module, ids=None, **inputs):
    """The reference's output without a cache; numpy arrays come in."""
    inputs = {"input_ids": ids, "use_cache": False, **inputs}
    with torch.no_grad():
        return reference(**{name: as_torch(value) for name, value in inputs.items()})


def as_torch(value):
    """An array as a tensor, with the ids and labels in the int64 that torch asks for."""
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(value.copy())
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def relative(ours, theirs) -> float:
    """The largest difference, as a part of the largest number."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach().float().numpy()
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def assert_same(ours, theirs, real=...) -> None:
    """Equal to 1e-4 of the largest number, where `real` says so."""
    assert relative(np.asarray(ours)[real], theirs.numpy()[real]) < 1e-4
