"""Doors open one way, and the library needs neither torch nor transformers."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What each module may import of this repository: itself apart, only what stands in a line before.
ORDER = [
    {"phi3_jax.json_files"},
    {
        "phi3_jax.compilation_cache",
        "phi3_jax.frozen_mapping",
        "phi3_jax.interrupts",
        "phi3_jax.read_ahead",
        "phi3_jax.timing",
    },
    {"phi3_jax.rope_parameters", "phi3_jax.safetensors_files"},
    {"phi3_jax.config_checks"},
    {"phi3_jax.config"},
    {"phi3_jax.folder"},
    {"phi3_jax.processes", "phi3_jax.fingerprint"},
    {"phi3_jax.generation.config_checks"},
    {"phi3_jax.generation.watermarking_config"},
    {"phi3_jax.generation.config"},
    {"phi3_jax.rope", "phi3_jax.sharding"},
    {
        "phi3_jax.attention_kernels",
        "phi3_jax.head_loss",
        "phi3_jax.slots",
        "phi3_jax.hf_format",
    },
    {"phi3_jax.quantized"},
    {"phi3_jax.products", "phi3_jax.resize", "phi3_jax.split_layers"},
    {"phi3_jax.cache", "phi3_jax.gather", "phi3_jax.loss"},
    {"phi3_jax.attention"},
    {"phi3_jax.inputs", "phi3_jax.layers"},
    {"phi3_jax.outputs"},
    {"phi3_jax.model"},
    {"phi3_jax.classification"},
    {"phi3_jax.generation"},
    {"phi3_jax.orbax_format"},
    {"phi3_jax.load_leaves"},
    {"phi3_jax.checkpoint"},
    {"phi3_jax.text"},
    {"phi3_jax.cli"},
    {"phi3_jax.chat_cli"},
    {"phi3_jax.doctor"},
    {"convert", "train"},
    {"configs"},
    {"plan"},
]
FORBIDDEN = {"torch", "transformers"}


def home(module: str) -> str:
    """The longest name in ORDER that a module is, or is inside of."""
    known = {name for names in ORDER for name in names}
    while module not in known:
        assert "." in module, f"{module} has no place in ORDER"
        module = module.rpartition(".")[0]
    return module


def rank(name: str) -> int:
    return next(place for place, names in enumerate(ORDER) if name in names)


def modules():
    for package in ("phi3_jax", "convert", "train", "configs", "plan"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree) -> set[str]:
    """Full names of what a module imports, `from x import y` as x.y."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_doors_open_one_way():
    wrong = []
    for module, tree in modules():
        if module == "phi3_jax":  # the front door imports on first use
            continue
        for name in imported(tree):
            if name.partition(".")[0] not in ("phi3_jax", "convert", "train", "configs", "plan"):
                continue
            # The front door itself is for those who stand outside of it.
            if name == "phi3_jax":
                name = "phi3_jax.text"
            here, there = home(module), home(name)
            if here != there and rank(there) >= rank(here):
                wrong.append(f"{module} imports {name}")
    assert not wrong, wrong


def test_nothing_imports_the_reference():
    found = [
        f"{module} imports {name}"
        for module, tree in modules()
        for name in imported(tree)
        if name.partition(".")[0] in FORBIDDEN
    ]
    assert not found, found


def test_every_public_name_loads_without_torch_and_transformers():
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"no module named {name!r}")
sys.meta_path.insert(0, Refuse())
import phi3_jax
for name in phi3_jax.__all__:
    getattr(phi3_jax, name)
import convert.cli, phi3_jax.cli
assert not {"torch", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_importing_the_package_loads_no_compiler():
    script = "import sys, phi3_jax; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_packages_that_take_long_wait_until_they_are_needed():
    """The package alone loads none; a Hugging Face folder is loaded without Orbax and training."""
    script = """
import sys, phi3_jax
heavy = {"orbax", "tensorstore", "tokenizers", "sentencepiece", "typer", "grain", "optax"}
loaded = heavy | {"jax", "flax", "numpy", "jinja2", "rich", "safetensors"}
assert not loaded & set(sys.modules), loaded & set(sys.modules)
phi3_jax.TextGenerator, phi3_jax.Tokenizer, phi3_jax.generate
phi3_jax.from_pretrained("phi3_jax/tiny_demo")
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
