"""All weights of Phi-3-mini-4k on one host of H100s.

Hardware: 8 x H100 of 80 GB, one host.
Memory: 20.5 GiB a GPU, by the compiler.
Time: estimated: 100,000 tokens/s. One H100 alone, adafactor, 2 rows, remat "full": 14,300 tokens/s
  and 35 % of the peak, measured (2026-11-22).
Command: phi3-train sft_mini_4k_h100x8 data.path=DATA
"""

from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        folder="runs/sft_mini_4k_h100x8",
        model=ModelConfig(path="microsoft/Phi-3-mini-4k-instruct", remat="attention"),
        data=DataConfig(path="data", sequence_length=4096),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=50, weight_decay=0.1),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=200),
        evaluation=EvaluationConfig(every=200, batches=16),
        epochs=2,
        batch_size=32,
        accumulate=2,
    )
