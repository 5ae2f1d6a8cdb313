"""The command line: ``rlscuda train``, ``rlscuda prune``, ``rlscuda bench``, ``rlscuda info``.

It uses the library and nothing in the library uses it. Its dependencies are the extra ``[cli]``;
``import rlscuda`` alone needs none of them.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from rlscuda.cli.errors import UserError, line_of
from rlscuda.cli.extras import require
from rlscuda.cli.texts import one_line

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 on success, 1 with one line on stderr for a user's error.

    The environment variable ``RLSCUDA_TRACEBACK`` shows where that error came from.

    Args:
        argv: the arguments after the program's name; None means those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is shown escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        require("typer", "rich")
        from rlscuda.cli.app import app

        app(args=None if argv is None else list(argv), prog_name="rlscuda")
    except Exception as error:
        line = line_of(error)
        if line is None or os.environ.get("RLSCUDA_TRACEBACK"):
            raise
        print(f"error: {one_line(line)}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)
    sys.exit(0)
