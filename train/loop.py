"""A fine-tuning run, from its config to its last checkpoint."""

import contextlib
import fcntl
import json
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import phi3_jax as phi3
from phi3_jax.processes import by_all
from train.batches import Batches
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.evaluate import answers, perplexity
from train.metrics import Clock, Reporter, flops_per_token, memory_in_use, peak_flops
from train.preemption import preemption
from train.records import open_records
from train.state import Setup, TrainState, fingerprint, model_folder
from train.step import lower_step, model_tables, place_batch, rows_held, step_function

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"
_LOCK = ".lock"

# What a run may not change when it goes on; the data is compared by its fingerprint.
_FIXED = ("optimizer", "lora", "batch_size", "seed")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      step: how many steps it has taken, those before it was resumed included.
      preempted: whether it was told to stop; the same command goes on.
      checkpoint: the folder of its last checkpoint.
      state: what it ended with.
    """

    step: int
    preempted: bool
    checkpoint: Path
    state: TrainState


def train(config: TrainConfig) -> TrainResult:
    """Fine-tunes a model as the config says, or goes on where a run in the same folder stopped.

    In a run of several processes all of them call this, after `distributed.initialize`; the folder
    is on a file system that they share.

    Raises:
      ValueError: for settings, data or weights that cannot be used, and for a folder whose run is
        another one; nothing of a run is written then.
      FloatingPointError: where the loss, a gradient or a weight becomes NaN or infinite, with the
        steps since the last checkpoint, and that.
    """
    folder = Path(config.folder).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        # ----- Mesh ---------------------------------------------------------------------------
        sizes = config.mesh
        mesh = phi3.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sequence=sizes.sequence)

        # ----- Model and optimizer, abstract ----------------------------------------------------
        # Before the data, which may take long to read; its epochs tell the steps only then.
        setup = Setup(config, mesh, config.steps or 10**9)
        rows = rows_held(setup)

        # ----- Data ---------------------------------------------------------------------------
        source, tokenizer = load_tokenizer(config)
        data, valid = open_data(config, tokenizer)
        steps = config.steps if config.steps is not None else data.steps
        assert steps is not None, "epochs have an end"
        if config.steps is None:
            setup = Setup(config, mesh, steps)

        # ----- Run folder -----------------------------------------------------------------------
        with by_all():
            if jax.process_index() == 0:
                stack.enter_context(_own_folder(folder))
        report = Reporter(folder, steps, config.tensorboard)
        stack.callback(report.close)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        report.banner("Run", str(folder), f"{devices}, mesh {_sizes(mesh)}")
        report.banner("Data", *data.summary())
        checkpoints = Checkpoints(folder / CHECKPOINTS, config.checkpoint)
        stack.callback(checkpoints.close)

        # ----- State: (1) the run's last checkpoint, (2) the model folder -----------------------
        resumed = checkpoints.steps[-1] if checkpoints.steps else None
        report.banner("Model", *_model_lines(setup, source, resumed))
        state, frozen = setup.load(source, trained=resumed is None)
        run = {
            "config": config.to_dict(),
            "model": setup.model.config.to_dict(),
            "data": data.fingerprint,
            "frozen": fingerprint(frozen) if jax.tree.leaves(frozen) else None,
        }
        if resumed is not None:
            _check_same_run(checkpoints.run_values(resumed), run, folder)
            state = checkpoints.load(resumed, setup.abstract_state)
        assert state is not None
        done = start = int(state.step)
        report.begin(start)

        def is_due(step: int) -> bool:
            return step == steps or step % config.evaluation.every == 0

        if valid is not None and start and is_due(start) and not report.has_evaluation(start):
            # The run was stopped between the checkpoint and the evaluation of this step.
            _evaluate(setup, state, frozen, valid, tokenizer, rows, report, start)
        if done >= steps:
            report.say(f"This run has taken its {steps} steps; there is nothing left to do.")
            return TrainResult(done, False, checkpoints.path(done), state)
        with by_all():
            if jax.process_index() == 0:
                text = json.dumps(config.to_dict(), indent=2) + "\n"
                (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

        # ----- Compilation ----------------------------------------------------------------------
        clock = Clock()
        if any(leaf.dtype == jnp.uint4 for leaf in jax.tree.leaves(frozen)):
            # A program that is compiled ahead refuses such arrays: JAX tells their layout wrongly.
            step_program = step_function(setup)
        else:
            step_program = lower_step(setup, frozen).compile()
        rope = model_tables(setup)
        report.banner("Training", _program_line(step_program, clock.lap()))

        # ----- The loop -------------------------------------------------------------------------
        flops = flops_per_token(setup.model.config, setup.tokens_per_row, config.lora)
        peak = peak_flops(mesh.devices.flat[0])
        stop = stack.enter_context(preemption())
        batches = stack.enter_context(contextlib.closing(data.iterate(start, steps, rows)))
        profiler = stack.enter_context(_Profiler(config, folder))
        saved, waiting, preempted = start if resumed is not None else None, None, False

        def finish(step: int, metrics: Any) -> None:
            """Reports a step, and refuses to go on from one that went wrong."""
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            rate = values["tokens"] / clock.lap()
            speed = {"tokens_per_second": rate, "memory_gib": memory_in_use()}
            if peak is not None:
                speed["mfu"] = rate * flops / (peak * mesh.size)
            report.step(step, values | speed)
            watched = ("loss", "grad_norm", "param_norm")
            bad = [name for name in watched if not math.isfinite(values[name])]
            if bad:
                _stop_at(step, {name: values[name] for name in bad}, saved, checkpoints)

        clock.restart()
        for arrays in batches:
            profiler.before(done + 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
                batch = place_batch(setup, arrays, rows)
                state, metrics = step_program(state, frozen, batch, rope)
            # The device works on this step while the host looks at the one before.
            if waiting is not None:
                finish(*waiting)
            done, waiting = done + 1, (done + 1, metrics)
            preempted = stop(done)
            is_last = done == steps or preempted
            saves = is_last or done % config.checkpoint.every == 0
            looks = is_due(done) and (done == steps or not preempted)
            profiler.after(done, metrics)
            if saves or looks:
                finish(*waiting)
                waiting = None
            if saves:
                checkpoints.save(done, state, run)
                saved = done
            if looks:
                _evaluate(setup, state, frozen, valid, tokenizer, rows, report, done)
            if saves or looks:
                clock.restart()
            if is_last:
                break
        checkpoints.wait()
        ending = "told to stop" if preempted else "done"
        report.banner("End", f"{ending} after step {done}", f"saved {checkpoints.path(done)}")
        return TrainResult(done, preempted, checkpoints.path(done), state)


def load_tokenizer(config: TrainConfig) -> tuple[Path, phi3.Tokenizer]:
    """The model folder of a run, and its tokenizer."""
    source = model_folder(config.model)
    return source, phi3.Tokenizer.from_pretrained(source)


def open_data(config: TrainConfig, tokenizer: phi3.Tokenizer) -> tuple[Batches, Batches | None]:
    """The checked data of a run: to learn, and to evaluate on where there is some.

    Raises:
      ValueError: with all that is wrong in either.
    """
    data = config.data
    learnt = Batches(
        open_records(data.path, "train"),
        tokenizer,
        data,
        config.batch_size,
        config.accumulate,
        config.seed,
        config.epochs,
    )
    valid = None
    if data.valid is not None or _has_valid(data.path):
        records = open_records(data.path if data.valid is None else data.valid, "valid")
        valid = Batches(
            records, tokenizer, data, config.batch_size, config.accumulate, 0, 1, shuffle=False
        )
    return learnt, valid


def _has_valid(path: str) -> bool:
    folder = Path(path).expanduser()
    return folder.is_dir() and any(folder.glob("valid*"))


@contextlib.contextmanager
def _own_folder(folder: Path) -> Generator[None]:
    """Makes the folder of a run, and keeps a second run from writing into it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing into {str(folder)!r}; wait for its end, or choose another "
                "folder (folder=...)"
            ) from None
        yield


def _check_same_run(saved: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    """Refuses to go on with other settings, data or weights than the run began with."""
    then, now = saved["config"], json.loads(json.dumps(run["config"]))
    changed = [
        f"{name} was {then[name]}, is {now[name]}" for name in _FIXED if then[name] != now[name]
    ]
    model = json.loads(json.dumps(run["model"]))
    changed += [
        f"the model's {name} was {value}, is {model.get(name)}"
        for name, value in saved["model"].items()
        if model.get(name) != value
    ]
    if saved["data"] != run["data"]:
        changed.append("the data (its documents, their order or their tokens) is another one")
    if saved["frozen"] != run["frozen"]:
        changed.append("the weights of the model that are not trained are others")
    if changed:
        raise ValueError(
            f"{str(folder)!r} holds another run: {'; '.join(changed)}; set that back to go on with "
            "it, or choose another folder (folder=...)"
        )


def _stop_at(step: int, bad: dict[str, float], saved: int | None, checkpoints: Checkpoints) -> None:
    checkpoints.wait()
    what = ", ".join(f"{name} is {value}" for name, value in bad.items())
    if saved is None:
        raise FloatingPointError(f"{what} at step {step}, and there is no checkpoint before it")
    raise FloatingPointError(
        f"{what} at step {step}; the last good checkpoint is {str(checkpoints.path(saved))!r}, "
        f"steps {saved + 1} to {step} came after it"
    )


def _evaluate(
    setup: Setup,
    state: TrainState,
    frozen: Any,
    valid: Batches | None,
    tokenizer: phi3.Tokenizer,
    rows: np.ndarray,
    report: Reporter,
    step: int,
) -> None:
    """Loss on the data that is not learnt, and what the model says now."""
    settings = setup.config.evaluation
    params = setup.combine(state.params if state.ema is None else state.ema, frozen)
    if valid is not None:
        assert valid.steps is not None, "an epoch has an end"
        count = valid.steps if settings.batches is None else min(settings.batches, valid.steps)

        def placed() -> Iterator[Any]:
            with contextlib.closing(valid.iterate(0, count, rows)) as batches:
                for arrays in batches:
                    yield place_batch(setup, arrays, rows)

        found = perplexity(setup.model, params, placed())
        values = {"loss": found.loss, "perplexity": found.perplexity, "labels": found.tokens}
        report.evaluation(step, values)
    if settings.samples:
        prompts = [[{"role": "user", "content": text}] for text in settings.samples]
        said = answers(setup.model, params, tokenizer, prompts, settings.sample_tokens)
        for prompt, answer in zip(settings.samples, said, strict=True):
            report.sample(step, prompt, answer)


class _Profiler:
    """Profiles the steps that the config names."""

    def __init__(self, config: TrainConfig, folder: Path):
        self._first, self._last = config.profile or (0, 0)
        self._folder = folder / "profile"
        self._running = False

    def __enter__(self) -> "_Profiler":
        return self

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._running = False

    def __exit__(self, *error: object) -> None:
        if self._running:
            jax.profiler.stop_trace()


def _sizes(mesh: jax.sharding.Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def _model_lines(setup: Setup, source: Path, resumed: int | None) -> list[str]:
    trained, frozen = setup.parameters()
    return [
        f"{source}: {trained:,} parameters are trained, {frozen:,} are not",
        "from the model folder" if resumed is None else f"goes on from its checkpoint {resumed}",
    ]


def _program_line(program: Any, seconds: float) -> str:
    if not isinstance(program, jax.stages.Compiled):
        return "the first step compiles"
    line = f"compiled in {seconds:.1f} s"
    peak = getattr(program.memory_analysis(), "peak_memory_in_bytes", 0)
    return f"{line}; a step needs {peak / 2**30:.2f} GiB on each device" if peak else line
