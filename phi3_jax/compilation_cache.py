"""Compiled programs that the commands keep on disk, for the next run to load."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Where the help of a command ends.
HELP = (
    "Compiled programs are kept for the next run in ~/.cache/phi3-jax/compilation (under "
    "XDG_CACHE_HOME where that is set). JAX_COMPILATION_CACHE_DIR=FOLDER keeps them elsewhere, "
    "JAX_ENABLE_COMPILATION_CACHE=false does without."
)

MAX_BYTES = 2 * 2**30


def keep_compiled_programs() -> None:
    """Sets jax up to keep all that it compiles, and to look there first.

    To be called before anything is compiled. Settings of jax that the environment has go before:
    its folder is used, and it can turn this off (see HELP). A folder that cannot be written is said
    on stderr, and nothing is kept. A run of several processes is left as it is: jax writes from the
    first of them alone, so that the others would find nothing in a folder of their own host, and on
    GPUs compile without the process that they tune kernels with.
    """
    import jax

    config: Any = jax.config
    if not config.jax_enable_compilation_cache or jax.process_count() > 1:
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default a second: on CPU few programs take that long, and there are dozens of them.
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = default_folder()
        # Who can write here can have us run any program.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # it can be written
        drop_oldest(folder, MAX_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"warning: compiled programs are not kept: {error}", file=sys.stderr, flush=True)
    else:
        config.update("jax_compilation_cache_dir", str(folder))


def default_folder() -> Path:
    """Where compiled programs are kept unless jax is told another folder.

    Raises:
      RuntimeError: where the user has no home.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches, "phi3-jax", "compilation")


def drop_oldest(folder: Path, max_bytes: int) -> None:
    """Removes files of a folder, first written first, until the rest has no more than max_bytes.

    jax can bound its cache too, but only with a lock and another written file at each read.
    """
    files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
    files.sort(key=lambda file: file[0].st_mtime_ns, reverse=True)
    total = 0
    for stat, path in files:
        total += stat.st_size
        if total > max_bytes:
            path.unlink(missing_ok=True)  # another process may have been faster
