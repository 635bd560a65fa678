"""What the commands compile is found again by the next one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from phi3_jax.compilation_cache import drop_oldest, keep_compiled_programs

ROOT = Path(__file__).parent.parent
DEFAULTS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_enable_compilation_cache": True,
}


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty folder for caches, and jax as it is before anyone sets it up."""
    before = {name: getattr(jax.config, name) for name in DEFAULTS}
    for name, value in DEFAULTS.items():
        monkeypatch.delenv(name.upper(), raising=False)
        jax.config.update(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    yield tmp_path / "caches"
    for name, value in before.items():
        jax.config.update(name, value)


def settings():
    return {name: getattr(jax.config, name) for name in DEFAULTS}


def test_all_programs_are_kept_in_the_users_cache_folder(home, capsys):
    keep_compiled_programs()
    folder = home / "phi3-jax" / "compilation"
    assert folder.stat().st_mode & 0o777 == 0o700 and not list(folder.iterdir())
    assert settings() == {
        **DEFAULTS,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    keep_compiled_programs()
    assert capsys.readouterr() == ("", "")


def test_the_cache_folder_is_in_the_home_by_default(home, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(home))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == f"{home}/.cache/phi3-jax/compilation"


def test_settings_of_the_environment_go_before(home, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "elsewhere")  # as jax does when it is imported
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    keep_compiled_programs()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 3.0
    assert not home.exists()


def test_it_can_be_turned_off(home):
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled_programs()
    assert settings() == {**DEFAULTS, "jax_enable_compilation_cache": False} and not home.exists()


def test_runs_of_several_processes_are_left_alone(home, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    keep_compiled_programs()
    assert settings() == DEFAULTS and not home.exists()


def test_a_folder_that_cannot_be_written_is_said_once(home, capsys):
    home.write_text("in the way")
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
    out, err = capsys.readouterr()
    assert not out and err.startswith("warning: compiled programs are not kept: ")
    assert str(home) in err and err.count("\n") == 1


def test_a_full_folder_loses_its_oldest_files(tmp_path):
    (tmp_path / "inside").mkdir()
    for age, name in enumerate(["new", "inside/middle", "old", "older"]):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    drop_oldest(tmp_path, 25)
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "inside", "middle"}


def test_the_second_run_of_a_command_compiles_nothing(tmp_path):
    command = "import sys; from phi3_jax import cli; cli.generate_command()"
    arguments = [sys.executable, "-c", command, "What is the capital of France?"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environ |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    runs, kept = [], []
    for _ in range(2):
        runs.append(
            subprocess.run(
                [*arguments, "--max-new-tokens", "3"],
                env=environ, cwd=ROOT, check=True, capture_output=True, text=True,
            )
        )  # fmt: skip
        files = (tmp_path / "phi3-jax" / "compilation").iterdir()
        kept.append({path.name: path.stat().st_mtime_ns for path in files})
    assert {name.partition("-")[0] for name in kept[0]} >= {"jit_prefill", "jit_decode_step"}
    assert kept[0] == kept[1]
    assert runs[0].stdout == runs[1].stdout != ""
    # Nor has the loading of what was compiled anything to say.
    assert runs[0].stderr == runs[1].stderr and runs[0].stderr.count("\n") == 1
