"""`pyllm chat`: a conversation, perhaps about a document, line by line or with a single question."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from contextlib import closing

from rich.table import Table

from pyllm.cli import FAILED, options
from pyllm.cli.conversation import Conversation, Document
from pyllm.cli.terminal import (
    ShowProgress,
    guard_line,
    line_reader,
    percent,
    prefill_bar,
    render,
    status_line,
)
from pyllm.errors import ArgumentError, PyllmError

HELP = "Talk with a model, about a document if one is given."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--doc", metavar="FILE", help="a document to talk about: txt, md, html, pdf, docx, source code"
    )
    parser.add_argument("--ask", metavar="QUESTION", help="answer this question and exit")
    options.add_model_options(parser)
    options.add_guard_options(parser)
    # Answers about a document should be the likeliest ones, and the same every time.
    options.add_sampling_options(parser, temperature=0.0, max_tokens=256)


def run(args: argparse.Namespace) -> int:
    document = Document.read(args.doc) if args.doc is not None else None
    conversation = Conversation(options.open_llm(args), options.sampling(args))
    conversation.open(document)
    if args.ask is not None:
        return ask_once(conversation, args.ask)
    # On a pipe nobody reads along: errors are for standard error and the exit status.
    interactive = sys.stdin.isatty()
    repl = Repl(conversation, line_reader("> "), write, prefill_bar, write if interactive else complain)
    repl.run()
    return FAILED if repl.failed and not interactive else 0


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text)


def ask_once(conversation: Conversation, question: str) -> int:
    """The answer goes to standard output, all else to standard error."""
    if not question.strip():
        raise ArgumentError("--ask: the question is empty")
    stream_answer(conversation, question, write, prefill_bar)
    if conversation.answer:
        print(status_line(conversation.answer, conversation.session.n_ctx), file=sys.stderr)
    return 0


def stream_answer(
    conversation: Conversation, question: str, write: Callable[[str], None], show_progress: ShowProgress
) -> None:
    """Writes the answer as it comes, after a progress bar for what must be read first."""
    with show_progress() as tick:
        pieces = conversation.ask(question, tick)
        first = next(pieces, "")
    with closing(pieces):
        write(first)
        for piece in pieces:
            write(piece)
    write("\n")


class Repl:
    """The conversation, line by line.

    read: returns the user's next line, raises EOFError at the end and KeyboardInterrupt for Ctrl-C. write:
    takes text as it is to appear. show_progress: a context around a prefill, whose value is called with
    (tokens done, in all). complain: takes the text of errors. failed: whether there was one.
    """

    def __init__(
        self,
        conversation: Conversation,
        read: Callable[[], str],
        write: Callable[[str], None],
        show_progress: ShowProgress,
        complain: Callable[[str], None],
    ) -> None:
        self.conversation = conversation
        self.read = read
        self.write = write
        self.show_progress = show_progress
        self.complain = complain
        self.failed = False
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self.help, "this list"),
            "/doc": (self.doc, "FILE: talk about another document; none: about none; alone: which one it is"),
            "/reset": (self.reset, "forget questions and answers, keep the document"),
            "/stats": (self.stats, "speed, and what attention read in every layer"),
            "/attention": (
                self.attention,
                "POLICY or preset: for what is read from now on; alone: which one it is",
            ),
            "/exit": (self.exit, "leave, as Ctrl-D does; Ctrl-C stops reading or answering"),
        }

    def run(self) -> None:
        """Until /exit or the end of input. Errors and Ctrl-C lead back to the prompt."""
        llm = self.conversation.llm
        self.line(
            f"{llm.name}, {llm.n_ctx:,} tokens of context, {llm.attention} attention; /help for commands."
        )
        self.guarded(self.read_document)
        while True:
            try:
                text = self.read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.line("/exit or Ctrl-D leaves")
                continue
            try:
                self.guarded(functools.partial(self.handle, text))
            except EOFError:
                return

    def guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except PyllmError as error:
            self.failed = True
            self.complain(f"error: {error}\n")
        except KeyboardInterrupt:
            self.line("\n[stopped]")

    def handle(self, text: str) -> None:
        """One line: a command or a question."""
        if not text:
            return
        if not text.startswith("/"):
            return self.question(text)
        name, _, argument = text.partition(" ")
        if name not in self.commands:
            raise ArgumentError(f"unknown command {name}; /help lists the commands")
        self.commands[name][0](argument.strip())

    def line(self, text: str) -> None:
        self.write(f"{text}\n")

    def question(self, text: str) -> None:
        stream_answer(self.conversation, text, self.write, self.show_progress)
        if self.conversation.answer:
            self.line(status_line(self.conversation.answer, self.conversation.session.n_ctx))

    def read_document(self) -> None:
        """Evaluates the document before the first question."""
        document, session = self.conversation.document, self.conversation.session
        if document is None:
            return
        self.line(f"Reading {document.name}. Ctrl-C stops; the first question then reads the rest.")
        try:
            with self.show_progress() as tick:
                self.conversation.prefill(tick)
        finally:
            self.line(
                f"{session.position:,} tokens of {document.name} read, in a context of {session.n_ctx:,}."
            )

    # ---- commands ----

    def help(self, argument: str) -> None:
        for name, (_, text) in self.commands.items():
            self.line(f"{name:<11} {text}")
        self.line("Anything else is a question.")

    def doc(self, argument: str) -> None:
        if not argument:
            return self.show_document()
        if argument == "none":
            self.conversation.open(None)
            return self.show_document()
        # No shell is between, which would have done this.
        self.conversation.open(Document.read(os.path.expanduser(argument)))
        self.read_document()

    def show_document(self) -> None:
        document = self.conversation.document
        self.line(f"{document.name}, {len(document.text):,} characters" if document else "no document")

    def reset(self, argument: str) -> None:
        self.conversation.reset()
        self.line("The conversation starts over.")

    def attention(self, argument: str) -> None:
        if argument:
            self.conversation.session.attention = argument
        self.line(f"{self.conversation.session.attention}")

    def stats(self, argument: str) -> None:
        stats = self.conversation.session.stats
        speeds = (
            ("read", stats.prefill_tokens, stats.prefill_per_second),
            ("answered", stats.decode_tokens, stats.decode_per_second),
        )
        for name, n, per_second in speeds:
            self.line(f"{name} {n:,} tokens" + (f" at {per_second:,.0f} t/s" if per_second else ""))
        for policy, n in stats.evaluated.items():
            self.line(f"{n:,} tokens under {policy}")
        if stats.guard:
            self.line(guard_line(stats.guard.summary()))
        table = Table("layer", "heads local", "pages read", "bulk work", "bulk read", box=None)
        for name, layer in [
            *((str(at), layer) for at, layer in enumerate(stats.layers)),
            ("all", stats.total),
        ]:
            shown = (layer.heads_local, layer.pages_read, layer.bulk_work, layer.bulk_read)
            table.add_row(name, *(percent(x) for x in shown))
        self.write(render(table))

    def exit(self, argument: str) -> None:
        raise EOFError
