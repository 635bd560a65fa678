"""`phi3-doctor`: what is installed and works, what is missing for which feature, what would fit."""

import importlib
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from phi3_jax import compilation_cache
from phi3_jax.cli import UserError, run_command

PACKAGE = "phi3-jax"
# The extras that add a feature, and what it is.
FEATURES = {
    "train": "fine-tuning, phi3-train",
    "parquet": "training data in Parquet files",
    "arrayrecord": "training data in ArrayRecord files",
    "tensorboard": "metrics in TensorBoard, tensorboard=true",
    "guided": "grammars and JSON schemas, --json-schema",
    "plan": "phi3-plan",
    "eval": "lm-evaluation-harness",
}
# What each extra of jax installs to compute with.
PLUGINS = {"tpu": "libtpu", "cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin"}
# Where a distribution and what is imported of it differ by more than a dash.
MODULES = {"orbax-checkpoint": "orbax.checkpoint", "tensorboardx": "tensorboardX"}
# Importing it imports torch.
TOO_LARGE_TO_IMPORT = {"lm-eval"}
# CUDA 13 needs a driver of at least this.
CUDA13_DRIVER = 580

VARIABLES = {
    "JAX_PLATFORMS": "jax uses these kinds of devices only",
    "JAX_COMPILATION_CACHE_DIR": "compiled programs are kept there, without a limit",
    "JAX_ENABLE_COMPILATION_CACHE": "whether compiled programs are kept",
    "JAX_DISABLE_JIT": "true: nothing is compiled, and all is slow",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true: programs compile faster and run slower",
    "JAX_DEBUG_NANS": "true: every result is looked at, which is slow",
    "JAX_ENABLE_X64": "true: numbers without a dtype have 64 bits",
    "JAX_DEFAULT_MATMUL_PRECISION": "of matrix products in float32",
    "JAX_COORDINATOR_ADDRESS": "phi3-train waits for the other processes of a run",
    "JAX_NUM_PROCESSES": "phi3-train waits for so many processes",
    "XLA_FLAGS": "options of the compiler",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false: memory of a GPU is taken as it is needed",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "the part of a GPU's memory that jax takes",
    "LIBTPU_INIT_ARGS": "options of the TPU's compiler",
    "CUDA_VISIBLE_DEVICES": "jax sees these GPUs only",
    "XDG_CACHE_HOME": "compiled programs are kept below it",
    "HF_HOME": "downloads are kept below it",
    "HF_HUB_CACHE": "downloads are kept there",
    "HF_HUB_OFFLINE": "1: nothing is downloaded",
}

ROOT = Path("/")  # of the files by which the system tells what the machine has


class Report:
    """Prints findings, and remembers whether something is broken."""

    def __init__(self) -> None:
        self.broken = False

    def section(self, title: str, look: Callable[["Report"], None]) -> None:
        """Prints what a function finds; its own failure is a finding too."""
        print(f"\n{title}")
        try:
            look(self)
        except Exception as error:  # whatever a broken installation raises
            self.bad(_told(error))

    def good(self, text: str) -> None:
        print(f"  ok       {text}")

    def note(self, text: str) -> None:
        print(f"  note     {text}")

    def missing(self, text: str) -> None:
        print(f"  missing  {text}")

    def bad(self, text: str) -> None:
        self.broken = True
        print(f"  BROKEN   {text}")


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="A model folder: what it is, whether it loads, whether it fits."),
    ] = None,
) -> None:
    """Say what is installed, what computes, and what is missing; status 1 if something is broken.

    What is merely absent breaks nothing. No weights are read, and nothing is downloaded.
    """
    if model is not None and not Path(model).expanduser().is_dir():
        raise UserError(f"there is no folder {model!r}; give one that is there, none is downloaded")
    report = Report()
    print(f"Python {platform.python_version()}, {platform.platform()}")
    report.section("packages", look_at_packages)
    report.section("features", look_at_features)
    report.section("environment", look_at_environment)
    report.section("machine", look_at_machine)
    report.section("devices", look_at_devices)
    report.section("caches", look_at_caches)
    if model is not None:
        folder = Path(model).expanduser()
        report.section(f"model {model}", lambda report: look_at_model(report, folder))
    raise typer.Exit(1 if report.broken else 0)


# --- Packages ----------------------------------------------------------------------------------


def look_at_packages(report: Report) -> None:
    """The packages that everything needs."""
    try:
        found = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        report.bad(f"{PACKAGE} is not installed, only on the path: pip install . in its folder")
        return
    report.good(f"{PACKAGE} {found['Version']}")
    wanted = found["Requires-Python"]
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        report.bad(f"Python {platform.python_version()}, must be {wanted}")
    for name, specifier in sorted([*requirements(None), ("jaxlib", "")]):
        wrong = trouble(name, specifier)
        if wrong is None:
            report.good(f"{name} {version(name)}")
        else:
            report.bad(f"{wrong}: pip install '{name}{specifier}'")


def look_at_features(report: Report) -> None:
    """The packages that one feature needs."""
    for extra, words in FEATURES.items():
        names = list(requirements(extra))
        absent = [name for name, _ in names if version(name) is None]
        wrong = [trouble(*one) for one in names if one[0] not in absent]
        command = f"pip install '{PACKAGE}[{extra}]'"
        if bad := [text for text in wrong if text is not None]:
            report.bad(f"{words}: {'; '.join(bad)}: {command}")
        if absent:
            report.missing(f"{words}: {', '.join(absent)}: {command}")
        elif not bad:
            report.good(f"{words}: {', '.join(f'{name} {version(name)}' for name, _ in names)}")
    if version("huggingface_hub") is None:
        report.missing(
            "models by their ids on the hub: huggingface_hub: pip install huggingface_hub"
        )
    else:
        report.good(f"models by their ids on the hub: huggingface_hub {version('huggingface_hub')}")


def requirements(extra: str | None) -> Iterator[tuple[str, str]]:
    """(distribution, versions) that the package asks for, always or for an extra."""
    for text in metadata.requires(PACKAGE) or ():
        found = Requirement(text)
        of = re.search(r"extra == ['\"](\w+)['\"]", str(found.marker))
        if (of[1] if of else None) == extra:
            plugin = next((PLUGINS[name] for name in found.extras if name in PLUGINS), None)
            yield plugin or found.name, str(found.specifier)


def version(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def trouble(name: str, specifier: str) -> str | None:
    """What is wrong with a required distribution: absent, of another version, or not importable."""
    found = version(name)
    if found is None:
        return f"{name} is not installed"
    if not SpecifierSet(specifier).contains(found, prereleases=True):
        return f"{name} is {found}, must be {specifier}"
    module = MODULES.get(name, name.replace("-", "_"))
    if name in TOO_LARGE_TO_IMPORT or name in PLUGINS.values():
        return None
    try:
        importlib.import_module(module)
    except Exception as error:  # a library of C++ that is not there, another version of numpy, ...
        return f"{name} {found} cannot be imported ({_told(error)})"
    return None


def _told(error: Exception) -> str:
    """An error of a library on one line, which may have none."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


# --- The machine -------------------------------------------------------------------------------


def look_at_machine(report: Report) -> None:
    """Memory and cores of the host, and accelerators that jax has nothing for."""
    total, free = host_memory()
    report.good(f"memory {_size(total)}, {_size(free)} free")
    report.good(f"{_cores()} cores")
    installed = {extra for extra, name in PLUGINS.items() if version(name) is not None}
    driver = nvidia_driver()
    if driver is not None:
        extra = "cuda13" if driver and int(driver.partition(".")[0]) >= CUDA13_DRIVER else "cuda12"
        what = f"an NVIDIA GPU, driver {driver or 'unknown'}"
        if installed & {"cuda12", "cuda13"}:
            report.good(what)
        else:
            report.missing(f"{what}: jax computes without it: pip install '{PACKAGE}[{extra}]'")
    if has_tpu():
        if "tpu" in installed:
            report.good("a TPU")
        else:
            report.missing(f"a TPU: jax computes without it: pip install '{PACKAGE}[tpu]'")


def host_memory() -> tuple[int, int]:
    """Bytes of the host's memory and of what is free, within the limits of a container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"MemAvailable:\s+(\d+) kB", _read(ROOT / "proc/meminfo"))
    free = int(available[1]) * 1024 if available else total
    limit = _read(ROOT / "sys/fs/cgroup/memory.max")
    if limit.isdecimal():
        used = int(_read(ROOT / "sys/fs/cgroup/memory.current") or 0)
        total, free = min(total, int(limit)), min(free, int(limit) - used)
    return total, free


def _cores() -> float:
    """The cores that this process may use, within the limits of a container."""
    # macOS has no affinity to ask for.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _read(ROOT / "sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores or 1, round(int(quota) / int(period), 1)) if quota.isdecimal() else cores or 1


def nvidia_driver() -> str | None:
    """The version of the driver ("" where it cannot be told), None without an NVIDIA GPU."""
    if not [*ROOT.glob("dev/nvidia[0-9]*"), *ROOT.glob("dev/dxg")]:
        return None
    found = re.search(r"\b(\d+\.[\d.]+)\b", _read(ROOT / "proc/driver/nvidia/version"))
    return found[1] if found else ""


def has_tpu() -> bool:
    """Whether the machine has TPU chips: device files, and a device of Google's on the bus."""
    files = [*ROOT.glob("dev/accel[0-9]*"), *ROOT.glob("dev/vfio/[0-9]*")]
    vendors = map(_read, ROOT.glob("sys/bus/pci/devices/*/vendor"))
    return bool(files) and "0x1ae0" in vendors


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def look_at_devices(report: Report) -> None:
    """What jax computes on, tried with one product."""
    # A look must not take the memory of a GPU from those who compute there.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    try:
        devices = jax.local_devices()
        jax.block_until_ready(jax.jit(jnp.dot)(jnp.ones((8, 8)), jnp.ones((8, 8))))
    except Exception as error:  # of the plugins, which have no base class but this
        asked = os.environ.get("JAX_PLATFORMS")
        hint = f"; JAX_PLATFORMS is {asked!r}, unset it to use what is there" if asked else ""
        report.bad(f"jax cannot compute: {_told(error)}{hint}")
        return
    kinds = Counter((device.device_kind, device_memory(device)) for device in devices)
    for (kind, memory), count in kinds.items():
        has = "in the memory of the host" if memory is None else f"{_size(memory)} for jax each"
        report.good(f"{count} x {kind}, {has}; a product was computed")
    for extra, name in PLUGINS.items():
        present = nvidia_driver() is not None if extra != "tpu" else has_tpu()
        if present and version(name) is not None and devices[0].platform == "cpu":
            asked = os.environ.get("JAX_PLATFORMS")
            if asked:
                report.note(f"JAX_PLATFORMS={asked} keeps jax from what {name} is for")
            else:
                report.bad(
                    f"{name} {version(name)} is installed and jax does not use it: "
                    f"pip install --upgrade '{PACKAGE}[{extra}]'"
                )


def device_memory(device: Any) -> int | None:
    """Bytes of a device that jax may use; None where that is the host's memory."""
    return (device.memory_stats() or {}).get("bytes_limit")


# --- Caches and environment --------------------------------------------------------------------


def look_at_caches(report: Report) -> None:
    """Where compiled programs and downloads are kept."""
    import jax

    config: Any = jax.config
    if not config.jax_enable_compilation_cache:
        report.note("compiled programs are not kept (JAX_ENABLE_COMPILATION_CACHE)")
    else:
        given = config.jax_compilation_cache_dir
        folder = Path(given or compilation_cache.default_folder())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        limit = "no limit" if given else f"at most {_size(compilation_cache.MAX_BYTES)}"
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if os.access(there, os.W_OK):
            report.good(f"compiled programs in {folder}: {_size(size)}, {limit}")
        else:
            report.note(f"compiled programs are not kept: {str(there)!r} cannot be written")
    if version("huggingface_hub") is not None:
        from huggingface_hub import constants

        offline = ", and none are made (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
        report.good(f"downloads in {constants.HF_HUB_CACHE}{offline}")


def look_at_environment(report: Report) -> None:
    """Variables that change what is computed, on what and how fast."""
    found = [name for name in sorted(os.environ) if name in VARIABLES or name.startswith("JAX_")]
    for name in found:
        words = VARIABLES.get(name, "a setting of jax")
        report.note(f"{name}={os.environ[name]}: {words}")
    if not found:
        report.good("no variable of jax, XLA or the hub is set")


# --- A model -----------------------------------------------------------------------------------


def look_at_model(report: Report, folder: Path) -> None:
    """What a folder holds, whether it would load, and whether that fits; no weight is read."""
    from phi3_jax.folder import ADAPTER_CONFIG_FILE, folder_kind

    if (folder / ADAPTER_CONFIG_FILE).is_file():
        report.note("a LoRA adapter, no model: phi3-train trains on from it with lora.path")
        return
    if (folder / "checkpoints").is_dir():
        report.note("the folder of a training run, no model: phi3-train export makes one of it")
        return
    from phi3_jax.checkpoint import open_weights
    from phi3_jax.config import Phi3Config

    try:
        kind = folder_kind(folder)
        config = Phi3Config.from_pretrained(folder)
        weights = open_weights(folder, config)
    except (ValueError, OSError) as error:  # ours, all lines of which are for the user
        report.bad(str(error).replace("\n", "\n         "))
        return
    name = "Hugging Face safetensors" if kind == "hf" else "converted (Orbax)"
    dtypes = Counter(leaf.dtype.name for leaf in weights.leaves.values())
    report.good(f"{name}, its weights fit its config: {', '.join(sorted(dtypes))}")
    _look_at_size(report, config, weights)
    _look_at_tokenizer(report, folder)


def _look_at_size(report: Report, config: Any, weights: Any) -> None:
    import jax

    from phi3_jax.cache import KVCache

    tokens = min(4096, config.max_position_embeddings)
    dtype = weights.dtype(weights.table.embedding)
    cache = jax.eval_shape(lambda: KVCache.init(config, 1, tokens, dtype))
    cached = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    needed = sum(leaf.nbytes for leaf in weights.leaves.values()) + cached
    limits = [device_memory(device) for device in jax.local_devices()]
    if None in limits:
        room, where = host_memory()[1], "the host's free memory"
    else:
        needed, room = needed / len(limits), min(filter(None, limits))
        where = f"each of {len(limits)} devices"
    text = (
        f"{_size(needed)} of weights as stored and a cache of {tokens} tokens ({_size(cached)} in "
        f"all), {_size(room)} in {where}"
    )
    if needed <= room:
        report.good(f"fits: {text}")
    else:
        report.note(
            f"does not fit: {text}; phi3-convert to-orbax --quantize int8 or nf4 makes it smaller, "
            "more devices share it"
        )


def _look_at_tokenizer(report: Report, folder: Path) -> None:
    from phi3_jax.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except FileNotFoundError as error:
        report.missing(f"a tokenizer, without which no text can be given: {error}")
    else:
        report.good(f"a tokenizer of {len(tokenizer):,} tokens")


def doctor_command() -> None:
    """Entry point of `phi3-doctor`."""
    run_command(doctor)


if __name__ == "__main__":
    doctor_command()
