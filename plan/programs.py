"""The programs that are planned, as training and generation run them, from a model's sizes alone.

A job knows how to lower itself for devices that need not be here, and what it is worth: the bytes
of its arguments, its tokens, and the operations that the model asks for.
"""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import phi3_jax as phi3
from phi3_jax.cache import KVCache
from phi3_jax.generation.decoding import (
    NOTHING,
    Plan,
    bucket,
    decode_step,
    empty_cache,
    first_state,
    prefill,
)
from phi3_jax.generation.settings import Past, Settings
from phi3_jax.json_files import read_json_object
from phi3_jax.quantized import layout_of_part
from phi3_jax.rope import rope_tables
from phi3_jax.sharding import abstract_params, named_sharding
from plan.flops import attention_flops, causal_pairs, forward_flops, head_rows
from train.config import MeshConfig, TrainConfig
from train.metrics import flops_per_token
from train.quantize import quantize_params
from train.state import Setup
from train.step import abstract_batch, lower_step

# As in generate's cache_implementation, and what each is to KVCache.init.
CacheKind = Literal["full", "sliding_window", "quantized"]
_CACHE_ARGUMENTS = {
    "full": (),
    "sliding_window": (("ring", True),),
    "quantized": (("quantized", True),),
}


@dataclass(frozen=True)
class Program:
    """A lowered program, and what is known of one run of it without a compiler.

    Attributes:
      lowered: what `compile()` is called on.
      mesh: sizes of its axes, by name.
      arguments: bytes a device of what it is given, by kind ("params", "optimizer", "cache",
        "batch": ids, positions and tables), without the padding of the device's layouts.
      tokens: that one run takes or makes, on all devices together.
      model_flops: that the model asks for in one run, on all devices: nothing is counted that is
        computed again, padded or masked.
      attention_flops: of one layer's attention forward on one device, its two products over the
        keys that a query sees.
    """

    lowered: Any
    mesh: dict[str, int]
    arguments: dict[str, int]
    tokens: int
    model_flops: float
    attention_flops: float


@dataclass(frozen=True)
class TrainJob:
    """The optimizer step of a run. `shape`: the model's sizes, in place of the page's folder."""

    name: str
    config: TrainConfig
    shape: phi3.Phi3Config
    kind = "train"

    @property
    def settings(self) -> str:
        """What is planned, in words."""
        config = self.config
        parts = "" if config.accumulate == 1 else f" in {config.accumulate} parts"
        return (
            f"{_rows(config.batch_size)} of {config.data.sequence_length:,} tokens{parts}, "
            f"remat={config.model.remat}, {config.optimizer.name}"
        )

    @property
    def mesh(self) -> MeshConfig:
        """Sizes of the mesh; -1: all devices that are left."""
        return self.config.mesh

    def with_mesh(self, mesh: MeshConfig) -> "TrainJob":
        """The same on another mesh."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, mesh=mesh))

    def lower(self, devices: Sequence[jax.Device]) -> Program:
        """The step for these devices.

        Raises:
          ValueError: for settings that do not go with the model or the devices.
        """
        config, mesh = self.config, make_mesh(self.config.mesh, devices)
        with tempfile.TemporaryDirectory() as folder:
            self.shape.save_pretrained(folder)
            model = dataclasses.replace(config.model, path=folder)
            # Of epochs nobody knows the steps before the data is read; any number will do.
            setup = Setup(dataclasses.replace(config, model=model), mesh, config.steps or 10**6)
        frozen = abstract_frozen(setup)
        state, rows = setup.abstract_state, config.batch_size // config.accumulate
        rope = _everywhere(rope_tables(self.shape, setup.tokens_per_row), mesh)
        tokens = config.batch_size * setup.tokens_per_row
        return Program(
            lowered=lower_step(setup, frozen),
            mesh=dict(mesh.shape),
            arguments={
                "params": bytes_a_device((state.params, frozen)),
                "optimizer": bytes_a_device((state.opt_state, state.ema)),
                "batch": bytes_a_device((abstract_batch(setup), rope)),
            },
            tokens=tokens,
            model_flops=tokens * flops_per_token(self.shape, setup.tokens_per_row, config.lora),
            attention_flops=attention_flops(
                self.shape,
                causal_pairs(self.shape, setup.tokens_per_row),
                head_rows(self.shape, mesh, rows),
            ),
        )


@dataclass(frozen=True)
class DecodeJob:
    """One token of every row, greedily, over a cache that is full. Weights are bfloat16."""

    name: str
    shape: phi3.Phi3Config
    batch: int
    capacity: int
    mesh: MeshConfig
    cache: CacheKind = "full"
    kind = "decode"

    @property
    def settings(self) -> str:
        """What is planned, in words."""
        return f"a token of {_rows(self.batch)}, {_cache_words(self.cache, self.capacity)}"

    def with_mesh(self, mesh: MeshConfig) -> "DecodeJob":
        """The same on another mesh."""
        return dataclasses.replace(self, mesh=mesh)

    def lower(self, devices: Sequence[jax.Device]) -> Program:
        """The decoding step for these devices.

        Raises:
          ValueError: for settings that do not go with the model or the devices.
        """
        _check_positions(self.shape, "--cache", self.capacity)
        shape, mesh = self.shape, make_mesh(self.mesh, devices)
        model = phi3.Phi3ForCausalLM(shape, jnp.bfloat16, jnp.bfloat16, mesh)
        cache = _abstract_cache(model, self.batch, self.capacity, self.cache)
        settings = Settings.of(phi3.GenerationConfig.from_model_config(shape), shape.vocab_size)
        plan: Any = Plan(settings, rope_tables(shape, self.capacity))

        def start(cache: KVCache, plan: Plan) -> Any:
            logits_BV = jnp.zeros((self.batch, shape.vocab_size), jnp.float32)
            row_B, past = jnp.zeros(self.batch, jnp.int32), Past(jnp.zeros((), jnp.int32))
            key, columns = jax.random.key(0), self.capacity
            return first_state(
                logits_BV, cache, row_B > 0, row_B, past, None, plan, key, None, columns, mesh,
                NOTHING,
            )[0]  # fmt: skip

        params, plan = abstract_params(model), _everywhere(plan, mesh)
        state = _everywhere(jax.eval_shape(start, cache, plan), mesh).replace(cache=cache)
        seen = min(cache.slots, shape.sliding_window or cache.slots)
        return Program(
            lowered=decode_step.lower(model, params, state, plan),
            mesh=dict(mesh.shape),
            arguments={
                "params": bytes_a_device(params),
                "cache": bytes_a_device(cache),
                "batch": bytes_a_device((state.replace(cache=None), plan)),
            },
            tokens=self.batch,
            model_flops=self.batch * forward_flops(shape, 1, seen),
            attention_flops=attention_flops(shape, seen, head_rows(shape, mesh, self.batch)),
        )


@dataclass(frozen=True)
class PrefillJob:
    """Prompts of so many tokens into an empty cache of so many slots. Weights are bfloat16."""

    name: str
    shape: phi3.Phi3Config
    batch: int
    tokens: int
    capacity: int
    mesh: MeshConfig
    cache: CacheKind = "full"
    kind = "prefill"

    @property
    def settings(self) -> str:
        """What is planned, in words."""
        cache = _cache_words(self.cache, self.capacity)
        return f"{_rows(self.batch)} of {self.tokens:,} tokens, {cache}"

    def with_mesh(self, mesh: MeshConfig) -> "PrefillJob":
        """The same on another mesh."""
        return dataclasses.replace(self, mesh=mesh)

    def lower(self, devices: Sequence[jax.Device]) -> Program:
        """The prefill for these devices.

        Raises:
          ValueError: for settings that do not go with the model or the devices.
        """
        _check_positions(self.shape, "--cache", self.capacity)
        if self.capacity < self.tokens:
            raise ValueError(
                f"--cache is {self.capacity}, the prompt has --tokens {self.tokens}; the cache "
                "has to hold it"
            )
        shape, mesh = self.shape, make_mesh(self.mesh, devices)
        model = phi3.Phi3ForCausalLM(shape, jnp.bfloat16, jnp.bfloat16, mesh)
        cache = _abstract_cache(model, self.batch, self.capacity, self.cache)
        width = min(bucket(self.tokens), self.capacity)
        rope: Any = rope_tables(shape, self.capacity)
        if shape.is_longrope:
            rope = rope._replace(long_B=jnp.zeros(self.batch, bool))
        new = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
        rows = (
            new(jnp.int32, self.batch, width),
            new(jnp.bool_, self.batch, width),
            new(jnp.int32, self.batch, width),
            new(jnp.bool_, self.batch),
            new(jnp.int32),
        )
        params, rows, rope = abstract_params(model), *_everywhere((rows, rope), mesh)
        return Program(
            lowered=prefill.lower(model, params, *rows, cache, rope),
            mesh=dict(mesh.shape),
            arguments={
                "params": bytes_a_device(params),
                "cache": bytes_a_device(cache),
                "batch": bytes_a_device((rows, rope)),
            },
            tokens=self.batch * self.tokens,
            model_flops=self.batch
            * forward_flops(shape, self.tokens, causal_pairs(shape, self.tokens)),
            attention_flops=attention_flops(
                shape, causal_pairs(shape, width), head_rows(shape, mesh, self.batch)
            ),
        )


Job = TrainJob | DecodeJob | PrefillJob


def model_config(name: str) -> phi3.Phi3Config:
    """The sizes of a model, without asking the hub.

    Args:
      name: of a preset, or of the model on the hub that a preset is named after; a model folder;
        or a config.json.

    Raises:
      ValueError: where there are none of that name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return phi3.Phi3Config.from_pretrained(path)
    if path.is_file():
        try:
            return phi3.Phi3Config.from_dict(read_json_object(path))
        except ValueError as error:
            raise ValueError(f"{name!r} is no config of a Phi-3 model: {error}") from None
    try:
        return phi3.Phi3Config.preset(name.rpartition("/")[2].lower())
    except ValueError as error:
        raise ValueError(
            f"{error}; {name!r} is no folder or file either, and nothing is downloaded here"
        ) from None


def parse_mesh(text: str) -> MeshConfig:
    """A mesh as it is typed: "fsdp=4,tensor=2"; what is not named is 1.

    Raises:
      ValueError: for other names and sizes.
    """
    sizes: dict[str, int] = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in sizes or not size.removeprefix("-").isdecimal():
            raise ValueError(
                f"mesh {text!r}: {part.strip()!r} is not one of data, fsdp, sequence and tensor "
                "with a size; write for example fsdp=4,tensor=2"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def make_mesh(sizes: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of these sizes.

    Raises:
      ValueError: as `phi3_jax.make_mesh`.
    """
    return phi3.make_mesh(
        sizes.data, sizes.fsdp, sizes.tensor, devices=devices, sequence=sizes.sequence
    )


def bytes_a_device(tree: Any) -> int:
    """Bytes of abstract arrays on the first device of their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )


def _bits(dtype: Any) -> int:
    packed = jnp.issubdtype(dtype, jnp.integer) and dtype != jnp.bool_
    return jnp.iinfo(dtype).bits if packed else 8 * dtype.itemsize


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays, whole on every device, as `generate` places what is small."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)


def _abstract_cache(model: Any, batch: int, capacity: int, kind: CacheKind) -> KVCache:
    mesh = model.mesh
    cache = jax.eval_shape(lambda: empty_cache(model, batch, capacity, _CACHE_ARGUMENTS[kind]))
    place = lambda x, names: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=named_sharding(names, x.shape, mesh)
    )
    return cache.mapped(place).replace(length=_everywhere(cache.length, mesh))


def abstract_frozen(setup: Setup) -> Any:
    """The leaves that are not trained, as the step gets them: laid out as their weights also where
    they are quantised, but for scales that are too few to be cut.
    """
    lora = setup.config.lora
    if lora is None or lora.quantize is None:
        return setup.frozen
    kind, model = lora.quantize, setup.model
    leaves = jax.eval_shape(lambda own: quantize_params(own, kind, model), setup.frozen)
    weights, placed = flatten_dict(setup.frozen), {}
    for path, leaf in flatten_dict(leaves).items():
        own = weights[path].sharding
        placed[path] = jax.tree.map(
            lambda x, own=own: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=layout_of_part(own, x.shape)
            ),
            leaf,
        )
    return unflatten_dict(placed)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _cache_words(kind: CacheKind, capacity: int) -> str:
    words = {"full": "cache", "sliding_window": "sliding-window cache", "quantized": "int8 cache"}
    return f"{words[kind]} of {capacity:,}"


def _check_positions(shape: phi3.Phi3Config, name: str, tokens: int) -> None:
    if tokens > shape.max_position_embeddings:
        raise ValueError(
            f"{name} is {tokens}, must be at most the model's {shape.max_position_embeddings} "
            "positions (max_position_embeddings)"
        )
