"""The group of all commands, how errors become sentences and exit codes, and what commands share."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from safetensors import SafetensorError

from turbocompile.errors import TurbocompileError, UnsupportedError, VerificationError
from turbocompile.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

    from turbocompile.report.report import Report

# torchao logs a note if it is imported under a torch that it was not built for.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")

# Errors that a path given by the user causes. A full disk is not among them, because the user did not cause it.
USER_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTEMPTY, errno.EXDEV,
)  # fmt: skip

SEED = click.IntRange(0, 2**63 - 1)


class _Group(click.Group):
    """Turns errors that are raised on purpose into one sentence and an exit code; other errors keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VerificationError as error:
            raise _failure(error, 1) from error
        except TurbocompileError as error:
            raise _failure(error, 2) from error
        except OSError as error:
            code = {**dict.fromkeys(USER_ERRNOS, 2), errno.ENOSPC: 1}.get(error.errno or 0)
            if code is None:
                raise
            sentence = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
            raise _failure(sentence, code) from error
        except SafetensorError as error:  # safetensors raises it, and no OSError, if a file cannot be written
            raise _failure(error, 1) from error


class _UserError(click.ClickException):
    exit_code = 2


def _failure(error: Exception | str, code: int) -> click.ClickException:
    sentence = " ".join(str(error).split())
    return _UserError(sentence) if code == 2 else click.ClickException(sentence)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="turbocompile")
def main() -> None:
    """Compile diffusion transformers into engines that run fast, verify themselves, and say what was done."""
    with contextlib.suppress(ValueError):  # raised outside the main thread, which alone sets handlers
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup or a caller may have set another handler
                signal.signal(number, _stopped)
    codecs.register_error("turbocompile", _in_its_place)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="turbocompile")


PLAIN = str.maketrans({"µ": "u", "…": "...", "×": "x", "✓": "v"})


def _in_its_place(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that a terminal without Unicode lacks by a letter or a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "replace").decode(), error.end


def _stopped(number: int, frame: object) -> None:
    """Ends the process by an exception, so that half-written folders are removed."""
    sys.exit(128 + number)


PATH = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def check_device(device: str | None) -> None:
    import torch

    if device is None:
        return
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(f"there is no device {device!r} here ({str(error).splitlines()[0]})") from error
    if kind not in ("cpu", "cuda"):  # "meta" computes nothing, and would be timed
        raise UnsupportedError(f"engines run on cpu, cuda, cuda:1 and so on, not {device!r}")


# -------------------------------------------------------------------------------------------------------------- output


def print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def print_rich(value: RenderableType) -> None:
    """Prints to stdout; if stdout is no terminal, tables are 160 characters wide."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=160)
    console.print(value)


def print_summary(report: Report) -> None:
    """One line a pass: how many of its sites were rewritten."""
    for name, done in report.passes.items():
        click.echo(f"{name}: {done.rewritten} of {done.sites} sites rewritten")
    click.echo("seconds: " + ", ".join(f"{stage} {s:.2f}" for stage, s in report.stages.items()))
    for sentence in report.warnings:
        click.echo(f"Warning: {sentence}", err=True)


def quiet() -> None:
    """Hides other libraries' notes and warnings; each warning of turbocompile becomes one line."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"turbocompile(\.|$)")
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)
