"""The messages that docs/howto/debugging.md explains are those of the code."""

import ast
import re
from pathlib import Path

import pytest

import rlscuda

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "debugging.md"
MESSAGES = ("`why`", "message", "it begins with", "reason")  # heads of the columns that quote them
HOLE = "…"  # stands for what differs from case to case

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="needs the source tree")


def quoted(text):
    """What the first columns of the tables of messages have in backticks, by row."""
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        inside = line.startswith("|") and (inside or cells[0] in MESSAGES)
        if inside:
            yield from re.findall("`([^`]+)`", cells[0])


def texts():
    """Every string of the package, with holes where values are put in."""
    for path in Path(rlscuda.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", HOLE) for part in node.values]
                yield "".join(part if isinstance(part, str) else HOLE for part in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value.replace("{", HOLE).replace("}", HOLE)  # of str.format


def unknown(text):
    """The messages of a page that the code has not."""
    known = list(texts())
    for message in quoted(text):
        parts = (re.escape(part.strip(" ,;:")) for part in message.split(HOLE))
        pattern = re.compile(".*".join(filter(None, parts)), re.DOTALL)
        if not any(map(pattern.search, known)):
            yield message


def test_every_message_is_one_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert len(list(quoted(page))) > 40
    assert not list(unknown(page))


def test_a_message_that_is_no_longer_there_is_found():
    rows = "| `no RLS rule for …` | |\n| `no layer is … round` | |\n\n| a | `b` |\n"
    assert list(unknown(f"| message | what to do |\n|---|---|\n{rows}")) == ["no layer is … round"]
