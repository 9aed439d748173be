"""Ctrl-C and the system's request to end, answered when it suits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether somebody wants the run to end."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def end(self) -> NoReturn:
        """End the run as the signal asks, or as if the system asked where another rank was.

        Raises:
            KeyboardInterrupt: Somebody pressed Ctrl-C.
            SystemExit: The system asked, as clusters do before they take a machine away.
        """
        if self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal or signal.SIGTERM))


@contextmanager
def interruptions(insistent: bool = True) -> Iterator[Interruption]:
    """Take note of a request to end, for the run to act on.

    Args:
        insistent: Whether a second request ends at once. One of several processes gets the same
            request from who ends them all and from the process that launched it.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # signals reach the main thread alone
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def take_note(number: int, frame: FrameType | None) -> None:
        interruption.signal = signal.Signals(number)
        if insistent:
            restore()

    for number in SIGNALS:
        signal.signal(number, take_note)
    try:
        yield interruption
    finally:
        restore()
