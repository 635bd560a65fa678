"""LoRA adapters for Phi-3-mini-4k on one accelerator of a notebook.

Hardware: one L4 (24 GB) or TPU v5e chip (16 GB); a T4 (16 GB) with lora.quantize=nf4.
Memory: @MEM@
Time: @TIME@
Command: phi3-train lora_mini_4k_colab data.path=DATA
"""

from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        folder="runs/lora_mini_4k_colab",
        model=ModelConfig(path="microsoft/Phi-3-mini-4k-instruct"),
        data=DataConfig(path="data", sequence_length=2048),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=20),
        lora=LoraConfig(rank=16, alpha=32.0),
        checkpoint=CheckpointConfig(every=50),
        evaluation=EvaluationConfig(every=50, batches=16),
        epochs=1,
        batch_size=8,
        accumulate=8,
    )
