"""All weights of Phi-3-mini-128k on rows of 131,072 tokens, each row spread over all devices.

Hardware: v5p-64 (32 chips of 95 GB, topology 2x4x4, 8 hosts).
Memory: 5.1 GiB a chip (of 95), by the compiler.
Time: estimated at 40 % of the peak: 55,000 tokens/s, so 10 seconds a step.
Command: phi3-train sft_mini_128k data.path=DATA folder=SHARED/runs/mini_128k (docs/launch.md)
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
        folder="runs/sft_mini_128k",
        model=ModelConfig(path="microsoft/Phi-3-mini-128k-instruct"),
        data=DataConfig(path="data", sequence_length=131072, long_documents="split"),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=20, weight_decay=0.1),
        # One of the model's 32 heads a device; the tokens of a row and the weights over all 32.
        mesh=MeshConfig(fsdp=1, sequence=-1),
        checkpoint=CheckpointConfig(every=50),
        evaluation=EvaluationConfig(every=50, batches=4),
        epochs=1,
        batch_size=4,
        accumulate=4,
    )
