"""What is published of real weights, and how it is compared.

The figures are those of the reference's own test, tests/models/phi3/test_modeling_phi3.py of
transformers, verbatim, from two of its commits: e42e4a43, where the test is of the first form, and
0195d72e, where the logits are others and the texts the same. Pull request 39312 is said to have
changed what was expected; whether the weights on the hub had changed, it does not say. So a folder
may agree with either.

They were made in float32: the test asks for no dtype, which was float32 in these versions, and the
figures have more digits than bfloat16. Its test of the sliding window is left out: it is in
bfloat16 on a GPU, where the kernels decide between near tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import phi3_jax as phi3

# Rows and columns of the logits that are published; and how near the reference asks for.
SLICE = np.s_[:2, :30]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Figures:
    """What is known of one model.

    Attributes:
      input_ids: a row of tokens.
      logits: by the commit that they are from, logits[SLICE] of that row.
      messages: a conversation to answer.
      max_new_tokens: of the answer.
      text: of conversation and answer, greedy, with the special tokens.
      static_tokens: of conversation and answer together, where the cache has a fixed length.
      static_text: the text then.
    """

    input_ids: tuple[int, ...]
    logits: dict[str, np.ndarray]
    messages: list[dict[str, str]]
    max_new_tokens: int
    text: str
    static_tokens: int
    static_text: str


def read_figures(path: Path) -> dict[str, Figures]:
    """The figures of each model in a file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Figures(
            **{
                **figures,
                "logits": {commit: np.array(rows) for commit, rows in figures["logits"].items()},
            }
        )
        for name, figures in values["models"].items()
    }


PUBLISHED = read_figures(Path(__file__).parent / "published.json")


def find_models(folder: Path) -> dict[str, Path]:
    """Which of PUBLISHED a folder is, or holds by name.

    Raises:
      ValueError: where there is none.
    """
    if (folder / "config.json").is_file():
        positions = phi3.Phi3Config.from_pretrained(folder).max_position_embeddings
        name = {4096: "Phi-3-mini-4k-instruct", 131072: "Phi-3-mini-128k-instruct"}.get(positions)
        found = {} if name is None else {name: folder}
    else:
        found = {name: folder / name for name in PUBLISHED if (folder / name).is_dir()}
    if not found:
        raise ValueError(
            f"--weights: {str(folder)!r} neither is nor holds one of {', '.join(PUBLISHED)}"
        )
    return found


def load(folder: Path):
    """(model, params, tokenizer) of a folder, in float32 whatever is stored."""
    return (
        *phi3.from_pretrained(folder, dtype="float32"),
        phi3.Tokenizer.from_pretrained(folder),
    )


def check_logits(model, params, figures: Figures) -> str:
    """The commit whose logits the model computes.

    Raises:
      AssertionError: where it computes none of them; with the largest differences.
    """
    out = model.apply({"params": params}, [list(figures.input_ids)])
    ours = np.asarray(out.logits)[0][SLICE]
    off = {}
    for commit, wanted in figures.logits.items():
        if np.allclose(ours, wanted, rtol=TOLERANCE, atol=TOLERANCE):
            return commit
        off[commit] = float(np.abs(ours - wanted).max())
    raise AssertionError(f"the logits differ from all that were published, by {off}")


def greedy_text(model, params, tokenizer, figures: Figures, static: bool) -> str:
    """The conversation and its greedy answer; `static`: over a cache of fixed length."""
    ids = tokenizer.apply_chat_template(figures.messages, add_generation_prompt=True)
    length = (
        {"max_new_tokens": figures.static_tokens - len(ids), "max_cache_len": figures.static_tokens}
        if static
        else {"max_new_tokens": figures.max_new_tokens}
    )
    result = phi3.generate(model, params, [ids], do_sample=False, **length)
    return tokenizer.decode(np.asarray(result.sequences)[0].tolist())
