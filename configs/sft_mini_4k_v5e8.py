"""All weights of Phi-3-mini-4k on one host of TPU v5e.

Hardware: v5litepod-8 (8 chips of 16 GB, one host).
Memory: 10.6 GiB a chip (of 15.75), by the compiler (phi3-plan).
Time: estimated at 40 % of the peak: 25,000 tokens/s.
Command: phi3-train sft_mini_4k_v5e8 data.path=DATA
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
        folder="runs/sft_mini_4k_v5e8",
        model=ModelConfig(path="microsoft/Phi-3-mini-4k-instruct"),
        data=DataConfig(path="data", sequence_length=4096),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=50, weight_decay=0.1),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=200),
        evaluation=EvaluationConfig(every=200, batches=16),
        epochs=2,
        batch_size=32,
        accumulate=4,
    )
