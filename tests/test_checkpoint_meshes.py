"""Saved on any mesh, restored on any other, with little on the host."""

import json
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from model_folders import assert_same, params_in, write_hf_folder

from convert.to_orbax import to_orbax
from convert.verify import verify
from phi3_jax import checkpoint, orbax_format
from phi3_jax.checkpoint import from_pretrained, save_checkpoint, save_pretrained
from phi3_jax.sharding import abstract_params, make_mesh

ROOT = Path(__file__).parent.parent
SAVES = {"hf": save_pretrained, "orbax": save_checkpoint}
# With three key-value groups and 97 words, four tensor shards are padded, and not at the edges of
# the stored chunks.
MODELS = {
    "divisible": ("mha_window", dict(num_key_value_heads=2, num_attention_heads=4, vocab_size=96)),
    "padded": ("gqa", dict(num_key_value_heads=3, intermediate_size=78)),
    "tied": ("longrope_partial_tied", {}),
}


@pytest.fixture(scope="module", params=MODELS)
def source(request, tmp_path_factory):
    """An HF folder."""
    case, changes = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "source"
    write_hf_folder(folder, case, **changes)
    return folder


@pytest.mark.parametrize("kind", SAVES)
def test_saved_on_one_mesh_restored_on_others(source, tmp_path, kind):
    model, params = from_pretrained(source, dtype=None, mesh=make_mesh(1, 2, 4))
    SAVES[kind](tmp_path / "saved", model, params)
    assert verify(source, tmp_path / "saved").differences == []
    for sizes in ((2, 2, 2), (8, 1, 1), (1, 1, 8), None):
        mesh = sizes and make_mesh(*sizes)
        again, restored = from_pretrained(tmp_path / "saved", dtype=None, mesh=mesh)
        assert_same(restored, params_in(source))
        laid_out = lambda leaf: (leaf.shape, leaf.sharding)  # noqa: E731
        assert jax.tree.map(laid_out, restored) == jax.tree.map(laid_out, abstract_params(again))
    assert again.generation_config == model.generation_config
    assert again.config.extra["unknown_key"] == (1, 2)


@pytest.mark.parametrize("kind", SAVES)
def test_plain_arrays_can_be_saved(source, tmp_path, kind):
    model, params = from_pretrained(source, dtype=None)
    SAVES[kind](tmp_path / "saved", model, jax.tree.map(np.asarray, params))
    assert verify(source, tmp_path / "saved").differences == []


# --- What is on the host ---------------------------------------------------------------------


class HostBytes:
    """Counts the bytes of host arrays that are alive, and the most at once."""

    def __init__(self):
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def add(self, array: np.ndarray) -> np.ndarray:
        if id(array) not in self._seen:
            self._seen[id(array)] = array.nbytes
            weakref.finalize(array, self._gone, id(array))
            self.now += array.nbytes
            self.peak = max(self.peak, self.now)
        return array

    def _gone(self, name: int) -> None:
        self.now -= self._seen.pop(name)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of many layers in both formats, and the bytes of its largest stacked leaf."""
    parent = tmp_path_factory.mktemp("deep")
    write_hf_folder(parent / "hf", num_hidden_layers=24)
    to_orbax(parent / "hf", parent / "orbax")
    return parent, max(leaf.nbytes for leaf in params_in(parent / "hf").values())


@pytest.mark.parametrize("kind", ["hf", "orbax"])
@pytest.mark.parametrize("sizes", [(1, 2, 4), (8, 1, 1)])
def test_no_stacked_leaf_is_whole_on_the_host_while_restoring(deep, monkeypatch, kind, sizes):
    count = HostBytes()
    weights_class = checkpoint.HFWeights if kind == "hf" else orbax_format.OrbaxWeights
    read, make = weights_class.read, jax.make_array_from_callback
    monkeypatch.setattr(weights_class, "read", lambda *arguments: count.add(read(*arguments)))
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, place, part, dtype: make(
            shape, place, lambda index: count.add(part(index)), dtype=dtype
        ),
    )
    parent, largest = deep
    from_pretrained(parent / kind, dtype=None, mesh=make_mesh(*sizes))
    assert 0 < count.peak < largest / 2


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("sizes", [None, (1, 2, 4)])
def test_no_stacked_leaf_is_whole_on_the_host_while_saving(
    deep, tmp_path, monkeypatch, kind, sizes
):
    parent, largest = deep
    model, params = from_pretrained(parent / "hf", dtype=None, mesh=sizes and make_mesh(*sizes))
    fetched = []

    class Spied:
        """NumPy, and what it is given to fetch from the devices."""

        def __getattr__(self, name):
            return getattr(np, name)

        def asarray(self, array, *more):
            if isinstance(array, jax.Array):
                fetched.append(array.nbytes)
            return np.asarray(array, *more)

    monkeypatch.setattr(checkpoint, "np", Spied())
    SAVES[kind](tmp_path / "saved", model, params)
    assert max(fetched) < largest / 10
    # And each part once, whichever devices hold it.
    assert sum(fetched) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


# --- Failing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAVES)
def test_a_failure_leaves_what_was_there(source, tmp_path, monkeypatch, kind):
    model, params = from_pretrained(source, dtype=None)
    target = tmp_path / "saved"
    SAVES[kind](target, model, params)
    with pytest.raises(FileExistsError, match="exists; replace it with force"):
        SAVES[kind](target, model, params)
    writer = checkpoint.SafetensorsWriter if kind == "hf" else orbax_format.OrbaxWriter
    write, calls = writer.write, iter(range(100))

    def fails(self, *arguments):
        if next(calls) == 7:
            raise OSError("no space left")
        return write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", fails)
        with pytest.raises(OSError, match="no space left"):
            SAVES[kind](target, model, params, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert verify(source, target).differences == []
    zeros = jax.tree.map(lambda leaf: leaf * 0, params)
    SAVES[kind](target, model, zeros, force=True)
    _, restored = from_pretrained(target)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(restored))


# --- Two processes ---------------------------------------------------------------------------

WORKER = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, process, source, target = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(process))
import phi3_jax as phi3
from phi3_jax import checkpoint, orbax_format
from phi3_jax.checkpoint import save_checkpoint
from phi3_jax.processes import by_all
assert jax.device_count() == 8 and jax.local_device_count() == 4
load = lambda folder, *sizes: phi3.from_pretrained(folder, dtype=None, mesh=phi3.make_mesh(*sizes))

# Tensor shards of a leaf on both processes.
model, params = load(source, 1, 1, 8)
assert not params["model"]["layers"]["mlp"]["down_proj"]["weight"].is_fully_addressable
save_checkpoint(target + "/orbax", model, params)
phi3.save_pretrained(target + "/hf", model, params)
# Restored on another mesh, and saved from there.
model, params = load(target + "/orbax", 2, 2, 2)
save_checkpoint(target + "/again", model, params)
model, params = load(target + "/hf", 8, 1, 1)
phi3.save_pretrained(target + "/again-hf", model, params)

# An error in one of them is one in both.
for save in (save_checkpoint, phi3.save_pretrained):
    try:
        save(target + "/hf", model, params)
        raise AssertionError("replaced without force")
    except (FileExistsError if process == "0" else RuntimeError) as error:
        assert process == "0" or "process 0 failed" in str(error)
write = orbax_format.OrbaxWriter.write
def fails(self, path, layer, *rest):
    if layer == 1:
        raise OSError("no space left")
    write(self, path, layer, *rest)
if process == "1":
    orbax_format.OrbaxWriter.write = fails
try:
    save_checkpoint(target + "/failed", *load(source, 1, 1, 8))
    raise AssertionError("saved")
except (OSError if process == "1" else RuntimeError) as error:
    assert process == "1" or "process 1 failed" in str(error)
write = checkpoint.SafetensorsWriter.write
def fails(self, name, tensor):
    if "layers.1" in name:
        raise OSError("no space left")
    write(self, name, tensor)
checkpoint.SafetensorsWriter.write = fails
try:
    phi3.save_pretrained(target + "/failed", *load(source, 1, 1, 8))
    raise AssertionError("saved")
except (OSError if process == "0" else RuntimeError):
    pass
print("DONE", flush=True)
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["padded"], indirect=True)
def test_two_processes_save_and_restore_together(source, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    (tmp_path / "target").mkdir()
    places = [str(source), str(tmp_path / "target")]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(process), *places],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for run in runs:
            out, err = run.communicate(timeout=180)
            assert run.returncode == 0 and "DONE" in out, err
    finally:
        for run in runs:
            run.kill()
    saved = sorted((tmp_path / "target").iterdir())
    assert [folder.name for folder in saved] == ["again", "again-hf", "hf", "orbax"]
    for folder in saved:
        assert verify(source, folder).differences == []
        assert_same(from_pretrained(folder, dtype=None)[1], params_in(source))
        assert json.loads((folder / "config.json").read_text())["unknown_key"] == [1, 2]
