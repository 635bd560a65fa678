"""Set up before the first device is used: CPU only, eight devices, exact matrix products."""

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do: programs need not be fast, they are to compile fast.
# Processes that tests start inherit this, and what is set already has the last word.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Later ones, and libtpu's, end the process at a flag that they do not know.
if version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None:
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {given}"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

# Many tests compile the same small programs.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser):
    parser.addoption(
        "--parity-seed",
        default="0",
        help="draws the configs that tests/parity compares (default 0)",
    )
    parser.addoption(
        "--first-cases",
        action="store_true",
        help="of each test with parameters the first case only, as CI on its second Python",
    )
    parser.addoption(
        "--long",
        action="store_true",
        help="kills as often as docs/reliability.md says (default: a few times)",
    )
    parser.addoption(
        "--weights",
        metavar="DIR",
        help="real weights of phi-3-mini for tests/weights, which says more (default: left out)",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--first-cases"):
        first = {}
        for item in items:
            first.setdefault(item.nodeid.partition("[")[0], item)
        config.hook.pytest_deselected(items=[one for one in items if one not in first.values()])
        items[:] = first.values()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs hold many memory maps, of which a process can have some 65,000."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimized():
    """Without optimisation XLA rounds the ends of odd rows otherwise, by a bit."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
