"""Threads take turns on one engine: its calls run side by side, and a change of its weights runs alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Lets any number of calls in at once, or one change.

    A change (a move to another device) waits until the calls that are under way have returned. Calls
    that arrive meanwhile wait for the change, so that steady callers cannot keep it waiting. A call must not start a
    change of the same engine: it would wait for itself.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls = 0
        self._changing = False

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Runs the body beside other calls, and never beside a change."""
        with self._condition:
            self._condition.wait_for(lambda: not self._changing)
            self._calls += 1
        try:
            yield
        finally:
            with self._condition:
                self._calls -= 1
                if not self._calls:
                    self._condition.notify_all()

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Runs the body alone."""
        with self._condition:
            self._condition.wait_for(lambda: not self._changing)
            self._changing = True
            try:
                self._condition.wait_for(lambda: not self._calls)
            except BaseException:  # an interrupt while the change waited
                self._changing = False
                self._condition.notify_all()
                raise
        try:
            yield
        finally:
            with self._condition:
                self._changing = False
                self._condition.notify_all()
