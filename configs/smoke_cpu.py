"""Three steps of the embedded model on the embedded data: does everything run?

Hardware: any CPU.
Memory: less than 1 GB.
Time: half a minute, most of it compilation (2 CPU cores).
Command: phi3-train smoke_cpu
"""

from pathlib import Path

from train.config import DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        folder="runs/smoke_cpu",
        model=ModelConfig(dtype="float32", remat="none"),
        data=DataConfig(path=str(Path(__file__).parent / "tiny_skill"), sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
        evaluation=EvaluationConfig(batches=2, samples=("Who are you?",), sample_tokens=16),
        steps=3,
        batch_size=8,
    )
