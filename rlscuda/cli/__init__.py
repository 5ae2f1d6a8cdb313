"""The command line: ``rlscuda train``, ``rlscuda prune``, ``rlscuda bench``, ``rlscuda info``.

It uses the library and nothing in the library uses it. Its dependencies are the extra ``[cli]``;
``import rlscuda`` alone needs none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from rlscuda.cli.errors import UserError
from rlscuda.cli.extras import require

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 on success, 1 with one line on stderr for a user's error.

    Args:
        argv: the arguments after the program's name; None means those of the process.
    """
    try:
        require("typer", "rich")
        from rlscuda.cli.app import app

        app(args=None if argv is None else list(argv), prog_name="rlscuda")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)
