"""Ctrl-C, put off until what must not be cut in two has ended."""

from __future__ import annotations

import threading

# What `signal` wraps: its conversions to enumerations take longer than the kernels of a small step.
from _signal import getsignal, signal
from signal import SIGINT, default_int_handler

_NUMBER = int(SIGINT)


class uninterrupted:  # noqa: N801  (a context manager, read as a word)
    """Raises the `KeyboardInterrupt` of a signal only when the block has ended.

    Python runs signal handlers in the main thread alone; a handler that is not Python's own decides
    for itself.
    """

    def __enter__(self) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        self._ours = in_main and getsignal(_NUMBER) is default_int_handler
        self._received = False
        if self._ours:
            signal(_NUMBER, self._receive)

    def _receive(self, number, frame) -> None:
        self._received = True

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal(_NUMBER, default_int_handler)
            if self._received:
                raise KeyboardInterrupt
