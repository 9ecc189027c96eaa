"""The errors that turbocompile raises on purpose. Each message is one sentence: what is wrong, where, what to do."""


class TurbocompileError(Exception):
    """Base of all errors raised on purpose; the CLI prints its message alone, without a traceback."""


class RecipeError(TurbocompileError):
    """The recipe, or an option on the command line, is not usable as written."""


class CaptureError(TurbocompileError):
    """The model cannot be captured as a graph, or a call does not fit the captured graph."""


class EngineError(TurbocompileError):
    """An engine folder or a checkpoint is damaged, hostile, newer than this version, or lacks a part that is needed."""


class UnsupportedError(TurbocompileError):
    """The request is valid, but this machine, this backend or this installation cannot do it."""


class VerificationError(TurbocompileError):
    """A rewrite changed the numbers by more than its kind allows."""


def brief(error: BaseException) -> str:
    """An error of another library in a few words: its class and the first line of its message."""
    line = next(iter(str(error).strip().splitlines()), "")[:200].rstrip()
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
