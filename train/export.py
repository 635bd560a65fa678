"""What a run hands over: a Hugging Face folder, whole or as an adapter."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import phi3_jax as phi3
from phi3_jax.checkpoint import open_weights
from phi3_jax.fingerprint import fingerprint
from phi3_jax.folder import (
    check_apart,
    check_replaceable,
    copy_side_files,
    find_folder,
    staged_folder,
)
from phi3_jax.json_files import read_json_object
from phi3_jax.safetensors_files import DTYPES
from phi3_jax.sharding import shard_params
from train.checkpoints import Checkpoints
from train.config import TrainConfig, from_dict
from train.lora import merge
from train.peft_format import save_adapter
from train.run_folder import CHECKPOINTS, CONFIG_FILE
from train.state import Setup, Tree, model_folder


def run_config(run: str | Path) -> TrainConfig:
    """The config of a run's folder.

    Raises:
      FileNotFoundError: where it is none.
      ValueError: where its config cannot be read.
    """
    path = Path(run).expanduser() / CONFIG_FILE
    if not path.is_file() or not (path.parent / CHECKPOINTS).is_dir():
        raise FileNotFoundError(
            f"{str(run)!r} is not the folder of a run, which must have {CONFIG_FILE} and "
            f"{CHECKPOINTS}/"
        )
    try:
        return from_dict(read_json_object(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def trained_params(run: str | Path, step: int | None = None) -> tuple[Setup, Tree]:
    """What a run has trained, from a checkpoint of it: the moving average, where it keeps one.

    Args:
      run: its folder.
      step: of the checkpoint; by default the last one.

    Returns:
      The Setup of the run in the memory of this host, and the trained leaves.

    Raises:
      FileNotFoundError: where it has no such checkpoint.
      ValueError: where the model that it started from is another one now.
    """
    config = run_config(run)
    mesh = phi3.make_mesh(devices=[_host()])
    # The length of the run decides learning rates, which nobody asks for here.
    setup = Setup(config, mesh, 10**9)
    checkpoints = Checkpoints(Path(run).expanduser() / CHECKPOINTS)
    try:
        steps = checkpoints.steps
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(
                f"{str(run)!r} has no checkpoint of step {step}; choose one of the steps {steps}"
                if steps
                else f"{str(run)!r} has no checkpoint yet; let the run save one"
            )
        step = steps[-1] if step is None else step
        model = json.loads(json.dumps(setup.model.config.to_dict()))
        values = checkpoints.run_values(step)
        if values["model"] != model:
            raise ValueError(
                f"the config of the model in {str(setup.source)!r} is no longer the one that "
                f"{str(run)!r} began with; put that model back"
            )
        setup.frozen_bits = values["frozen"]
        name = "params" if config.optimizer.ema_decay is None else "ema"
        return setup, checkpoints.load_part(step, name, setup.trainable)
    finally:
        checkpoints.close()


def merged_params(setup: Setup, trained: Tree, dtype: Any = "float32") -> Tree:
    """The parameters of the whole model, adapters merged into the weights they belong to.

    Under QLoRA these are the model's own weights, not the rounded ones it was trained beside.

    Args:
      setup: from `trained_params`.
      trained: from `trained_params`.
      dtype: of the result. The sums are rounded once: where it is that of the model folder, no
        float32 copy of the model is made.

    Raises:
      ValueError: where the weights that were not trained are no longer those of the run.
    """
    kind = jnp.dtype(dtype)
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(kind), tree)  # noqa: E731
    if setup.config.lora is None and not jax.tree.leaves(setup.frozen):
        return cast(trained)
    read_as = kind.name if {kind} == _stored_dtypes(setup) else "float32"
    _, own = phi3.from_pretrained(setup.source, dtype=read_as, mesh=setup.mesh)
    lora = setup.config.lora
    whole = setup.combine(trained, own) if lora is None else merge(own, trained, lora)
    _check_frozen(setup, own)
    return cast(whole)


def _check_frozen(setup: Setup, own: Tree) -> None:
    """Refuses weights beside which nothing was trained, such as those with the adapters in them."""
    leaves = flatten_dict(own)
    frozen = {path: leaves[path] for path in flatten_dict(setup.frozen)}
    bits = fingerprint(unflatten_dict(frozen), setup.config.model.frozen_dtype)
    if setup.frozen_bits not in (None, bits):
        raise ValueError(
            f"the weights in {str(setup.source)!r} are no longer those that the run began with; "
            "put that model back"
        )


def _host() -> jax.Device:
    """The CPU, whose memory is the largest; where JAX has none, the first device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def source_of(path: str | Path, dtype: str, step: int | None = None) -> Path:
    """The model folder behind what `load_for_use` is to load, when it has checked its arguments.

    Raises:
      FileNotFoundError: where there is no such folder.
      ValueError: for another dtype, and for a step of what is no run.
    """
    _check_dtype(dtype)
    if _is_run(path):
        return model_folder(run_config(path).model)
    if step is not None:
        raise ValueError(
            f"{str(path)!r} is not the folder of a run, and has no checkpoint of step {step}; "
            "leave the step out"
        )
    return find_folder(path)


def load_for_use(
    path: str | Path, dtype: str, step: int | None = None
) -> tuple[phi3.Phi3ForCausalLM, Tree, phi3.Tokenizer]:
    """The model, parameters and tokenizer of a run's folder, or of a model folder or hub id.

    Args:
      path: of either.
      dtype: of parameters and activations.
      step: of a run's checkpoint; by default the last one.

    Raises:
      FileNotFoundError, ValueError: as `source_of`, `trained_params` and `from_pretrained`.
    """
    source = source_of(path, dtype, step)
    mesh = phi3.make_mesh() if jax.device_count() > 1 else None
    if _is_run(path):
        setup, trained = trained_params(path, step)
        kind = jnp.dtype(dtype)
        model = setup.model.clone(dtype=kind, param_dtype=kind, remat="none", mesh=mesh)
        params = shard_params(model, merged_params(setup, trained, kind))
    else:
        model, params = phi3.from_pretrained(source, dtype=dtype, mesh=mesh)
    return model, params, phi3.Tokenizer.from_pretrained(source)  # ty: ignore


def _is_run(path: str | Path) -> bool:
    return (Path(path).expanduser() / CHECKPOINTS).is_dir()


def _check_dtype(dtype: str) -> None:
    names = [known.name for known in DTYPES.values()]
    if dtype not in names:
        raise ValueError(f"dtype is {dtype!r}, must be one of {', '.join(names)}")


def export(
    run: str | Path,
    target: str | Path,
    adapter: bool = False,
    step: int | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Writes what a run has learnt as a folder that transformers, or with `adapter` PEFT, loads.

    Args:
      run: the run's folder.
      target: the new folder; it appears whole or not at all.
      adapter: the LoRA adapters alone; else the whole model with its tokenizer, adapters merged.
      step: of the checkpoint; by default the last one.
      dtype: of the weights of a whole model; by default that of the model the run started from.
      force: replace a model or adapter folder that is there.

    Raises:
      FileNotFoundError: where there is no such run or checkpoint.
      FileExistsError: where the target exists, without force.
      ValueError: for an adapter of a run that has none, for another dtype, and where the target is
        neither a model nor an adapter, or is the model that the run started from, with force.
    """
    config = run_config(run)
    lora = config.lora
    if adapter and lora is None:
        raise ValueError(
            f"{str(run)!r} trains the model's own weights and has no adapter; export it without "
            "--adapter"
        )
    if dtype is not None:
        _check_dtype(dtype)
    check_replaceable(target, force)
    check_apart(model_folder(config.model), target)
    setup, trained = trained_params(run, step)
    if adapter and lora is not None:
        base = setup.config.model.path or str(setup.source)
        save_adapter(target, setup.model, trained, lora, base, force)
        return
    kind = _stored_dtype(setup) if dtype is None else jnp.dtype(dtype)
    params = merged_params(setup, trained, kind)
    with staged_folder(target, force) as stage, tempfile.TemporaryDirectory(dir=stage) as part:
        copy_side_files(setup.source, stage)
        phi3.save_pretrained(Path(part) / "model", setup.model, params)
        for file in (Path(part) / "model").iterdir():
            shutil.move(file, stage / file.name)


def _stored_dtype(setup: Setup) -> np.dtype[Any]:
    weights = open_weights(setup.source, setup.model.config)
    return weights.leaves[weights.table.embedding].dtype


def _stored_dtypes(setup: Setup) -> set[np.dtype[Any]]:
    weights = open_weights(setup.source, setup.model.config)
    return {leaf.dtype for leaf in weights.leaves.values()}
