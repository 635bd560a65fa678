"""A prompt's key-value cache, kept in memory or in a file for the prompts that begin alike."""

import dataclasses
import functools
import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from phi3_jax.cache import KVCache
from phi3_jax.config import Phi3Config
from phi3_jax.fingerprint import fingerprint
from phi3_jax.json_files import parse_json
from phi3_jax.processes import by_all, on_host
from phi3_jax.safetensors_files import save_file
from phi3_jax.sharding import Names, named_sharding

_FORMAT = "phi3_jax prompt cache"
_VERSION = "3"

# What keys and values depend on, beside the weights.
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_parameters",
)


@dataclass(frozen=True)
class PromptCache:
    """What a model computed of one prompt.

    Attributes:
      cache: of one row without padding; its length is the number of tokens.
      tokens: int32 numpy [T], the prompt.
      config: of the model.
      weights: the fingerprint of its parameters.
    """

    cache: KVCache = field(repr=False)
    tokens: np.ndarray
    config: Phi3Config
    weights: int

    def check(self, config: Phi3Config) -> None:
        """Raises ValueError for a model with another config; `load` compares the weights."""
        _check_model("the prompt cache", json.loads(json.dumps(_model(self.config))), config)

    def reusable(self, tokens: Any, original_max: int) -> int:
        """How many leading tokens of a prompt need not be computed again: those that both begin
        with, but not the last one, whose logits are wanted.

        None where one of the two prompts is long and the other short (longrope has other factors
        for it), and where a ring has lost what the next token sees.

        Args:
          tokens: int [any number], the row without padding.
          original_max: tokens beyond which a row is long.
        """
        tokens, kept = np.asarray(tokens), self.tokens
        if self.config.is_longrope and (len(tokens) > original_max) != (len(kept) > original_max):
            return 0
        limit = max(0, min(len(kept), len(tokens) - 1))
        same = kept[:limit] == tokens[:limit]
        common = limit if same.all() else int(same.argmin())
        # The first column that a ring still holds, and the first that the next token sees.
        held, seen = (max(0, end - self.cache.slots) for end in (len(kept), common + 1))
        return common if held <= seen else 0

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, which takes the place of another of that name when it is
        whole. Every process has to call it; the first one writes.

        Heads that were padded for a mesh are cut, so that any mesh can load it.

        Raises:
          FileNotFoundError, IsADirectoryError: as `check_path`, in the first process.
        """
        path = Path(path).expanduser()
        cache = self.cache
        if cache.column_BS is None:
            cache = cache.resized(len(self.tokens))
        cache = cache.mapped(lambda x, names: on_host(x)[self._real(names)])
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": json.dumps(_model(self.config)),
            "capacity": str(self.cache.capacity),
            "ring": json.dumps(self.cache.ring_capacity is not None),
            "quantized": json.dumps(cache.is_quantized),
            "weights": str(self.weights),
        }
        with by_all():
            if jax.process_index() == 0:
                check_path(path)
                arrays = _named(cache) | {"tokens": np.asarray(self.tokens, np.int32)}
                _write(path, jax.tree.map(np.ascontiguousarray, arrays), metadata)

    def _real(self, names: Names) -> tuple[slice, ...]:
        heads = self.config.num_key_value_heads
        return tuple(slice(heads if name == "attention_heads" else None) for name in names)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, mesh: Mesh | None = None, params: Any = None
    ) -> "PromptCache":
        """Reads what `save` wrote, onto a mesh, by default that of the model.

        Args:
          params: those that it will be used with, which are read once to see that it was made with
            them; None where that is known.

        Raises:
          FileNotFoundError, IsADirectoryError: where there is no file.
          ValueError: for a file that is none of `save`, or of a model or weights that differ.
        """
        path = Path(path).expanduser()
        config, mesh = model.config, mesh or model.mesh
        check_path(path)
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
        dtype = arrays.get("k_LBKSH", np.empty(0, model.dtype)).dtype
        _check(path, metadata, config, dtype, model.dtype)
        kinds = {"ring": bool, "quantized": bool, "capacity": int, "weights": int}
        ring, quantized, capacity, weights = (
            _value(path, metadata, name, kind) for name, kind in kinds.items()
        )
        if params is not None and fingerprint(params) != weights:
            raise ValueError(
                f"{str(path)!r} was made with other weights; make it again with these, or use the "
                "model that it belongs to"
            )
        init = functools.partial(KVCache.init, ring=ring, quantized=quantized)
        empty = jax.eval_shape(lambda: init(config, 1, capacity, model.dtype, mesh))
        tokens = arrays.pop("tokens", np.empty(0))
        held = len(tokens) if empty.column_BS is None else empty.slots
        sizes = {"attention_heads": config.num_key_value_heads, "slots": held}

        def stored(x: Any, names: Names) -> jax.ShapeDtypeStruct:
            shape = tuple(map(sizes.get, names, x.shape))
            return jax.ShapeDtypeStruct(shape, x.dtype)

        wanted = {name: (x.shape, x.dtype) for name, x in _named(empty.mapped(stored)).items()}
        found = {name: (x.shape, x.dtype) for name, x in arrays.items()}
        if found != wanted or tokens.shape != (len(tokens),) or tokens.dtype != np.int32:
            raise ValueError(
                f"{str(path)!r} holds other arrays than a prompt cache of {len(tokens)} tokens; "
                "make it again"
            )

        def fill(keys, leaf):
            if not leaf.shape:
                return np.asarray(len(tokens), leaf.dtype)
            array = arrays[_name(keys)]
            padding = [(0, b - a) for a, b in zip(array.shape, leaf.shape, strict=True)]
            return np.pad(array, padding)

        cache = jax.tree_util.tree_map_with_path(fill, empty)
        cache = dataclasses.replace(cache, filled=True)
        return cls(_placed(cache, mesh), tokens, config, weights)


def check_path(path: Path) -> None:
    """Refuses a path that no file can have.

    Raises:
      FileNotFoundError: where its folder is missing.
      IsADirectoryError: for a directory.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is in a folder that does not exist; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory, must be the name of a file")


def _model(config: Phi3Config) -> dict[str, Any]:
    values = {"head_dim": config.head_dim, **config.to_dict()}
    return {name: values[name] for name in _FIELDS}


def _check(path: Path, metadata: dict[str, str], config: Phi3Config, dtype, wanted_dtype) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} is not a prompt cache; PromptCache.save writes one")
    if (version := metadata.get("version")) != _VERSION:
        raise ValueError(
            f"{str(path)!r} is a prompt cache of version {version}, this is {_VERSION}; make it "
            "again"
        )
    _check_model(repr(str(path)), _value(path, metadata, "model", dict), config)
    if dtype != np.dtype(wanted_dtype):
        raise ValueError(
            f"{str(path)!r} holds {dtype}, this model computes in {np.dtype(wanted_dtype)}; load "
            "the model in that dtype, or make the cache again"
        )


def _value(path: Path, metadata: dict[str, str], name: str, kind: type) -> Any:
    try:
        value = parse_json(metadata.get(name, ""))
    except ValueError:
        value = None
    if type(value) is not kind:
        raise ValueError(
            f"{str(path)!r} is a prompt cache whose {name} cannot be read; make it again"
        )
    return value


def _check_model(what: str, theirs: dict[str, Any], config: Phi3Config) -> None:
    ours = json.loads(json.dumps(_model(config)))
    for name in _FIELDS:
        if theirs.get(name) != ours[name]:
            raise ValueError(
                f"{what} was made by another model: its {name} is {theirs.get(name)}, that of this "
                f"model {ours[name]}; make it again with this one"
            )


def _name(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _named(cache: KVCache) -> dict[str, Any]:
    """The arrays that have slots, by their names in the cache."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(cache)
    return {_name(keys): leaf for keys, leaf in leaves if leaf.shape}


def _write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        save_file(arrays, part, metadata)
        # A rename that gets to the disk first would show a half file.
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _placed(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """A cache of numpy arrays on the devices, each with its share only."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, cache)

    def place(x: Any, names: Names = ()) -> jax.Array:
        sharding = named_sharding(names, x.shape, mesh)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return dataclasses.replace(cache.mapped(place), length=place(cache.length))
