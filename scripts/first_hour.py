"""A newcomer's first hour, timed: a wheel of this checkout, and the README's commands with it.

    python scripts/first_hour.py                             # every Python 3.11 to 3.13 found
    python scripts/first_hour.py python3.12 ~/bin/python3.13

Each Python gets a wheel, a new virtual environment and a new HOME, and works in a folder outside of
the checkout, where the names that the README uses are the embedded model and its new skill. Runs
are of 21 steps, the fewest that the schedule allows. In the end transformers and PEFT, in another
environment of the first Python, have to choose the same tokens from what was exported; pip has to
find a build of torch there that suits the machine.

A command that fails, or warns, ends all of it with what it said. At the end the seconds of each
step are printed as a table.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
FEW = " steps=21 evaluation.batches=1"
TOKENS = 24
QUESTIONS = ("Number these words: fox, red, bell.", "What is the capital of France?")
# Whose greedy tokens are compared: (model folder, adapter folder or None).
EXPORTS = (("my-model", None), ("my-merged", None), ("Phi-3-mini-4k-instruct", "my-adapter"))

PREPARE = """
import shutil
from pathlib import Path
import configs
from phi3_jax.cli import EMBEDDED_MODEL
shutil.copytree(EMBEDDED_MODEL, "Phi-3-mini-4k-instruct")
shutil.copytree(Path(configs.__path__[0], "tiny_skill"), "skill")
"""
VERSIONS = """
import importlib.metadata, platform
shown = "jax jaxlib flax orbax-checkpoint optax grain numpy tokenizers sentencepiece typer".split()
packages = (f"{name} {importlib.metadata.version(name)}" for name in shown)
print(f"Python {platform.python_version()}", *packages, sep=", ")
"""
# The adapter was trained on the embedded model: with it, that is what was merged.
OURS = f"""
import json
import phi3_jax as phi3
found = []
for folder in {["my-merged" if adapter else folder for folder, adapter in EXPORTS]}:
    model, params = phi3.from_pretrained(folder, dtype="float32")
    tokenizer = phi3.Tokenizer.from_pretrained(folder)
    for question in {QUESTIONS}:
        ids = tokenizer.apply_chat_template(
            [{{"role": "user", "content": question}}], add_generation_prompt=True
        )
        out = phi3.generate(model, params, [ids], max_new_tokens={TOKENS}, do_sample=False)
        found.append([ids, [int(token) for token in out.sequences[0]]])
print(json.dumps(found))
"""
# The ids are ours: to read a tokenizer.model, transformers needs sentencepiece, which it does not
# bring along.
THEIRS = f"""
import json, sys
import torch, transformers, peft
prompts = iter(json.loads(sys.argv[1]))
found = []
for folder, adapter in {EXPORTS}:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    for _ in {QUESTIONS}:
        ids = next(prompts)
        out = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens={TOKENS}, do_sample=False
        )
        found.append([ids, out[0].tolist()])
print(json.dumps(found))
"""


def readme_commands() -> tuple[list[str], list[str]]:
    """The README's commands for models, and those for fine-tuning, with few steps."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, flags=re.M | re.S)
    _, models, training, *_ = [block.splitlines() for block in blocks]
    few = [line + FEW * line.startswith("phi3-train sft_tiny_cpu") for line in training]
    return models, few


def runs(python: str) -> bool:
    """Whether there is such a Python; a name of pyenv may be there and not run."""
    try:
        return subprocess.run([python, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def find_pythons() -> list[str]:
    """One interpreter of each version that is supported and here."""
    found = {}
    for version in PYTHONS:
        pyenv = sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
        for name in (f"python{version}", *pyenv):
            if version not in found and runs(name):
                found[version] = name
    return list(found.values())


class Hour:
    """One Python's: a folder, an environment, and the seconds of each step."""

    def __init__(self, python: str, folder: Path):
        self.python = python
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        (folder / "home").mkdir()
        self.seconds: dict[str, float] = {}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "JAX", "XLA", "PHI3", "XDG", "HF_", "VIRTUAL_ENV"))
        }
        self.environment = {**kept, "HOME": str(folder / "home"), "JAX_PLATFORMS": "cpu"}

    def enter(self, environment: Path) -> None:
        """The commands of an environment go before all others from now on."""
        self.environment["PATH"] = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def step(self, name: str, command: str | list[str], quiet: bool = True) -> str:
        """Runs and times a command, whose output is returned; ends all where it fails or warns."""
        print(f"  {name}: ", end="", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        done = subprocess.run(
            command,
            shell=isinstance(command, str),
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        self.seconds[name] = time.perf_counter() - begin
        print(f"{self.seconds[name]:.1f} s", file=sys.stderr, flush=True)
        warned = quiet and re.search(r"warning|Traceback", done.stderr, flags=re.I)
        if done.returncode or warned:
            what = f"ended with status {done.returncode}" if done.returncode else "warned"
            sys.exit(f"{self.python}: {name!r} {what}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def pip(self, name: str, *arguments: str) -> None:
        self.step(name, ["python", "-m", "pip", "install", "--quiet", *arguments], quiet=False)

    def run_all(self) -> list:
        """All but the comparison; returns our greedy tokens."""
        folder = self.work.parent
        wheels = str(folder / "wheels")
        build = [self.python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels]
        self.step("build a wheel", [*build, str(ROOT)], quiet=False)
        (wheel,) = Path(wheels).iterdir()
        self.step("make an environment", [self.python, "-m", "venv", str(folder / "venv")])
        self.enter(folder / "venv")
        self.pip("pip install WHEEL", str(wheel))
        question = 'phi3-generate "What is the capital of France?"'
        for name in (question, f"{question} (again)"):
            if "Paris" not in self.step(name, question):
                sys.exit(f"{self.python}: the embedded model does not know its capital")
        hello = 'echo "Hello" | phi3-chat --max-new-tokens 20'
        self.step(hello, hello)
        self.step("copy the embedded model", ["python", "-c", PREPARE])
        models, training = readme_commands()
        for line in models:
            self.step(line, line)
        self.pip("pip install WHEEL[train]", f"{wheel}[train]")
        merged = "phi3-train export lora my-merged"
        for line in (*training, merged):
            self.step(line, line)
        return json.loads(self.step("our greedy tokens of the exports", ["python", "-c", OURS]))

    def versions(self) -> str:
        done = subprocess.run(
            ["python", "-c", VERSIONS], env=self.environment, capture_output=True, text=True
        )
        return done.stdout.strip()


def compare(hour: Hour, ours: list) -> str:
    """That transformers and PEFT choose the same tokens; returns their versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = project["optional-dependencies"]["parity"][1:]
    environment = hour.work.parent / "reference"
    hour.step("reference: make an environment", [hour.python, "-m", "venv", str(environment)])
    hour.enter(environment)
    hour.pip(f"reference: pip install {pins[0]}", pins[0])
    hour.pip(f"reference: pip install {' '.join(pins[1:])}", *pins)
    command = ["python", "-c", THEIRS, json.dumps([ids for ids, _ in ours])]
    theirs = json.loads(hour.step("reference: its greedy tokens", command, quiet=False))
    if ours != theirs:
        sys.exit(f"the reference chooses other tokens:\nours   {ours}\ntheirs {theirs}")
    tokens = sum(len(row) - len(ids) for ids, row in ours)
    return f"{', '.join(pins)}: the same {tokens} greedy tokens from {len(EXPORTS)} exports"


def table(hours: dict[str, dict[str, float]]) -> str:
    """Markdown: a line for each step, the seconds of each Python beside it."""
    names = list(dict.fromkeys(name for seconds in hours.values() for name in seconds))
    lines = [["seconds", *hours], ["---", *("---:" for _ in hours)]]
    for name in names:
        label = name.replace("|", r"\|")
        cells = (seconds.get(name) for seconds in hours.values())
        lines.append([label, *("" if cell is None else f"{cell:.1f}" for cell in cells)])
    lines.append(["all", *(f"{sum(seconds.values()):.0f}" for seconds in hours.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    pythons = sys.argv[1:] or find_pythons()
    if not pythons:
        sys.exit(f"error: there is no Python {', '.join(PYTHONS)} here")
    for python in pythons:
        if not runs(python):
            sys.exit(f"error: {python!r} is no Python that runs")
    hours, notes = {}, []
    with tempfile.TemporaryDirectory(prefix="phi3 first hour ") as place:
        for number, python in enumerate(pythons):
            print(python, file=sys.stderr)
            hour = Hour(python, Path(place, str(number)))
            ours = hour.run_all()
            versions = hour.versions()
            notes.append(versions)
            if number == 0:
                notes.append(compare(hour, ours))
            hours[versions.partition(",")[0]] = hour.seconds
            shutil.rmtree(hour.work.parent)
    print(table(hours), "", *notes, sep="\n")


if __name__ == "__main__":
    main()
