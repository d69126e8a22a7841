"""The `pyllm` command: one module per subcommand; every error is one line on standard error."""

from __future__ import annotations

import argparse
import importlib
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
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except PyllmError as error:
        print(f"pyllm: error: {_one_line(str(error))}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("pyllm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; what Python would flush at exit has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _one_line(text: str) -> str:
    return " ".join(text.split())
