"""LoRA adapters for Phi-3-mini-4k on one accelerator of a notebook.

Hardware: one L4 (24 GB) or TPU v5e chip (16 GB); a T4 (16 GB) with lora.quantize=nf4.
Memory: 11.4 GiB on a v5e chip (of 15.75), by its compiler. On a GPU, by the compiler for an H100:
  8.5 GiB with cuDNN's attention, 4.5 GiB with lora.quantize=nf4 and XLA's. No L4 or T4 was tried;
  a T4 has neither cuDNN's attention nor units for bfloat16, and will be slow.
Time: estimated at 30 % of the peak: a million tokens in 4 minutes on a v5e chip, 7 on an L4.
  Measured on an H100, 4 rows of 4096 at once: 17,400 tokens/s, 29 % (2026-11-22).
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
