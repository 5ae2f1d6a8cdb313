"""The command line: `rlscuda train`, `prune`, `study`, `bench` and `info`.

It uses the library and nothing in the library uses it. Its dependencies are the extra `[cli]`;
`import rlscuda` alone needs none of them. Arrows run one way: app -> prune -> train -> report and
data -> common, and app -> study -> data -> common.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from rlscuda.cli.common.errors import UserError, line_of
from rlscuda.cli.common.texts import one_line
from rlscuda.optional import optional

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 on success, 1 with one line on stderr for a user's error.

    The environment variable `RLSCUDA_TRACEBACK` shows where that error came from.

    Args:
        argv: The arguments after the program's name; None means those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is shown escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        for package in ("typer", "rich", "jinja2"):
            optional(package, "cli")
        from rlscuda.cli.app import app

        app(args=None if argv is None else list(argv), prog_name="rlscuda")
    except Exception as error:
        line = line_of(error)
        if line is None or os.environ.get("RLSCUDA_TRACEBACK"):
            raise
        print(f"error: {one_line(line)}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)
    sys.exit(0)
