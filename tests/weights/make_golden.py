"""Makes small.json: what transformers on torch says of the small model; needs the extra `parity`.

python tests/weights/make_golden.py
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from published import SLICE  # noqa: E402
from small_models import GOLDEN, NAME, write_small_model  # noqa: E402

from phi3_jax.text.tokenizer import Tokenizer  # noqa: E402

INPUT_IDS = [121, 318, 281, 672, 643, 290, 428, 318, 257, 332]
MESSAGES = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "Can you eat bananas?"},
]
MAX_NEW_TOKENS = 12
STATIC_MORE = 7


@torch.no_grad()
def figures(folder: Path) -> dict:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([INPUT_IDS]), use_cache=False).logits[0][SLICE]
    # The words are ours: this is about the numbers, and tests/parity compares tokenizers.
    tokenizer = Tokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    ids = list(prompt)
    for _ in range(MAX_NEW_TOKENS):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    static_tokens = len(prompt) + STATIC_MORE
    return {
        "input_ids": INPUT_IDS,
        "logits": {"transformers": logits.tolist()},
        "messages": MESSAGES,
        "max_new_tokens": MAX_NEW_TOKENS,
        "text": tokenizer.decode(ids),
        "static_tokens": static_tokens,
        "static_text": tokenizer.decode(ids[:static_tokens]),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        write_small_model(Path(place, NAME))
        models = {NAME: figures(Path(place, NAME))}
    source = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
    text = json.dumps({"source": source, "models": models}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
