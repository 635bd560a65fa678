"""transformers and PEFT load what a run hands over, and compute the same logits."""

import numpy as np
import pytest
from reference import tokens

pytest.importorskip("transformers")
import torch
import transformers
from train_runs import small_run, use_devices, write_chat_model, write_documents

from train.export import export, merged_params, trained_params
from train.loop import train

pytestmark = pytest.mark.parity

IDS = tokens(2, 37)


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS).long(), use_cache=False).logits.numpy()


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("lora", [None, dict(rank=3, alpha=5.0, rslora=True)], ids=["full", "lora"])
def test_the_reference_loads_what_a_run_hands_over(lora, tmp_path, monkeypatch):
    use_devices(monkeypatch)
    write_chat_model(tmp_path / "model", num_key_value_heads=3)
    write_documents(tmp_path / "data")
    train(small_run(tmp_path, lora=lora, optimizer=dict(learning_rate=1e-2)))
    setup, trained = trained_params(tmp_path / "run")
    out = setup.model.apply({"params": merged_params(setup, trained)}, IDS)
    ours = np.asarray(out.logits)
    before = theirs(load(tmp_path / "model"))
    largest = np.abs(ours).max()
    assert np.abs(ours - before).max() > 1e-2 * largest

    export(tmp_path / "run", tmp_path / "out", dtype="float32")
    assert np.abs(ours - theirs(load(tmp_path / "out"))).max() < 1e-4 * largest
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<|endoftext|>"

    if lora is not None:
        peft = pytest.importorskip("peft")
        export(tmp_path / "run", tmp_path / "adapter", adapter=True)
        adapted = peft.PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter")
        assert np.abs(ours - theirs(adapted.eval())).max() < 1e-4 * largest
