"""The pages of the site, with the blocks that need transformers."""

import pytest
from pages import DOCS, blocks, run_page, work_in

pytestmark = pytest.mark.parity

PAGES = {path.name: path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
COMPARING = [
    name for name, text in PAGES.items() if any(one.comment == "parity" for one in blocks(text))
]


@pytest.mark.parametrize("name", COMPARING)
def test_blocks_run_in_order(name, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    work_in(tmp_path, monkeypatch)
    assert "logits differ by" in run_page(PAGES[name], parity=True)
