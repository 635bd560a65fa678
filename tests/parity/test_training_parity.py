"""Fifty steps of AdamW, here on packed rows and a mesh, in torch on one document a row."""

import dataclasses

import numpy as np
import pytest
from reference import LONGROPE, config_values

pytest.importorskip("transformers")
import torch
from torch_reference import hf_model
from training import batch_of_rows, documents_in_rows, step_by_step, tiny_run, write_model

from phi3_jax.loss import IGNORED_LABEL
from train.config import LoraConfig, OptimizerConfig

pytestmark = pytest.mark.parity

STEPS = 50
LORA = LoraConfig(rank=3, alpha=7.0, targets=("qkv_proj", "o_proj", "down_proj"), rslora=True)
ADAMW = OptimizerConfig(
    learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=5,
    weight_decay=0.1,
    b2=0.95,
    clip_norm=1.0,
    final_fraction=0.2,
)


def torch_losses(model, rows_of_steps, config) -> list[float]:
    """The mean loss of each step, over the labels of all of its documents."""
    decayed = [p for n, p in model.named_parameters() if p.requires_grad and "norm" not in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}]
        + ([{"params": others, "weight_decay": 0.0}] if others else []),
        lr=config.learning_rate,
        betas=(config.b1, config.b2),
        eps=config.eps,
    )

    def scale(step: int) -> float:
        if step < config.warmup_steps:
            return step / config.warmup_steps
        along = (step - config.warmup_steps) / (STEPS - config.warmup_steps)
        rest = 1 - config.final_fraction
        return config.final_fraction + rest * 0.5 * (1 + np.cos(np.pi * along))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    losses = []
    for rows in rows_of_steps:
        documents = [document for row in rows for document in row]
        labels = sum((learnt[1:] != IGNORED_LABEL).sum() for _, learnt in documents)
        total = 0.0
        for ids, learnt in documents:
            ids, learnt = (torch.from_numpy(x.astype(np.int64))[None] for x in (ids, learnt))
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), learnt[:, 1:].flatten(), reduction="sum"
            ) / int(labels)
            loss.backward()
            total += loss.item()
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return losses


def values(**changes) -> dict:
    return {**config_values("gqa"), "original_max_position_embeddings": 16, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": LONGROPE, "sliding_window": 7},
        {"tie_word_embeddings": True, "num_key_value_heads": 3},
    ],
    ids=["longrope_window", "tied"],
)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 4)], ids=str)
def test_losses_of_full_fine_tuning(changes, mesh, tmp_path):
    weights = write_model(tmp_path / "model", values(**changes))
    rows = [documents_in_rows(step, rows=4, width=40) for step in range(STEPS)]
    run = tiny_run(tmp_path, optimizer=ADAMW, accumulate=mesh[1])
    ours = step_by_step(run, mesh, [batch_of_rows(run, step) for step in rows])
    theirs = torch_losses(hf_model(values(**changes), weights).train(), rows, ADAMW)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert theirs[-1] < 0.9 * theirs[0]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 4)], ids=str)
def test_losses_of_lora(mesh, tmp_path):
    peft = pytest.importorskip("peft")
    changes = {"rope_parameters": LONGROPE}
    weights = write_model(tmp_path / "model", values(**changes))
    settings = peft.LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.alpha,
        target_modules=list(LORA.targets),
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    reference = peft.get_peft_model(hf_model(values(**changes), weights), settings).train()
    reference.save_pretrained(tmp_path / "adapter")
    rows = [documents_in_rows(step, rows=4, width=40) for step in range(STEPS)]
    optimizer = dataclasses.replace(ADAMW, learning_rate=5e-3)
    run = tiny_run(tmp_path, optimizer=optimizer, lora=LORA)
    batches = [batch_of_rows(run, step) for step in rows]
    ours = step_by_step(run, mesh, batches, adapter=tmp_path / "adapter")
    theirs = torch_losses(reference, rows, optimizer)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert np.mean(theirs[-10:]) < 0.97 * np.mean(theirs[:10])
