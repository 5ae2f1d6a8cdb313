"""The tutorial on relief runs as it is written."""

import re
from pathlib import Path

import pytest
import torch

TEXT = Path(__file__).resolve().parents[3] / "docs" / "tutorials" / "relief.md"
pytestmark = pytest.mark.skipif(not TEXT.is_file(), reason="needs the source tree")


def test_its_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(TEXT), "exec"), names)
    assert len(blocks) == 5 and "of the connections are left" in capsys.readouterr().out
    model, report = names["model"], names["report"]
    assert report.left < 0.3 and names["removed"] and model[4].out_features < 40
    accuracy = (model(names["x"][500:]).argmax(1) == names["y"][500:]).double().mean()
    assert accuracy > 0.4 and all(torch.isfinite(p).all() for p in model.parameters())
