"""A run that is killed or told to stop, again and again, ends as one that never was."""

import functools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from train_runs import (
    Forks,
    assert_equal_bits,
    leaves_of,
    recorded,
    saved_steps,
    small_run,
    write_chat_model,
    write_documents,
)

import phi3_jax as phi3
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.preemption import PREEMPTED_STATUS
from train.run_folder import CHECKPOINTS
from train.state import Setup

STEPS, DEVICES = 11, 2
# Dropout draws from the run's rng, and the moving average is a second copy of the weights. Saves
# and evaluations fall on the same steps and on others.
SETTINGS = dict(
    steps=STEPS,
    accumulate=2,
    mesh=dict(fsdp=DEVICES),
    evaluation=dict(every=3),
    checkpoint=dict(every=1, keep=2, keep_every=5),
)
KINDS = {
    "full": dict(optimizer=dict(ema_decay=0.8, schedule="cosine", warmup_steps=3)),
    "lora": dict(lora=dict(rank=3, dropout=0.2), optimizer=dict(name="lion", ema_decay=0.8)),
}
KEPT = [5, 10, 11]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    parent = tmp_path_factory.mktemp("runs")
    write_chat_model(parent / "model", resid_pdrop=0.1, attention_dropout=0.1, embd_pdrop=0.1)
    write_documents(parent / "data")
    return functools.cache(functools.partial(Story, parent))


class Story:
    """One kind of run: what it is when nobody stops it, and chains of attempts to be like it."""

    def __init__(self, place: Path, kind: str):
        self.place, self.kind = place, kind
        self.forks = Forks(place / "log", DEVICES)
        mesh = phi3.make_mesh(fsdp=DEVICES, tensor=1, devices=jax.devices()[:DEVICES])
        self.setup = Setup(self.config("abstract"), mesh, STEPS)
        self.finish(self.config("warm"))  # fills the cache of compiled programs
        begun = time.perf_counter()
        config = self.config("undisturbed")
        self.finish(config)
        self.span = time.perf_counter() - begun
        self.expected = self.result(config)
        kinds = [line["kind"] for line in self.expected[0]]
        assert kinds.count("train") == STEPS and kinds.count("valid") == 4

    def config(self, name: str) -> TrainConfig:
        return small_run(self.place, f"{self.kind}-{name}", **SETTINGS, **KINDS[self.kind])

    def finish(self, config: TrainConfig) -> None:
        process = self.forks.start(config)
        process.join()
        assert process.exitcode == 0, self.forks.log.read_text()[-3000:]

    def result(self, config: TrainConfig):
        """What was measured, and all that the last checkpoint holds."""
        assert saved_steps(config.folder) == KEPT
        checkpoints = Checkpoints(Path(config.folder) / CHECKPOINTS)
        state = checkpoints.load(STEPS, self.setup.abstract_state)
        checkpoints.close()
        return recorded(config.folder), leaves_of(state)

    def disturb(
        self, number: signal.Signals, count: int, seed: int, check: Callable[[int, list], None]
    ) -> int:
        """Sends signals at random moments, to one run until it ends, then to the next one.

        Returns how many came during a save.
        """
        rng = random.Random(f"{number.name} {self.kind} {seed}")
        hits, chain, moments = 0, 0, []
        config = self.config(f"{number.name}-0")
        while len(moments) < count:
            process = self.forks.start(config)
            begun = time.perf_counter()
            if rng.random() < 1 / 3:  # any moment from the start of the process to its end
                until = begun + rng.random() * self.span
                while process.is_alive() and time.perf_counter() < until:
                    time.sleep(0.002)
            else:  # about the save of one of the next steps
                for _ in range(rng.randint(1, 4)):
                    wait_for_save(process, config)
                time.sleep(rng.random() * 0.02)
            {signal.SIGKILL: process.kill, signal.SIGTERM: process.terminate}[number]()
            in_save = bool(unfinished(config))
            process.join()
            check(process.exitcode, config)
            if process.exitcode == 0:  # it was faster
                self.compare(config)
                chain += 1
                config = self.config(f"{number.name}-{chain}")
            else:
                hits += in_save
                moments.append((chain, process.exitcode, len(recorded(config.folder))))
        print(f"{self.kind}: {count} {number.name}, {hits} during a save; {moments}")
        self.finish(config)
        self.compare(config)
        return hits

    def compare(self, config: TrainConfig) -> None:
        metrics, leaves = self.result(config)
        assert metrics == self.expected[0]
        assert_equal_bits(leaves, self.expected[1])


def unfinished(config: TrainConfig) -> set[str]:
    """The saves that have begun and not ended."""
    return {path.name for path in Path(config.folder, CHECKPOINTS).glob("*orbax-checkpoint-tmp*")}


def wait_for_save(process, config: TrainConfig) -> None:
    before = unfinished(config)
    while process.is_alive() and not unfinished(config) - before:
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("full", 20), ("lora", 10)])
def test_killed_at_random_moments(story, kind, count, pytestconfig):
    def check(status, config):
        assert status in (0, -signal.SIGKILL)

    few = count if pytestconfig.option.long else count // 2
    assert story(kind).disturb(signal.SIGKILL, few, 1, check)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_told_to_stop_at_random_moments(story, kind, pytestconfig):
    seen = []

    def check(status, config):
        seen.append(status)
        # Before its first step it has nothing to save, and ends as any program does.
        assert status in (0, PREEMPTED_STATUS, -signal.SIGTERM)
        if status == PREEMPTED_STATUS:
            assert not unfinished(config)
            steps = [line["step"] for line in recorded(config.folder)]
            assert saved_steps(config.folder)[-1:] == steps[-1:]  # none before the first

    story(kind).disturb(signal.SIGTERM, 5 if pytestconfig.option.long else 3, 2, check)
    assert PREEMPTED_STATUS in seen
