"""A machine made of this host's CPU devices, small models, and figures that nobody computed."""

from typing import Any

import jax
import pytest

import phi3_jax as phi3
from plan.estimate import Estimate
from plan.figures import Figures, Traffic
from plan.machines import Chip, Machine

SMALL: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    original_max_position_embeddings=512,
    sliding_window=23,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CHIP = Chip("slow chip", 2**20, 1e12, 1e11, 1e10, 1e9, None)


@pytest.fixture(scope="session")
def cpu_machine():
    """A function (devices, hbm_bytes) -> Machine of that many devices of the CPU."""

    def make(devices: int = 4, hbm_bytes: int = 2**24) -> Machine:
        chip = Chip("slow chip", hbm_bytes, 1e12, 1e11, 1e10, 1e9, None)
        return Machine(f"cpu:{devices}", 1, chip, jax.devices()[:devices])

    return make


@pytest.fixture(scope="session")
def small():
    """A function (**changes) -> the config of a small model."""

    def make(**changes: Any) -> phi3.Phi3Config:
        return phi3.Phi3Config(**{**SMALL, **changes})

    return make


@pytest.fixture
def figures():
    """A function (**changes) -> Figures."""

    def make(**changes: Any) -> Figures:
        values = dict(
            job="train page",
            kind="train",
            settings="32 rows of 4,096 tokens in 4 parts, remat=full, adamw",
            machine="v5e:2x4",
            chip=CHIP,
            devices=8,
            mesh={"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2},
            fits=True,
            peak_bytes=768 * 2**10,
            limit_bytes=2**20,
            memory={"params": 300 * 2**10, "padding": 0, "temporaries": 468 * 2**10},
            tokens=131_072,
            model_flops=8e13,
            compile_s=41.0,
            versions={"jax": "0.10.2"},
            flops=1.5e13,
            kernel_flops=2.5e12,
            hbm_bytes=7.5e11,
            collectives=(Traffic("all-gather", "ici", 1032, 772, 596 * 10**8, 521 * 10**8),),
            estimate=Estimate(15.0, 7.5, 5.21, 25.0, "compute"),
            seconds=25.0,
            tokens_per_s=5242.88,
            tokens_per_s_device=655.36,
            mfu=0.4,
        )
        return Figures(**{**values, **changes})

    return make
