"""The `pyllm` command: one module per subcommand; every error is one line on standard error."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from pyllm.errors import PyllmError

# Each module has `HELP`, `add_arguments(parser)` and `run(args) -> exit status`.
COMMANDS = (
    "chat",
    "generate",
    "pull",
    "info",
    "eval",
    "calibrate",
    "survey",
    "pilot",
    "guard",
    "log",
    "bench",
)

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Reports a wrong usage as every other error: in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"pyllm: error: {_one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="pyllm", description="Runs quantized GGUF models with adaptive sparse attention.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"pyllm.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0, 1 for an error, 2 for wrong usage, 130 for
    Ctrl-C."""
    _prepare_streams()
    try:
        args = build_parser().parse_args(argv)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except PyllmError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        print("pyllm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except MemoryError:
        return _failed("the system refused more memory")
    except BrokenPipeError:
        _drop_output()
        return FAILED
    except OSError as error:  # of a stream: files have errors of their own
        _drop_output()
        return _failed(f"{error.filename or 'standard input or output'}: {error.strerror or error}")


def _prepare_streams() -> None:
    """What the caller closed is empty, and what an encoding does not have is replaced, never an exception."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the rest of the process)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _failed(message: str) -> int:
    print(f"pyllm: error: {_one_line(message)}", file=sys.stderr)
    return FAILED


def _drop_output() -> None:
    """The reader has gone or the disk is full: what Python would flush at exit has nowhere to go either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(text: str) -> str:
    return " ".join(text.split())
