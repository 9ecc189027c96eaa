"""The command line, `turbocompile COMMAND`: each function with `@main.command` is a command.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 it failed, 2 the user's input was wrong.
Each command imports its modules when it runs, so that --help and --version answer at once.
"""

from turbocompile.cli import build, engines, videos
from turbocompile.cli.group import main

__all__ = ["build", "engines", "main", "videos"]
