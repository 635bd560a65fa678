"""Ctrl-C at a command: in its imports, and after them."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from phi3_jax.interrupts import ctrl_c_ends_imports

ROOT = Path(__file__).parent.parent
CTRL_C = "import signal; signal.raise_signal(signal.SIGINT)"


@pytest.fixture(autouse=True)
def as_in_a_shell():
    """Who starts the tests may ignore the signal (nohup, a job in the background), and processes
    inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_imports_end_at_once_and_silently(tmp_path):
    # As compiled modules do it: the interrupt is dropped, or becomes an ImportError.
    (tmp_path / "drops.py").write_text(f"try:\n    {CTRL_C}\nexcept KeyboardInterrupt:\n    pass\n")
    script = (
        "from phi3_jax.interrupts import ctrl_c_ends_imports\n"
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "with ctrl_c_ends_imports():\n"
        "    import drops\n"
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_after_imports_it_is_an_exception_as_ever():
    with pytest.raises(KeyboardInterrupt):
        with ctrl_c_ends_imports():
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_ignores_it_goes_on_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ctrl_c_ends_imports():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_take_no_signals():
    failed = []

    def work():
        try:
            with ctrl_c_ends_imports():
                pass
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("phi3_jax.cli", ["hi"]),
        ("convert.cli", ["inspect", "phi3_jax/tiny_demo"]),
        ("train.cli", ["check", "sft_tiny_cpu"]),
        ("plan.cli", ["train", "sft_tiny_cpu", "--topology", "v5e:1"]),
    ],
)
def test_every_command_looks_after_it(tmp_path, module, arguments):
    (tmp_path / "jax.py").write_text(CTRL_C)  # all of them import it or numpy, and wait for it
    (tmp_path / "numpy.py").write_text(CTRL_C)
    entry = "generate_command" if module == "phi3_jax.cli" else "main"
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\n"
        f"sys.argv = ['phi3', *{arguments!r}]\n"
        f"from {module} import {entry}; {entry}()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
