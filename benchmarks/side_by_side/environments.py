"""What the jobs need, in one folder: an environment for each peer, checkpoints, gguf files.

    FOLDER/venvs/PEER  FOLDER/ckpt/phi3-mid-{f32,bf16}  FOLDER/gguf/phi3-mid-*.gguf

Whatever is there already is kept.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENIZER = ROOT / "phi3_jax" / "tiny_demo"  # llama.cpp's converter wants one; any does

# 271 M parameters in the proportions of Phi-3: large enough for memory to count.
MID: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
GGUF_TYPES = ("f32", "bf16", "q8_0", "q4_0")
PACKAGES = {
    "hf": ["torch==2.13.0", "transformers==5.23.0", "safetensors", "sentencepiece", "protobuf"],
    "keras": ["keras-hub", "jax", "safetensors"],
    # torch reads the checkpoint for it.
    "easydel": ["easydel", "torch", "safetensors", "pillow"],
}
QUANTIZE = """
import sys, llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), settings))
"""


def cache_folder() -> Path:
    """$PEERS_DIR, or phi3-peers in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PEERS_DIR") or Path(caches) / "phi3-peers").expanduser()


def python_of(folder: Path, peer: str) -> Path:
    """The interpreter of a peer's environment, whether it is there or not."""
    return folder / "venvs" / peer / "bin" / "python"


def weights_read() -> tuple[int, int]:
    """Weights that a decoding step of one row reads, of the layers and of the head; of the table of
    embeddings it reads a row.
    """
    width, mlp = MID["hidden_size"], MID["intermediate_size"]
    layer = 4 * width * width + 3 * width * mlp + 2 * width
    return MID["num_hidden_layers"] * layer + width, MID["vocab_size"] * width


def run(command: list[str | Path], **variables: str) -> None:
    """Runs a step and shows it.

    Raises:
      subprocess.CalledProcessError: where it fails.
    """
    print("+", " ".join(map(str, command)), flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env={**os.environ, **variables})


def make_checkpoints(folder: Path) -> None:
    """phi3-mid in float32 and bfloat16, the same values in both, as transformers keeps them."""
    config = folder / "phi3-mid.json"
    config.write_text(json.dumps(MID, indent=1))
    for short, dtype in DTYPES.items():
        target = folder / "ckpt" / f"phi3-mid-{short}"
        if target.exists():
            continue
        script = ROOT / "benchmarks" / "make_checkpoint.py"
        command = [sys.executable, script, "--config", config, "--dtype", dtype, "--out", target]
        run(command, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, target)


def make_environment(folder: Path, peer: str) -> None:
    """A virtual environment with the peer's packages; pip's settings say from where."""
    python = python_of(folder, peer)
    if not python.exists():
        run([sys.executable, "-m", "venv", folder / "venvs" / peer])
    if peer in PACKAGES:
        run([python, "-m", "pip", "install", "-q", *PACKAGES[peer]])


def make_llama(folder: Path) -> None:
    """llama.cpp for this machine's processor, built from the package's source, and its files."""
    make_environment(folder, "llama")
    make_environment(folder, "hf")  # its converter runs there
    python, source = python_of(folder, "llama"), folder / "llama-src"
    pip = [python, "-m", "pip"]
    if not (source / "vendor").exists():
        from_source = ["--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python"]
        run([*pip, "download", "-q", "-d", folder, *from_source])
        archive = max(folder.glob("llama_cpp_python-*.tar.gz"), key=os.path.getmtime)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (folder / archive.name.removesuffix(".tar.gz")).rename(source)
    try:
        subprocess.run([str(python), "-c", "import llama_cpp"], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        cores = str(os.cpu_count() or 1)
        # Without the part for images, which is most of what there is to compile.
        options = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
        build = {"CMAKE_ARGS": options, "CMAKE_BUILD_PARALLEL_LEVEL": cores}
        run([*pip, "install", "-q", source], **build)
    for kind in GGUF_TYPES:
        make_gguf(folder, source / "vendor" / "llama.cpp", kind)


def make_gguf(folder: Path, llama: Path, kind: str) -> None:
    """One gguf file of phi3-mid; q4_0 is llama.cpp's own quantisation of the float32 one."""
    target = folder / "gguf" / f"phi3-mid-{kind}.gguf"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    if kind == "q4_0":
        whole = target.with_name("phi3-mid-f32.gguf")
        run([python_of(folder, "llama"), "-c", QUANTIZE, whole, partial, "Q4_0"])
    else:
        script, model = llama / "convert_hf_to_gguf.py", folder / "ckpt" / "phi3-mid-f32"
        options = ["--outtype", kind, "--outfile", partial]
        command = [python_of(folder, "hf"), script, model, *options]
        run(command, PYTHONPATH=str(llama / "gguf-py"))
    partial.rename(target)


PEERS: dict[str, Callable[[Path], None]] = {
    "hf": lambda folder: make_environment(folder, "hf"),
    "llama": make_llama,
    "keras": lambda folder: make_environment(folder, "keras"),
    "easydel": lambda folder: make_environment(folder, "easydel"),
}


def set_up(folder: Path, peers: list[str]) -> None:
    """Makes all that jobs of these peers need.

    Raises:
      subprocess.CalledProcessError: where a step fails; run again, it goes on from there.
    """
    (folder / "ckpt").mkdir(parents=True, exist_ok=True)
    make_checkpoints(folder)
    for peer in peers:
        PEERS[peer](folder)


def make_quantized(folder: Path) -> str | None:
    """phi3-mid in int8, made anew by `phi3-convert`; what it said where it could not."""
    source, target = folder / "ckpt" / "phi3-mid-f32", folder / "ckpt" / "phi3-mid-int8"
    options = ["--quantize", "int8", "--force"]
    done = subprocess.run(
        [sys.executable, "-m", "convert.cli", "to-orbax", source, target, *options],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    said = [line.strip(" │") for line in done.stderr.splitlines() if any(map(str.isalnum, line))]
    return f"phi3-convert to-orbax --quantize int8: {said[-1] if said else done.returncode}"
