"""The embedded model learns a skill that it does not have: to number words.

It starts at 0 of 200 held-out questions answered right (`phi3-train eval`). A part of what it
learns from is what it knows already, so that it does not forget it.

Hardware: any CPU.
Memory: about 1 GB.
Time: 217 s of steps and the compilation, on 2 CPU cores that did other work too (2026-11-22).
Command: phi3-train sft_tiny_cpu
"""

from pathlib import Path

from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        folder="runs/sft_tiny_cpu",
        model=ModelConfig(dtype="float32", remat="none"),
        data=DataConfig(path=str(Path(__file__).parent / "tiny_skill"), sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=20),
        checkpoint=CheckpointConfig(every=100),
        evaluation=EvaluationConfig(
            every=100,
            samples=("Number these words: fox, red, bell.", "What is the capital of France?"),
            sample_tokens=32,
        ),
        steps=300,
        batch_size=16,
    )
