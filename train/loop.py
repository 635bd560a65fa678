"""A fine-tuning run, from its config to its last checkpoint."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import phi3_jax as phi3
from train.batches import Batches
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.data_cache import DataCache, cache_key
from train.evaluate import answers, perplexity
from train.metrics import Clock, Reporter, flops_per_token, memory_in_use, peak_flops
from train.preemption import preemption
from train.records import has_split, open_records
from train.run_folder import CHECKPOINTS, check_same_run, own_folder, write_config
from train.state import Setup, TrainState, model_folder
from train.step import lower_step, model_tables, place_batch, rows_held, step_function

# Seconds between two lines about how much of the data is read.
_TELL_EVERY = 5.0


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      step: how many steps it has taken, those before it was resumed included.
      preempted: whether it was told to stop; the same command goes on.
      checkpoint: the folder of its last checkpoint; None where it was told to stop before it had
        taken a step.
      state: what it ended with.
    """

    step: int
    preempted: bool
    checkpoint: Path | None
    state: TrainState


def train(config: TrainConfig) -> TrainResult:
    """Fine-tunes a model as the config says, or goes on where a run in the same folder stopped.

    In a run of several processes all of them call this, after `distributed.initialize`; the folder
    is on a file system that they share.

    Raises:
      ValueError: for settings and data that cannot be used, before the folder is made; for weights
        that cannot be, and for a folder whose run is another one, before a checkpoint is written.
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
        data, valid = open_data(config, tokenizer, folder)
        steps = config.steps if config.steps is not None else data.steps
        assert steps is not None, "epochs have an end"
        if config.steps is None:
            setup = Setup(config, mesh, steps)

        # ----- Run folder -----------------------------------------------------------------------
        stack.enter_context(own_folder(folder))
        for checked in (data, valid):
            if checked is not None:
                checked.save_cache()
        stop = stack.enter_context(preemption())
        report = Reporter(folder, steps, config.tensorboard)
        stack.callback(report.close)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        report.banner("Run", str(folder), f"{devices}, mesh {_sizes(mesh)}")
        report.banner("Data", *data.summary())
        checkpoints = Checkpoints(folder / CHECKPOINTS, config.checkpoint)
        stack.callback(checkpoints.close)

        # ----- State: (1) the run's last checkpoint, (2) the model folder -----------------------
        resumed = checkpoints.latest()
        report.banner("Model", *_model_lines(setup, source, resumed))
        state, frozen, frozen_bits = setup.load(source, trained=resumed is None)
        run = {
            "config": config.to_dict(),
            "model": setup.model.config.to_dict(),
            "data": data.fingerprint,
            "frozen": frozen_bits,
        }
        if resumed is not None:
            check_same_run(checkpoints.run_values(resumed), run, folder)
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
        write_config(folder, config)

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

        if stop(start):
            # Told so while it was loading and compiling: there is nothing new to save.
            last = None if resumed is None else checkpoints.path(resumed)
            return TrainResult(start, True, last, state)
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
    """The model folder of a run, and its tokenizer, which fits it."""
    source = model_folder(config.model)
    tokenizer = phi3.Tokenizer.from_pretrained(source)
    tokenizer.check_fits(phi3.Phi3Config.from_pretrained(source).vocab_size)
    return source, tokenizer


def open_data(
    config: TrainConfig, tokenizer: phi3.Tokenizer, cache_folder: Path | None = None
) -> tuple[Batches, Batches | None]:
    """The checked data of a run: to learn, and to evaluate on where there is some.

    Args:
      config: of the run.
      tokenizer: of its model.
      cache_folder: where `Batches.save_cache` keeps what was found, for the next call to find.

    Raises:
      ValueError, OSError: with all that is wrong in either.
    """
    data = config.data
    sources = [("train", data.path, config.seed, config.epochs)]
    if data.valid is not None or has_split(data.path, "valid"):
        sources.append(("valid", data.valid or data.path, 0, 1))
    found: list[Batches] = []
    errors: list[ValueError | OSError] = []
    for split, path, seed, epochs in sources:
        try:
            records, cache = open_records(path, split), None
            if cache_folder is not None:
                files = (file.path for file in records.files)
                key = cache_key(files, data, model_folder(config.model))
                cache = DataCache(cache_folder / f"data-{split}.npz", key)
            batches = Batches(
                records,
                tokenizer,
                data,
                config.batch_size,
                config.accumulate,
                seed,
                epochs,
                shuffle=split == "train",
                progress=_reading(path),
                cache=cache,
            )
            found.append(batches)
        except (ValueError, OSError) as error:
            errors.append(error)
    if len(errors) > 1:
        raise ValueError("\n".join(map(str, errors)))
    if errors:
        raise errors[0]
    learnt, *valid = found
    return learnt, valid[0] if valid else None


def _reading(path: str) -> Callable[[int, int], None]:
    """Tells how much of the data is read, where that takes long."""
    last = time.monotonic()

    def progress(read: int, records: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _TELL_EVERY and jax.process_index() == 0:
            last = time.monotonic()
            print(f"{path}: read {read:,} of {records:,} records", flush=True)

    return progress


def _stop_at(step: int, bad: dict[str, float], saved: int | None, checkpoints: Checkpoints) -> None:
    checkpoints.wait()
    what = ", ".join(f"{name} is {value}" for name, value in bad.items())
    if saved is None:
        raise FloatingPointError(
            f"{what} at step {step}, and there is no checkpoint before it; begin anew with a lower "
            "optimizer.learning_rate"
        )
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
        # JAX names a profile by its host, which several processes may share.
        self._folder = folder / "profile" / str(jax.process_index())
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
