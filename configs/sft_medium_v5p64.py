"""All weights of Phi-3-medium-4k (14 billion) on a slice of TPU v5p.

Hardware: v5p-64 (32 chips of 95 GB, topology 2x4x4, 8 hosts).
Memory: 21.9 GiB a chip (of 95), by the compiler.
Time: estimated at 40 % of the peak: 65,000 tokens/s.
Command: phi3-train sft_medium_v5p64 data.path=DATA folder=SHARED/runs/medium (docs/launch.md)
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
        folder="runs/sft_medium_v5p64",
        model=ModelConfig(path="microsoft/Phi-3-medium-4k-instruct", remat="attention"),
        data=DataConfig(path="data", sequence_length=4096),
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=50, weight_decay=0.1),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=200),
        evaluation=EvaluationConfig(every=200, batches=8),
        epochs=2,
        batch_size=64,
        accumulate=1,
    )
