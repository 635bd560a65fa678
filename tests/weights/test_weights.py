"""Real weights of phi-3-mini against what is published of them (see published.py).

    pytest tests/weights -m weights --weights DIR

DIR is Phi-3-mini-4k-instruct or Phi-3-mini-128k-instruct, as its config.json tells, or holds one or
both of them by these names, in either format. Left out without the option.

3,821,079,552 parameters in float32 are 15.3 GB, which is what a run needs at least; they are read
from a file of half of that. On a GPU set JAX_PLATFORMS=cuda: tests compute on the CPU otherwise.
"""

from pathlib import Path

import pytest
from published import PUBLISHED, check_logits, find_models, greedy_text, load

pytestmark = [pytest.mark.weights, pytest.mark.usefixtures("optimized")]


@pytest.fixture(scope="module", params=PUBLISHED)
def loaded(request):
    """(model, params, tokenizer, figures); one model is in memory at a time."""
    given = request.config.getoption("--weights")
    if given is None:
        pytest.skip("compares real weights: --weights=DIR")
    models = find_models(Path(given).expanduser())
    if request.param not in models:
        pytest.skip(f"{given} does not have it")
    return *load(models[request.param]), PUBLISHED[request.param]


def test_logits(loaded, record_property):
    model, params, _, figures = loaded
    record_property("published", check_logits(model, params, figures))


def test_generation(loaded):
    assert greedy_text(*loaded, static=False) == loaded[-1].text


def test_generation_over_a_static_cache(loaded):
    assert greedy_text(*loaded, static=True) == loaded[-1].static_text
