"""State of the process, which a trace or a model's code may change: it is put back, and other threads keep theirs.

`compiling` is the lock under which this package traces and calls a user's module, because a second thread would put
back the settings that the first one has just made.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_LOCK = threading.RLock()


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """One thread of a process compiles at a time: export sets flags of the whole process while it traces."""
    with _LOCK:
        yield


def _torch_settings() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """(read, write) of what a model's code, or what traces it, may set for the whole process or thread."""
    cudnn, matmul, compiler = torch.backends.cudnn, torch.backends.cuda.matmul, torch.compiler
    pairs: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.is_grad_enabled, torch._C._set_grad_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
        (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
        (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
        (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    ]
    for kind in ("cpu", "cuda"):
        pairs.append(
            (
                functools.partial(torch.is_autocast_enabled, kind),
                functools.partial(torch.set_autocast_enabled, kind),
            )
        )
    flags = [(cudnn, "benchmark"), (cudnn, "deterministic"), (cudnn, "enabled"), (compiler, "_is_compiling_flag"),
             (compiler, "_is_exporting_flag"), (matmul, "allow_bf16_reduced_precision_reduction")]  # fmt: skip
    for holder, name in flags:
        if hasattr(holder, name):
            pairs.append((functools.partial(getattr, holder, name), functools.partial(setattr, holder, name)))
    return pairs


def _random_states() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    pairs: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        pairs.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    if "numpy" in sys.modules:
        numpy: Any = sys.modules["numpy"]
        pairs.append((numpy.random.get_state, numpy.random.set_state))
    return pairs


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Puts back torch's settings, random states and the levels of torch's transforms, however the body ends."""
    from torch._C._functorch import get_dynamic_layer_stack_depth, pop_dynamic_layer_stack_and_undo_to_depth

    settings = [(read(), read, write) for read, write in _torch_settings()]
    states = [(read(), write) for read, write in _random_states()]
    depth = get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        if get_dynamic_layer_stack_depth() > depth:  # what an error inside torch.vmap or torch.func leaves behind
            pop_dynamic_layer_stack_and_undo_to_depth(depth)
        for was, read, write in settings:
            if read() != was:
                write(was)
        for was, write in states:
            write(was)


class _OneThread(type):
    """The type of a class of warnings to which every warning belongs in one thread, and none in others."""

    thread: int | None = None

    def __subclasscheck__(cls, kind: type) -> bool:
        return threading.get_ident() == cls.thread


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences torch in this thread. Export logs and prints the partial graph of a failure, whose reason is enough, and
    warns of its own deprecations.

    Log records, prints and warnings of other threads appear as ever: a user may log there while this one compiles.
    """
    from torch.export import _trace

    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    def print_for_others(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != thread:
            builtins.print(*args, **kwargs)

    class OfThisThread(Warning, metaclass=_OneThread):
        """In this thread every warning is one of these."""

    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    loggers = [logger for logger in loggers if logger.name.partition(".")[0] == "torch"]
    ignored = ("ignore", None, OfThisThread, None, 0)
    OfThisThread.thread = thread
    try:
        for logger in loggers:
            logger.addFilter(of_others)
        vars(_trace)["print"] = print_for_others
        warnings.filters.insert(0, ignored)  # type: ignore[attr-defined]
        yield
    finally:
        OfThisThread.thread = None  # another thread may have copied the filters meanwhile, and put the copy back
        with contextlib.suppress(ValueError):
            warnings.filters.remove(ignored)  # type: ignore[attr-defined]
        vars(_trace).pop("print", None)
        for logger in loggers:
            logger.removeFilter(of_others)
