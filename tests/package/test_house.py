"""The shape of the house: arrows one way, small folders, short files, private names in one place.

The kernels in csrc are found by their stems, as csrc/README.md says; they have no such bounds.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rlscuda
from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner

PACKAGE = Path(rlscuda.__file__).parent
ROOT = PACKAGE.parent
MOST_FILES, MOST_LINES, MOST_FILES_OF_A_STEP = 12, 400, 41
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def modules(top=PACKAGE):
    """Module name -> its syntax tree."""
    found = {}
    for path in sorted(top.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def imports(tree, known):
    """The modules that one imports anywhere: at its top, in functions, for type hints."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in (a for a in node.names if a.name != "_C"):
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def circle(graph):
    """Some nodes that lead to one another, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :] + [node]
        if node in done:
            return None
        path.append(node)
        found = next((c for other in sorted(graph.get(node, ())) if (c := visit(other))), None)
        path.pop()
        done.add(node)
        return found

    return next((c for node in sorted(graph) if (c := visit(node))), None)


def arrows():
    trees = modules()
    return {name: set(imports(tree, trees)) - {name} for name, tree in trees.items()}


def test_no_module_imports_itself_in_a_circle():
    assert circle(arrows()) is None


def test_arrows_between_folders_run_one_way():
    packages = {p.parent.relative_to(ROOT) for p in PACKAGE.rglob("__init__.py")}
    chapters = {".".join(p.parts) for p in packages} - {"rlscuda", "rlscuda.pruning", "rlscuda.cli"}

    def chapter(name):
        parents = [name, *(name.rsplit(".", k)[0] for k in range(1, name.count(".") + 1))]
        return next((parent for parent in parents if parent in chapters), name)

    graph = {}
    for name, others in arrows().items():
        graph.setdefault(chapter(name), set()).update(map(chapter, others))
    assert circle({name: others - {name} for name, others in graph.items()}) is None


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


TOPS = [
    top for top in ("rlscuda", "tests", "benchmarks") if (ROOT / top).is_dir()
]  # in an sdist two


@pytest.mark.parametrize("top", TOPS)
def test_folders_and_files_are_small(top):
    for folder in (ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())):
        if {"__pycache__", "results"} & set(folder.relative_to(ROOT).parts):
            continue
        files = [p for p in folder.iterdir() if p.is_file() and p.suffix not in {".so", ".pyc"}]
        assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files"
        for path in files:
            lines = path.read_text().count("\n")
            assert lines <= MOST_LINES, f"{path} has {lines} lines"


def test_scripts_run_files_that_exist():
    scripts = [ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "benchmarks" / "gpu_check.sh"]
    scripts += [ROOT / "tests" / "package" / "wheel_check.py", *(ROOT / ".github").rglob("*.yml")]
    scripts += (ROOT / "tests" / "cuda_on_cpu").glob("*.py")
    text = "\n".join(script.read_text() for script in scripts)
    named = set(re.findall(r"tests/[\w/.]*\w", text))
    assert len(named) > 20 and not [path for path in named if not (ROOT / path).exists()]


def test_every_folder_says_what_lives_there():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} says nothing"


def foreign(tree, own):
    """The private names in a module that are not ours."""
    theirs = {name for kind in (nn.Module(), torch.empty(0), torch) for name in dir(kind)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = [] if getattr(node.value, "id", "") in ("self", "cls") else [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("rlscuda"):
            parts = (node.module or "").split(".")
        else:
            continue
        private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
        yield from (part for part in private if part in theirs or part not in own)


def test_what_is_private_to_others_is_named_in_one_file():
    trees = modules()
    del trees["rlscuda._torch"]
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    own = {node.name for node in nodes if hasattr(node, "name")}
    own |= {node.id for node in nodes if isinstance(node, ast.Name)}
    own |= {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
        if isinstance(node.ctx, ast.Store) or getattr(node.value, "id", "") in ("self", "cls")
    }  # fmt: skip
    own |= {"_C", "_signal", "_getframe"}  # of our extension and of Python
    found = {name: sorted(set(foreign(tree, own))) for name, tree in trees.items()}
    assert not {name: names for name, names in found.items() if names}
    planted = "module._parameters; new._backward_hooks = 1; from torch.utils import _pytree"
    assert list(foreign(ast.parse(planted), own)) == ["_parameters", "_backward_hooks"]


def test_the_way_of_one_pruning_step_is_short():
    """From the optimizer's own matrices; a loader adds calibration and batch norms."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip
    optimizer, x = RLSOptimizer(model), torch.randn(8, 1, 12, 12)
    model(x).square().mean().backward()
    optimizer.step()
    pruner = RLSPruner(model, optimizer, x[:2], ratio=0.5)
    files = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            files.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        pruner.step()
    finally:
        sys.setprofile(None)
    assert 10 < len(files) <= MOST_FILES_OF_A_STEP, sorted(files)
