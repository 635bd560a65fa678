"""The state of a run: what is trained, what is not, and where each leaf lives."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import phi3_jax as phi3
from phi3_jax.fingerprint import fingerprint
from phi3_jax.folder import find_folder
from phi3_jax.quantized import is_quantized
from phi3_jax.sharding import abstract_params
from train.config import ModelConfig, TrainConfig
from train.lora import abstract_adapters, attach, init_adapters
from train.optimizer import frozen_leaves, make_optimizer, make_schedule
from train.peft_format import load_adapter
from train.quantize import quantize_params

Tree = dict[str, Any]

# The model that comes with the package, for runs that name none.
EMBEDDED_MODEL = Path(phi3.__file__).parent / "tiny_demo"


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint holds of the weights.

    Attributes:
      step: int32, how many steps were taken.
      params: the trained leaves, float32: adapters, or the model's own.
      opt_state: of the optax chain.
      ema: the moving average of params, or None.
      rng: uint32 [2], the key data that every step's dropout is derived from.
    """

    step: jax.Array
    params: Tree
    opt_state: Any
    ema: Tree | None
    rng: jax.Array


class Setup:
    """What a run is made of, before any weight is there.

    Attributes:
      model: as it is trained, on its mesh; activations in model.dtype of the config.
      tokens_per_row: T.
      steps: how long the run is.
      schedule, optimizer: from optimizer.py.
      trainable, frozen: abstract trees (ShapeDtypeStruct with sharding) of the model's leaves, or
        under LoRA of the adapters and the model's, as they are before they are quantised.
      kept_layers: of leaves that are trained in some layers only, from `frozen_leaves`.
      everywhere: the sharding of what every device holds whole.
      abstract_state: TrainState of ShapeDtypeStruct with sharding.
      source: the model folder.
      frozen_bits: the number that `load` gives to the leaves that are not trained; None while no
        checkpoint has told it.

    Raises:
      ValueError: for settings that do not go with the model or the mesh.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, steps: int):
        self.config, self.mesh, self.steps = config, mesh, steps
        self.tokens_per_row = config.data.sequence_length
        self.source = model_folder(config.model)
        self.frozen_bits: int | None = None
        self.model = make_model(config, self.source, mesh)
        own = abstract_params(self.model)
        kept_layers: Mapping[Any, np.ndarray] = {}
        if config.lora is not None:
            self.trainable = abstract_adapters(self.model, config.lora)
            self.frozen = _with_dtype(own, config.model.frozen_dtype)
        else:
            whole, kept_layers = frozen_leaves(self.model.config, config.optimizer.freeze)
            self.trainable, frozen = split(own, whole)
            self.frozen = _with_dtype(frozen, config.model.frozen_dtype)
        self._check_padding()
        self.kept_layers = kept_layers
        self.schedule = make_schedule(config.optimizer, steps)
        self.optimizer = make_optimizer(config.optimizer, self.schedule, kept_layers)
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.abstract_state = self._abstract_state()

    def _abstract_state(self) -> TrainState:
        state = jax.eval_shape(self.new_state, self.trainable)
        whole: Any = lambda leaf: _placed(leaf, self.everywhere)  # noqa: E731
        # Muon has two rules, each of which masks the other's leaves.
        is_masked: Any = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
        opt_state = optax.tree.map_params(
            self.optimizer,
            lambda leaf, param: (
                leaf if is_masked(leaf) else _placed(leaf, _sharding_like(leaf, param))
            ),
            state.opt_state,
            self.trainable,
            transform_non_params=whole,
            is_leaf=is_masked,
        )
        return TrainState(
            step=whole(state.step),
            params=self.trainable,
            opt_state=opt_state,
            ema=None if state.ema is None else self.trainable,
            rng=whole(state.rng),
        )

    def _check_padding(self) -> None:
        """Muon and adafactor take means over whole weights, in which padding would count."""
        if self.config.optimizer.name not in ("muon", "adafactor"):
            return
        plain = self.model.clone(mesh=None)
        if self.config.lora is None:
            shapes = flatten_dict(abstract_params(plain))
        else:
            shapes = flatten_dict(abstract_adapters(plain, self.config.lora))
        for path, leaf in flatten_dict(self.trainable).items():
            if leaf.shape != shapes[path].shape:
                raise ValueError(
                    f"optimizer.name={self.config.optimizer.name} cannot be used on this mesh: "
                    f"{'.'.join(path)} of shape {shapes[path].shape} is padded to {leaf.shape}, "
                    "and its update takes means over all of it; choose mesh.tensor and "
                    "mesh.sequence that divide the model's heads, mlp and vocabulary, or adamw"
                )

    def parameters(self) -> tuple[int, int]:
        """How many are trained and how many are not, without the padding of the mesh."""
        plain = self.model.clone(mesh=None)
        own = {path: leaf.size for path, leaf in flatten_dict(abstract_params(plain)).items()}
        if self.config.lora is not None:
            adapters = jax.tree.leaves(abstract_adapters(plain, self.config.lora))
            return sum(leaf.size for leaf in adapters), sum(own.values())
        trained = sum(own[path] for path in flatten_dict(self.trainable))
        return trained, sum(own.values()) - trained

    def new_state(self, params: Tree) -> TrainState:
        """The state before the first step."""
        keeps_average = self.config.optimizer.ema_decay is not None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if keeps_average else None,
            rng=jax.random.key_data(jax.random.key(self.config.seed)),
        )

    def load(self, source: Path, trained: bool) -> tuple[TrainState | None, Tree, int | None]:
        """The state that a run begins with, the leaves that are not trained, and a number.

        Args:
          source: the model folder.
          trained: whether the trained leaves are wanted; without, they come from a checkpoint.

        Returns:
          The state or None; the leaves, under QLoRA quantised; and a number that changes with
          their bits, the same on every mesh, or None where there are none.

        Raises:
          ValueError: where weights are NaN or infinite, with their names.
        """
        config, lora = self.config, self.config.lora
        if not trained and not jax.tree.leaves(self.frozen):
            return None, {}, None
        # Under LoRA all weights are frozen ones, and no float32 copy of them is needed.
        dtype = "float32" if lora is None else config.model.frozen_dtype
        quantizes = lora is not None and lora.quantize is not None
        params = self._load_on_host(source, dtype) if quantizes else None
        if params is None:
            _, params = phi3.from_pretrained(source, dtype=dtype, mesh=self.mesh)
        check_finite(params, str(source))
        quantized = any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
        if quantized and (lora is None or lora.quantize is not None):
            way_out = (
                "train adapters on it (lora.rank=...), or its original weights"
                if lora is None
                else "leave lora.quantize out"
            )
            raise ValueError(f"model.path {str(source)!r} holds quantised weights; {way_out}")
        if lora is not None:
            bits = fingerprint(params)
            if lora.quantize is not None:
                params = quantize_params(params, lora.quantize, self.model)
            return self.start(self._first_adapters() if trained else None), params, bits
        own = flatten_dict(params)
        del params
        frozen: dict[Any, jax.Array] = {}
        for path, leaf in flatten_dict(self.frozen).items():
            frozen[path] = own.pop(path).astype(leaf.dtype)
        bits = fingerprint(unflatten_dict(frozen)) if frozen else None
        return (
            self.start(unflatten_dict(own) if trained else None),
            unflatten_dict(frozen),
            bits,
        )

    def _first_adapters(self) -> Tree:
        """New adapters, or those that the config names."""
        lora: Any = self.config.lora
        if lora.path is None:
            return init_adapters(self.model, lora, self.config.seed)
        saved, adapters = load_adapter(lora.path, self.model)
        wanted = dataclasses.replace(lora, targets=tuple(sorted(lora.targets)))
        found = dataclasses.replace(saved, targets=tuple(sorted(saved.targets)))
        if different := [
            f"{name} is {getattr(found, name)} there and {getattr(wanted, name)} in the config"
            for name in ("rank", "alpha", "targets", "rslora")
            if getattr(found, name) != getattr(wanted, name)
        ]:
            raise ValueError(
                f"lora.path {lora.path!r} is another adapter; set these alike: "
                f"{', '.join(different)}"
            )
        return adapters

    def _load_on_host(self, source: Path, dtype: str) -> Tree | None:
        """The weights in the memory of the host, for those that are too large for a device until
        they are quantised; None where the mesh pads, is of several hosts, or JAX has no CPU.
        """
        plain = abstract_params(self.model.clone(mesh=None))
        padded = abstract_params(self.model)
        same = jax.tree.map(lambda a, b: a.shape == b.shape, plain, padded)
        if jax.process_count() > 1 or not all(jax.tree.leaves(same)):
            return None
        try:
            host = jax.local_devices(backend="cpu")[0]
        except RuntimeError:
            return None
        with jax.default_device(host):
            return phi3.from_pretrained(source, dtype=dtype)[1]

    def start(self, params: Tree | None) -> TrainState | None:
        """The state before the first step, laid out; params are donated. None for None."""
        if params is None:
            return None
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(self.new_state, out_shardings=shardings, donate_argnums=0)(params)

    def combine(self, trainable: Tree, frozen: Tree) -> Tree:
        """The parameters that the model is called with."""
        if self.config.lora is not None:
            return attach(frozen, trainable, self.config.lora)
        return unflatten_dict(flatten_dict(frozen) | flatten_dict(trainable))


def model_folder(config: ModelConfig) -> Path:
    """The folder that a run starts from."""
    return EMBEDDED_MODEL if config.path is None else find_folder(config.path)


def make_model(config: TrainConfig, source: Path, mesh: Mesh | None) -> phi3.Phi3ForCausalLM:
    """The model as a run computes it.

    Raises:
      ValueError: where rows are longer than its positions.
    """
    shape = phi3.Phi3Config.from_pretrained(source)
    if config.data.sequence_length > shape.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length is {config.data.sequence_length}, must be at most the model's "
            f"{shape.max_position_embeddings} positions (max_position_embeddings)"
        )
    return phi3.Phi3ForCausalLM(
        shape,
        dtype=jnp.dtype(config.model.dtype),
        generation_config=phi3.GenerationConfig.from_pretrained(source),
        mesh=mesh,
        attn_implementation=config.model.attention,
        remat=config.model.remat,
        lora_dropout=0.0 if config.lora is None else config.lora.dropout,
    )


def split(params: Tree, frozen: set) -> tuple[Tree, Tree]:
    """The leaves whose paths are not in `frozen`, and those that are."""
    flat = flatten_dict(params)
    trainable = {path: leaf for path, leaf in flat.items() if path not in frozen}
    return unflatten_dict(trainable), unflatten_dict({path: flat[path] for path in frozen})


def check_finite(params: Tree, what: str) -> None:
    """Refuses weights that are NaN or infinite.

    Raises:
      ValueError: with the names of their leaves.
    """
    finite = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree))(params)
    found = jax.tree_util.tree_leaves_with_path(finite)
    if bad := [
        jax.tree_util.keystr(p, simple=True, separator=".") for p, fine in found if not fine
    ]:
        raise ValueError(
            f"weights of {what!r} are NaN or infinite: {', '.join(bad)}; nothing can be learnt "
            "from them: begin with others"
        )


def _with_dtype(tree: Tree, dtype: str) -> Tree:
    of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)  # noqa: E731
    return jax.tree.map(of, tree)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _sharding_like(leaf: Any, param: jax.ShapeDtypeStruct) -> NamedSharding:
    """The sharding of optimizer state that belongs to a parameter: its own, or without the axis
    that a factored statistic has lost.
    """
    sharding: Any = param.sharding
    spec = (*sharding.spec, *(None,) * (len(param.shape) - len(sharding.spec)))
    for lost in (None, *range(len(param.shape))):
        kept = [axis for axis in range(len(param.shape)) if axis != lost]
        if leaf.shape == tuple(param.shape[axis] for axis in kept):
            return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in kept)))
    return NamedSharding(sharding.mesh, PartitionSpec())
