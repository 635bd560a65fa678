"""phi3-doctor: what it says of installations, machines and folders that are not in order."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest
from model_folders import write_hf_folder

from convert.to_orbax import to_orbax
from phi3_jax import doctor

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "phi3_jax" / "tiny_demo"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command and returns exit status and lines."""
    # Which it sets; what was there before comes back.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["phi3-doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            doctor.doctor_command()
        out, err = capsys.readouterr()
        return stop.value.code, [" ".join(line.split()) for line in (out + err).splitlines()]

    return call


@pytest.fixture
def installed(monkeypatch):
    """Changes the versions that are installed; None for what is not."""
    changed = {}
    real = metadata.version

    def version(name):
        found = changed[name] if name in changed else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return changed


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of few files: writes them."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / "machine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(doctor, "ROOT", tmp_path / "machine")

    return write


def starting(lines, *words):
    """The one line that has the words."""
    [line] = [line for line in lines if all(word in line for word in words)]
    return line


def test_a_whole_installation_and_model(run):
    status, lines = run(DEMO)
    assert status == 0 and not [line for line in lines if "BROKEN" in line]
    for name in ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "safetensors", "tokenizers"):
        assert f"ok {name} {metadata.version(name)}" in lines
    assert starting(lines, "fine-tuning").startswith("ok")
    assert starting(lines, "a product was computed").startswith("ok 8 x cpu, in the memory")
    assert "ok Hugging Face safetensors, its weights fit its config: bfloat16" in lines
    assert starting(lines, "a cache of 512 tokens").startswith("ok fits: ")
    assert "ok a tokenizer of 1,021 tokens" in lines


def test_what_is_absent_breaks_nothing(run, installed):
    installed.update({"llguidance": None, "optax": None, "huggingface_hub": None})
    status, lines = run()
    assert status == 0
    assert (
        "missing grammars and JSON schemas, --json-schema: llguidance: "
        "pip install 'phi3-jax[guided]'"
    ) in lines
    assert "missing fine-tuning, phi3-train: optax: pip install 'phi3-jax[train]'" in lines
    assert starting(lines, "pip install huggingface_hub").startswith("missing")
    assert not [line for line in lines if "downloads in" in line]


@pytest.mark.parametrize(
    ("name", "found", "line"),
    [
        ("jinja2", "3.1.2", "BROKEN jinja2 is 3.1.2, must be >=3.1.6: pip install 'jinja2>=3.1.6'"),
        ("rich", None, "BROKEN rich is not installed: pip install 'rich>=13'"),
        ("optax", "0.1.9", "BROKEN fine-tuning, phi3-train: optax is 0.1.9, must be >=0.2.8"),
        ("orbax-checkpoint", "0.13.1", "BROKEN orbax-checkpoint is 0.13.1, must be <0.13"),
    ],
)
def test_what_is_broken_is_status_1(run, installed, name, found, line):
    installed[name] = found
    status, lines = run()
    assert status == 1
    assert [shown for shown in lines if shown.startswith(line)], lines


def test_a_package_that_cannot_be_imported(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    status, lines = run()
    assert status == 1
    line = starting(lines, "BROKEN fine-tuning")
    assert "cannot be imported (ModuleNotFoundError" in line
    assert line.endswith("pip install 'phi3-jax[train]'")


def test_without_an_installation(run, monkeypatch):
    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", unknown)
    monkeypatch.setattr(metadata, "requires", unknown)
    status, lines = run()
    assert status == 1 and starting(lines, "is not installed, only on the path", "pip install .")
    assert starting(lines, "a product was computed")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {
                "dev/nvidia0": "",
                "proc/driver/nvidia/version": "NVRM: Module  580.95.05  Aug",
            },
            ("an NVIDIA GPU, driver 580.95.05", "pip install 'phi3-jax[cuda13]'"),
        ),
        (
            {"dev/nvidia3": "", "proc/driver/nvidia/version": "NVRM: Module  570.86  Jan"},
            ("an NVIDIA GPU, driver 570.86", "pip install 'phi3-jax[cuda12]'"),
        ),
        ({"dev/dxg": ""}, ("an NVIDIA GPU, driver unknown", "pip install 'phi3-jax[cuda12]'")),
        (
            {"dev/vfio/0": "", "sys/bus/pci/devices/0/vendor": "0x1ae0\n"},
            ("a TPU", "pip install 'phi3-jax[tpu]'"),
        ),
    ],
)
def test_an_accelerator_without_its_plugin(run, installed, machine, monkeypatch, files, words):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    installed.update(dict.fromkeys(doctor.PLUGINS.values()))
    machine(files)
    status, lines = run()
    assert status == 0
    assert starting(lines, *words).startswith("missing")
    assert not [line for line in lines if "does not use it" in line]


def test_no_accelerator_is_seen_where_none_is(run, machine):
    machine({"dev/nvidiactl": "", "dev/vfio/0": "", "sys/bus/pci/devices/0/vendor": "0x8086"})
    assert not [line for line in run()[1] if "an NVIDIA GPU" in line or "a TPU" in line]


def test_a_plugin_that_jax_does_not_use(run, installed, machine, monkeypatch):
    machine({"dev/nvidia0": ""})
    installed.update({"jax-cuda12-plugin": "0.9.0", "jax-cuda13-plugin": None, "libtpu": None})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    status, lines = run()
    assert status == 0
    assert starting(lines, "JAX_PLATFORMS=cpu keeps jax from what jax-cuda12-plugin is for")
    monkeypatch.delenv("JAX_PLATFORMS")
    status, lines = run()
    assert status == 1
    line = starting(lines, "jax-cuda12-plugin 0.9.0 is installed and jax does not use it")
    assert line.endswith("pip install --upgrade 'phi3-jax[cuda12]'")


def test_devices_that_do_not_start(run, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda':\nno driver")

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    status, lines = run(DEMO)
    assert status == 1
    line = starting(lines, "jax cannot compute: RuntimeError: Unable to initialize", "no driver")
    assert "JAX_PLATFORMS is 'cuda', unset it" in line
    assert starting(lines, "its weights fit its config")  # the rest is looked at all the same


def test_memory_and_cores_of_a_container(machine):
    machine(
        {
            "proc/meminfo": "MemTotal:  99 kB\nMemAvailable:   9000000 kB\n",
            "sys/fs/cgroup/memory.max": "5000000\n",
            "sys/fs/cgroup/memory.current": "1500000\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        }
    )
    assert doctor.host_memory() == (5_000_000, 3_500_000)
    assert doctor._cores() == 0.5
    machine({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert doctor.host_memory()[1] == 9_000_000 * 1024
    assert doctor._cores() == len(os.sched_getaffinity(0))


def test_caches(run, monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "phi3-jax" / "compilation"
    folder.mkdir(parents=True)
    (folder / "program").write_bytes(bytes(3 * 2**20))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        lines = run()[1]
        assert f"ok compiled programs in {folder}: 3.0 MiB, at most 2.00 GiB" in lines
        assert starting(lines, "downloads in ").startswith("ok")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "new"))
        line = f"ok compiled programs in {tmp_path / 'new'}: 0.0 MiB, no limit"
        assert line in run()[1]
        assert not (tmp_path / "new").exists()  # it only looks
        jax.config.update("jax_enable_compilation_cache", False)
        assert starting(run()[1], "compiled programs are not kept").startswith("note")
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", before)


def test_variables(run, monkeypatch):
    monkeypatch.setenv("JAX_DEBUG_NANS", "false")
    monkeypatch.setenv("JAX_TRACEBACK_FILTERING", "off")
    monkeypatch.setenv("HF_TOKEN", "secret")
    lines = run()[1]
    assert starting(lines, "JAX_DEBUG_NANS=false: true: every result is looked at")
    assert "note JAX_TRACEBACK_FILTERING=off: a setting of jax" in lines
    assert not [line for line in lines if "secret" in line or "PREALLOCATE" in line]


def test_a_converted_folder_without_a_tokenizer(run, tmp_path):
    write_hf_folder(tmp_path / "hf", side_files={})
    to_orbax(str(tmp_path / "hf"), str(tmp_path / "orbax"))
    status, lines = run(tmp_path / "orbax")
    assert status == 0
    assert "ok converted (Orbax), its weights fit its config: bfloat16" in lines
    assert starting(lines, "a tokenizer, without which").startswith("missing")


def test_a_model_that_does_not_fit(run, monkeypatch):
    weights = (DEMO / "model.safetensors").stat().st_size
    monkeypatch.setattr(doctor, "device_memory", lambda device: weights // 8)
    status, lines = run(DEMO)
    assert status == 0
    assert starting(lines, "--quantize int8 or nf4").startswith("note does not fit: ")
    assert starting(lines, "does not fit", "in each of 8 devices")
    monkeypatch.setattr(doctor, "device_memory", lambda device: weights)
    assert starting(run(DEMO)[1], "in each of 8 devices").startswith("ok fits: ")


def test_a_model_that_does_not_load(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    values = json.loads((folder / "config.json").read_text())
    layers = values["num_hidden_layers"] + 1
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": layers}))
    status, lines = run(folder)
    assert status == 1 and starting(lines, "BROKEN", "problems with the weights in")
    assert starting(lines, f"model.layers.{layers - 1}.input_layernorm.weight: missing")
    (folder / "config.json").write_text("{")
    status, lines = run(folder)
    assert status == 1 and starting(lines, "BROKEN", "config.json is not JSON")


@pytest.mark.parametrize(
    ("names", "words", "status"),
    [
        (["adapter_config.json"], "note a LoRA adapter", 0),
        (["config.json", "checkpoints/1"], "note the folder of a training run", 0),
        (["notes.txt"], "BROKEN", 1),
    ],
)
def test_folders_of_other_kinds(run, tmp_path, names, words, status):
    for name in names:
        (tmp_path / "some" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "some" / name).write_text("")
    found, lines = run(tmp_path / "some")
    assert found == status and lines[-1].startswith(words)


def test_a_folder_that_is_not_there(run, tmp_path):
    status, lines = run(tmp_path / "none")
    assert status == 1 and len(lines) == 1
    assert lines[0].startswith(f"error: there is no folder '{tmp_path / 'none'}'; give one")


def test_it_imports_nothing_that_takes_long_or_may_be_broken():
    script = """
import sys, phi3_jax.doctor
heavy = {"jax", "numpy", "flax", "orbax", "tokenizers", "jinja2", "safetensors"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
