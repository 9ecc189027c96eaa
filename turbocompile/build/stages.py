"""How long each stage of a build takes, and who is told of it."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator

Progress = Callable[[str, float], None]


class Stages:
    """Times the stages of a build and tells whoever watches: progress(stage, 0) at a start, (stage, 1) at an end.

    seconds: what each stage took so far, by its name.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress or (lambda stage, fraction: None)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.progress(name, 0.0)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.progress(name, 1.0)

    def tell(self, name: str, fraction: float) -> None:
        """Says how much of a stage is done; its end is said when it ends."""
        if 0.0 < fraction < 1.0:
            self.progress(name, fraction)


@contextlib.contextmanager
def warnings_collected() -> Iterator[list[str]]:
    """What passes and backends warn of, as text for the report; the list is filled when the body ends."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
