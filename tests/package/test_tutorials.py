"""Every tutorial runs as it stands, from its first line to its last, and so do pages with code."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
STREAMING = FOLDER.parent / "streaming.md"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the source tree")


def code(path):
    """The code of a text, each block on the lines on which it stands."""
    lines, inside = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = re.fullmatch(r"```(python)?", line)
        lines.append("" if fence or not inside else line)
        inside = bool(fence and fence[1]) or (inside and not fence)
    return "\n".join(lines)


@pytest.mark.parametrize(
    "path", [*sorted(FOLDER.glob("*.md")), STREAMING], ids=lambda path: path.stem
)
def test_a_tutorial_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code(path), str(path), "exec"), {"__name__": "tutorial"})
