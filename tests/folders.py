"""A folder of documents as people keep them: every kind that can be read, and what cannot."""

from __future__ import annotations

import os
from pathlib import Path

import docx
import numpy as np
from reportlab.pdfgen.canvas import Canvas

WORDS = ("the", "hand", "and", "inner", "thing", "other", "tide")


def prose(n_words: int, seed: int = 0) -> str:
    """Lines of eight words."""
    words = np.random.default_rng(seed).choice(WORDS, n_words)
    return "\n".join(" ".join(words[i : i + 8]) for i in range(0, n_words, 8)) + "\n"


def write_documents(root: Path, n_words: int = 300) -> list[str]:
    """One document of every kind, some in subfolders; returns their paths within root, in order."""
    (root / "b" / "c").mkdir(parents=True)
    (root / "a.txt").write_text(prose(n_words, 1))
    (root / "b" / "notes.md").write_text("# Notes\n\n" + prose(n_words // 2, 2))
    (root / "b" / "c" / "page.html").write_text(f"<h1>Page</h1><p>{prose(n_words // 3, 3)}</p>")
    word = docx.Document()
    word.add_heading("Heading", 1)
    word.add_paragraph(prose(n_words, 4))
    word.save(str(root / "letter.docx"))
    canvas = Canvas(str(root / "paper.pdf"))
    for i, line in enumerate(prose(n_words // 2, 5).splitlines()):
        canvas.drawString(72, 750 - 15 * (i % 40), line)
        if i % 40 == 39:
            canvas.showPage()
    canvas.save()
    return ["a.txt", "b/c/page.html", "b/notes.md", "letter.docx", "paper.pdf"]


def write_unreadable(root: Path) -> dict[str, str]:
    """What a survey must live with; returns the cause by path, in order."""
    (root / "bad").mkdir(parents=True)
    (root / "bad" / "broken.pdf").write_bytes(b"%PDF-1.4\n1 0 obj <<\n")
    (root / "bad" / "dangling.txt").symlink_to("nowhere")
    (root / "bad" / "empty.txt").touch()
    (root / "bad" / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (root / "bad" / "loop").symlink_to(root)
    os.mkfifo(root / "bad" / "pipe")
    (root / ".hidden").write_text("left out")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("left out")
    return {
        "bad/broken.pdf": "PDF",
        "bad/dangling.txt": "No such file",
        "bad/empty.txt": "empty",
        "bad/image.png": "binary",
        "bad/loop": "not followed",
        "bad/pipe": "neither a file nor a folder",
    }
