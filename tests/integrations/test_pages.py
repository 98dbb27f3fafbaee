"""The code on the pages about integrations runs, block after block, in a fresh interpreter."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BEFORE = {
    "causal_conv1d": "",
    "flash_attn": "",
    "mamba_ssm": "",
    "torch": "import torch\n"
    "model, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)\n"
    "query, key, value = torch.randn(3, 2, 4, 5, 8).unbind(0)\n",
}


@pytest.mark.parametrize("page", BEFORE)
def test_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    assert blocks[0].strip().count("\n") <= 3  # the lines a user needs come first
    code = BEFORE[page] + "".join(blocks) + "assert out.isfinite().all()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
