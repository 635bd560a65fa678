"""Makes the golden files from transformers running on torch; needs the extra `parity`.

    python tests/golden/make_golden.py

What is compared with what stands in tests/test_golden.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm, Phi3RotaryEmbedding

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from reference import (  # noqa: E402
    CASES,
    LENGTHS,
    PROMPT_LENGTHS,
    config_values,
    hf_weights,
    prompts,
    tokens,
)
from torch_reference import as_torch, both, hf_model, run  # noqa: E402

from phi3_jax.config import Phi3Config  # noqa: E402

NEW_TOKENS = 40


@torch.no_grad()
def greedy_without_cache(model, row: np.ndarray, count: int) -> list[int]:
    """The oracle: every token from a whole forward of the row alone."""
    ids = row.tolist()
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(row) :]


def model_golden() -> dict[str, np.ndarray]:
    arrays = {}
    for case in CASES:
        values = config_values(case)
        model = hf_model(values, hf_weights(Phi3Config(**values), case))
        for length in LENGTHS:
            ids = torch.from_numpy(tokens(2, length)).long()
            with torch.no_grad():
                out = model(ids, labels=ids if length > 1 else None)
            arrays[f"{case}/logits/{length}"] = out.logits.numpy()
            if length > 1:
                arrays[f"{case}/loss/{length}"] = out.loss.numpy()
        rows = [greedy_without_cache(model, row, NEW_TOKENS) for row in prompts(PROMPT_LENGTHS)]
        arrays[f"{case}/greedy"] = np.array(rows, np.int32)
    return arrays


def parts_golden() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    bits = lambda x: x.view(torch.int16).numpy().view(np.uint16)  # noqa: E731
    norm = Phi3RMSNorm(100, eps=1e-5).to(torch.bfloat16)
    weight = torch.from_numpy(rng.normal(1, 0.5, 100).astype(np.float32)).to(torch.bfloat16)
    norm.weight.data = weight
    x = torch.from_numpy(rng.normal(0, 3, (100, 100)).astype(np.float32)).to(torch.bfloat16)
    small = torch.from_numpy(rng.normal(0, 1e-3, (5, 100)).astype(np.float32))
    with torch.no_grad():
        arrays = {"norm/x": bits(x), "norm/weight": bits(weight), "norm/out": bits(norm(x))}
        norm32 = Phi3RMSNorm(100, eps=1e-5)
        arrays |= {"norm/small": small.numpy(), "norm/small_out": norm32(small).numpy()}

    config = transformers.Phi3Config(**config_values("longrope"))
    rope = Phi3RotaryEmbedding(config)
    for name, length, dtype in (
        ("short", 16, torch.float32), ("long", 500, torch.float32), ("bf16", 500, torch.bfloat16)
    ):  # fmt: skip
        cos, sin = rope(torch.zeros(1, dtype=dtype), torch.arange(length)[None])
        half = cos.shape[-1] // 2
        as_array = bits if dtype == torch.bfloat16 else torch.Tensor.numpy
        arrays[f"rope/{name}/cos"] = as_array(cos[0, :, :half].contiguous())
        arrays[f"rope/{name}/sin"] = as_array(sin[0, :, :half].contiguous())

    logits = rng.normal(0, 2, (6, 50)).astype(np.float32)
    logits[0, :5] = logits[0].max() + 1  # ties at the top
    logits[1] = 0.0  # nothing but ties
    logits[2, 7] = 60.0  # one certain token
    arrays["warp/logits"] = logits
    for name, warpers in {
        "top_k=3": [TopKLogitsWarper(3)],
        "top_k=80": [TopKLogitsWarper(80)],
        "top_p=0.5": [TopPLogitsWarper(0.5)],
        "top_p=0": [TopPLogitsWarper(0.0)],
        "min_p=0.2": [MinPLogitsWarper(0.2)],
        "min_p=1": [MinPLogitsWarper(1.0)],
        "temperature=0.7,top_k=20,top_p=0.9,min_p=0.05": [
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ],
    }.items():
        out = LogitsProcessorList(warpers)(torch.zeros(6, 1).long(), torch.from_numpy(logits))
        arrays[f"warp/{name}"] = out.numpy()

    ids = torch.from_numpy(rng.integers(0, 50, (6, 9)))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[3, :1] = 0, 0
    ids[1, 3:6] = ids[1, 2]  # an id many times over
    pads = (mask != 0).int().argmax(dim=1)
    penalty = RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=pads)
    arrays["penalty/ids"], arrays["penalty/mask"] = ids.numpy(), mask.numpy()
    arrays["penalty/1.3"] = penalty(ids, torch.from_numpy(logits)).numpy()
    return arrays


def calls_golden() -> dict[str, np.ndarray]:
    """Other inputs, outputs and heads; with each, by the names of the arguments, what came in."""
    arrays = {}

    def record(name, model, asked: dict, **more):
        arrays.update({f"{name}/in/{key}": value for key, value in asked.items()})
        out = run(model, **asked, **more)
        arrays[f"{name}/out/logits"] = out.logits.numpy()
        if out.loss is not None:
            arrays[f"{name}/out/loss"] = out.loss.numpy()
        return out

    rng = np.random.default_rng(0)
    model, _, _ = both(config_values("mha_window"), name="mha_window")
    packed = [[*range(6), *range(3), *range(9)], [*range(1), *range(14), *range(3)]]
    asked = {"input_ids": tokens(2, 18), "position_ids": np.array(packed, np.int32)}
    record("packed", model, asked)

    model, _, _ = both(config_values("longrope"), name="longrope")
    short, long = tokens(1, 5), tokens(1, 17)
    alone = [run(model, ids).logits.numpy() for ids in (short, long)]
    arrays["documents/in/input_ids"] = np.concatenate([short, long], axis=1)
    arrays["documents/in/segment_ids"] = np.repeat([2, 1], [5, 17])[None].astype(np.int32)
    arrays["documents/out/logits"] = np.concatenate(alone, axis=1)
    asked = {"input_ids": tokens(2, 6)}
    out = record("outputs", model, asked, output_hidden_states=True, output_attentions=True)
    arrays["outputs/out/hidden_states"] = torch.stack(out.hidden_states).numpy()
    arrays["outputs/out/attentions"] = torch.stack(out.attentions).numpy()

    model, _, _ = both(config_values("gqa"), name="gqa")
    keep = (rng.random((2, 6, 9, 9)) < 0.5) | np.eye(9, dtype=bool)
    additive = np.where(keep, 0, np.finfo(np.float32).min).astype(np.float32)
    record("mask", model, {"input_ids": tokens(2, 9), "attention_mask": additive})

    ids = tokens(3, 18)
    ids[0, 11:], ids[1, :4], ids[2, 5] = 0, 0, 0
    values = {**config_values("longrope_window"), "num_labels": 3}
    for problem, labels in {
        "regression": rng.normal(size=(3, 3)).astype(np.float32),
        "single_label_classification": np.array([2, -100, 1], np.int32),
        "multi_label_classification": rng.integers(0, 2, (3, 3)).astype(np.float32),
    }.items():
        name, values["problem_type"] = "Phi3ForSequenceClassification", problem
        model, _, _ = both(values, name, "longrope_window")
        record(f"{name}/{problem}", model, {"input_ids": ids, "labels": labels})
    name = "Phi3ForTokenClassification"
    model, _, _ = both(values, name, "longrope_window")
    record(name, model, {"input_ids": ids, "labels": np.where(ids % 4 == 3, -100, ids % 4)})

    for case in ("gqa", "mqa_tied_window1"):
        model, _, _ = both(config_values(case), name=case)
        ids = tokens(3, 9)
        ids[0, 6:], ids[1, 1] = 0, 0
        labels = ids.copy()
        labels[0, 6:] = -100
        arrays[f"gradients/{case}/in/input_ids"] = ids
        arrays[f"gradients/{case}/in/labels"] = labels
        model(as_torch(ids), labels=as_torch(labels), use_cache=False).loss.backward()
        for weight_name, weight in model.named_parameters():
            # A few rows of each leaf, padding's among them.
            if "layers" not in weight_name or "layers.1." in weight_name:
                arrays[f"gradients/{case}/out/{weight_name}"] = weight.grad.numpy()[::7]
    return arrays


def main() -> None:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    for name, make in (("model", model_golden), ("parts", parts_golden), ("calls", calls_golden)):
        arrays = make() | {"versions": np.array(json.dumps(versions))}
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
        print(name, len(arrays), (HERE / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
