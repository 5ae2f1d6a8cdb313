"""Links of included files: they are written for the file's own place in the repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")
PAGES = {  # what is included, and where
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "csrc/README.md": "internals.md",
    "tests/cuda_on_cpu/README.md": "internals.md",
    "examples/README.md": "examples.md",
    "benchmarks/README.md": "benchmarks/index.md",
}


def mend_links(app, relative_path: Path, parent: str, content: list[str]) -> None:
    """Lets links lead to the page that shows a file, to a download, or nowhere."""
    docs = Path(app.srcdir)

    def mended(link: re.Match) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        file = Path(os.path.normpath(docs / relative_path.parent / target))
        page = PAGES.get(os.path.relpath(file, docs.parent))
        if page:
            return f"[{text}](/{page})"
        outside = file.suffix == ".md" and docs not in file.parents
        if outside or not file.is_file():
            return text
        return f"[{text}](/{os.path.relpath(file, docs)}{anchor})"

    content[0] = LINK.sub(mended, content[0])


def setup(app) -> dict:
    """Connects it."""
    app.connect("include-read", mend_links)
    return {"parallel_read_safe": True}
