"""The pages: their code runs, their tables are those of the results, the reference is complete.

Code in ```` ```python ```` runs, from the first line of its page to the last. What is shown and not
run is in ```` ```{code-block} python ````. The scripts of docs/tutorials are run by `make docs`.
"""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import rlscuda

DOCS = Path(__file__).resolve().parents[2] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")
PAGES = {
    str(path.relative_to(DOCS)): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
    if not path.relative_to(DOCS).parts[0].startswith(("_", "auto_"))
}
README = DOCS.parent / "README.md"
PAGES["README.md"] = README.read_text(encoding="utf-8") if README.is_file() else ""
FENCE = re.compile(r"( *)```(python)?")


def code(text):
    """The code of a page, each block on the lines on which it stands."""
    lines, indent = [], None
    for line in text.splitlines():
        fence = FENCE.fullmatch(line)
        lines.append("" if fence or indent is None else line[indent:])
        if fence:
            indent = len(fence[1]) if fence[2] else None
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if code(text).strip()])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dtype = torch.get_default_dtype()  # a page may change it, and fail before it changes it back
    try:
        exec(compile(code(PAGES[page]), page, "exec"), {"__name__": "page"})
    finally:
        torch.set_default_dtype(dtype)


def test_the_readme_is_a_screen_and_a_half_whose_links_lead_somewhere():
    lines = PAGES["README.md"].splitlines()
    assert 50 < len(lines) <= 130
    links = re.findall(r"\]\(([^)#]+)", PAGES["README.md"])
    assert len(links) > 10
    assert [link for link in links if not (README.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_code_has_one_spelling(page):
    other = re.findall(r"^ *(?:```+|~~~+) *(?:py|python\d|pycon|python +\S.*)$", PAGES[page], re.M)
    assert not other, "```python is run, ```{code-block} python is not"


def test_code_is_found_where_it_stands():
    page = "A\n\n```python\na = 1\n```\n\n1. B\n\n   ```python\n   if a:\n       a = 2\n   ```\n"
    shown = "```{code-block} python\nnot run\n```\n\n```text\nnor this\n```\n"
    assert code(page + shown).splitlines()[3] == "a = 1"
    assert code(page + shown).splitlines()[9:11] == ["if a:", "    a = 2"]
    assert not code(shown).strip()


def test_tables_are_those_of_the_results():
    tables = pytest.importorskip("benchmarks.tables")
    shown = set()
    for path in tables.pages():
        text = path.read_text(encoding="utf-8")
        shown |= {found[1] for found in tables.MARKED.findall(text)}
        stale = tables.filled(text, tables.RESULTS) != text
        assert not stale, f"{path.name}: python -m benchmarks.tables --pages"
    assert shown >= set(tables.measured(tables.RESULTS))


def documented():
    """The names that docs/api describes."""
    for path in DOCS.glob("api/*.rst"):
        module = ""
        for kind, name in re.findall(r"^\.\. ([\w:]+):: (\S+)", path.read_text(), re.M):
            if kind in ("currentmodule", "py:currentmodule"):
                module = f"{name}."
            elif kind.removeprefix("py:") in ("autoclass", "autofunction", "data"):
                yield name if name.startswith("rlscuda.") else module + name


def test_every_public_name_is_in_the_reference():
    names = [one.name for one in pkgutil.iter_modules(rlscuda.__path__) if one.name[0] != "_"]
    modules = [rlscuda, *(importlib.import_module(f"rlscuda.{name}") for name in names)]
    public = {
        f"{module.__name__}.{name}"
        for module in modules
        for name in getattr(module, "__all__", ())
        if module.__name__ != "rlscuda.cli"
    }
    assert {"rlscuda.RLSOptimizer", "rlscuda.pruning.RLSPruner"} <= public
    assert public <= set(documented())


def commands(command, words=()):
    if not hasattr(command, "commands"):
        return [" ".join(words)]
    return [c for name, one in command.commands.items() for c in commands(one, (*words, name))]


def test_every_command_is_in_the_reference():
    typer = pytest.importorskip("typer", reason="it is in the extra [cli]")
    app = importlib.import_module("rlscuda.cli.app").app
    shown = re.findall(r"^```\{command-help\} (.+)$", PAGES["api/cli.md"], re.M)
    assert sorted(shown) == sorted(commands(typer.main.get_command(app)))
