"""What a release is made of agrees with itself: version, changelog, citation, workflows."""

import re
from pathlib import Path

import pytest

import rlscuda

yaml = pytest.importorskip("yaml", reason="it is in the extra [test]")
ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="needs the source tree")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def jobs(path):
    return yaml.safe_load(text(path))["jobs"]


def steps(path):
    return [step for job in jobs(path).values() for step in job["steps"]]


def test_the_changelog_has_the_version_below_what_is_unreleased():
    headings = re.findall(r"^## (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(rlscuda.__version__)}\] - \d{{4}}-\d\d-\d\d", headings[1])


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load(text("CITATION.cff"))
    released = re.search(r"^## \[[\d.]+\] - (.*)$", text("CHANGELOG.md"), re.MULTILINE)[1]
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"]
    assert cited["version"] == rlscuda.__version__ and str(cited["date-released"]) == released
    assert f'license = "{cited["license"]}"' in text("pyproject.toml")
    for work in (cited, *cited["references"]):
        assert work["title"] and all("name" in a or "family-names" in a for a in work["authors"])
    assert len(cited["references"]) >= 2


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_names_is_there(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["name"] == path.stem and workflow[True]  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        needed = job.get("needs", [])
        assert ({needed} if isinstance(needed, str) else set(needed)) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step.get("uses", "a/b@v1"))
            named = re.findall(r"(?<![\w/])(?:tests|rlscuda|\.ci)/[\w./]+", step.get("run", ""))
            assert all((ROOT / name).is_file() for name in named), named
            cached = step.get("with", {}).get("cache-dependency-path", "setup.py")
            assert (ROOT / cached).is_file()


def test_changes_are_judged_by_the_one_script():
    assert [step["run"] for step in steps(".github/workflows/test.yml") if "run" in step] == [
        "bash .ci/run"
    ]


def test_a_release_builds_every_python_and_publishes_what_was_checked():
    path = ".github/workflows/release.yml"
    found, project = jobs(path), text("pyproject.toml")
    matrix = found["wheels"]["strategy"]["matrix"]
    pythons = re.findall(r"Python :: 3\.(\d+)\"", project)
    assert matrix["python"] == [f"cp3{minor}" for minor in pythons]
    assert matrix["kernels"] == [more["kernels"] for more in matrix["include"]] == ["cpu", "cuda"]
    publish = found["publish"]
    assert set(publish["needs"]) == set(found) - {"publish"}
    assert publish["permissions"] == {"id-token": "write"} and "tags" in publish["if"]
    uploaded = [s["with"]["name"] for s in steps(path) if "upload-artifact" in s.get("uses", "")]
    assert uploaded == ["sdist", "wheel-${{ matrix.kernels }}-${{ matrix.python }}"]
    fetched = [s["with"] for s in publish["steps"] if "download-artifact" in s["uses"]]
    assert [f.get("name", f.get("pattern")) for f in fetched] == ["sdist", "wheel-cuda-*"]
    torches = found["bare"]["strategy"]["matrix"]["torch"]
    assert f"--torch {' '.join(torches)}\n" in text("Makefile")
    assert f"torch>={torches[0].removesuffix('.0')}" in project
    for excluded in ("--exclude 'libtorch*'", "--exclude 'libc10*'"):
        assert excluded in project and excluded in text("Makefile")
