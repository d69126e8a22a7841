"""Real files in, text out: encodings, HTML, Word, PDF, and every way in which a file is not a document."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docx
import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.pdfgen.canvas import Canvas

import pyllm
from pyllm import documents
from pyllm.errors import DocumentError
from pyllm.models import DEFAULT_MODEL

DATA = Path(pyllm.__file__).parent / "data"


def write_pdf(path: Path, pages: list[list[str]], password: str | None = None) -> Path:
    encryption = StandardEncryption(password, canPrint=0) if password is not None else None
    canvas = Canvas(str(path), encrypt=encryption)
    for lines in pages:
        for i, line in enumerate(lines):
            canvas.drawString(72, 750 - 20 * i, line)
        canvas.showPage()
    canvas.save()
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "windows-1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    text = "Prüfung à la carte\n\tnaïve façade\n"
    path = tmp_path / "note.txt"
    path.write_bytes(text.encode(encoding))
    assert documents.read(path) == text


printable = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1).filter(str.strip)


@given(lines=st.lists(printable, min_size=1), newline=st.sampled_from(["\n", "\r\n", "\r"]))
def test_text_survives(tmp_path_factory: pytest.TempPathFactory, lines: list[str], newline: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.md"
    path.write_bytes(newline.join(lines).encode("utf-8"))
    assert documents.read(path) == "\n".join(lines).removeprefix("\ufeff") + "\n"


def test_source_code_keeps_its_indentation(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("def f(x):\n    return x * __name__\n")
    assert documents.read(path) == "def f(x):\n    return x * __name__\n"


def test_html(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text(
        """<html><head><meta charset="utf-8"><title>T</title><style>p {}</style></head><body>
        <h2>The_Heading</h2><script>alert(1)</script><!-- secret -->
        <p>Caf\u00e9 <b>bold</b> <a href="http://x/y">link</a><img src="z.png" alt="p"></p>
        <ul><li>one</li><li>two</li></ul>
        <table><tr><th>name</th><th>size</th></tr><tr><td>pin</td><td>18</td></tr></table>
        <pre>if x:\n    y()</pre></body></html>""",
        encoding="utf-8",
    )
    text = documents.read(path)
    for part in (
        "## The_Heading\n",
        "Caf\u00e9 **bold** link",
        "- one\n- two\n",
        "| pin | 18 |",
        "if x:\n    y()",
    ):
        assert part in text
    for hidden in ("alert", "secret", "p {}", "http", "z.png"):
        assert hidden not in text


def test_html_declares_its_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.htm"
    path.write_bytes('<meta charset="iso-8859-2"><p>Łódź</p>'.encode("iso-8859-2"))
    assert documents.read(path) == "Łódź\n"


def test_docx(tmp_path: Path) -> None:
    document = docx.Document()
    document.add_heading("The Heading", 1)
    document.add_paragraph("A paragraph with é.")
    document.add_paragraph("first item", style="List Bullet")
    table = document.add_table(2, 2)
    for i, text in enumerate(("name", "size", "pin", "18")):
        table.cell(i // 2, i % 2).text = text
    path = tmp_path / "a.docx"
    document.save(str(path))
    text = documents.read(path)
    assert "# The Heading\n" in text
    assert "A paragraph with é." in text
    assert "- first item" in text
    assert re.search(r"\| pin \| 18 \|", text)
    assert text.index("Heading") < text.index("paragraph") < text.index("item") < text.index("pin")


@pytest.mark.parametrize("name", ["a.pdf", "no-suffix"])
def test_pdf(tmp_path: Path, name: str) -> None:
    path = write_pdf(tmp_path / name, [["Page one, line one", "line two"], ["Page two"]])
    assert documents.read(path) == "Page one, line one\nline two\n\nPage two\n"


def test_a_pdf_whose_font_names_half_a_character(tmp_path: Path) -> None:
    writer = pypdf.PdfWriter(write_pdf(tmp_path / "whole.pdf", [["Abc"]]))
    codes = pypdf.generic.DecodedStreamObject()
    codes.set_data(
        b"1 begincodespacerange <00> <FF> endcodespacerange "
        b"2 beginbfchar <41> <D800> <62> <D83DDE00> endbfchar"
    )
    resources: Any = writer.pages[0]["/Resources"]
    (font,) = resources["/Font"].values()
    font.get_object()[pypdf.generic.NameObject("/ToUnicode")] = writer._add_object(codes)
    writer.write(tmp_path / "half.pdf")
    assert documents.read(tmp_path / "half.pdf") == "\ufffd\N{GRINNING FACE}c\n"


def test_pdf_that_only_forbids_printing_is_read(tmp_path: Path) -> None:
    assert documents.read(write_pdf(tmp_path / "a.pdf", [["open"]], password="")) == "open\n"


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(1, 256)) * 4)


def truncated_docx(path: Path) -> None:
    docx.Document().save(str(path))
    path.write_bytes(path.read_bytes()[:2000])


def truncated_pdf(path: Path) -> None:
    write_pdf(path, [["text"]])
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("name", "make", "cause"),
    [
        ("gone.txt", lambda path: None, "No such file"),
        ("folder", Path.mkdir, "directory"),
        ("empty.txt", Path.touch, "empty"),
        ("blank.txt", lambda path: path.write_text(" \n\t\n"), "no text"),
        ("a.bin", lambda path: path.write_bytes(b"\x7fELF\0\0"), "binary.*offset 4"),
        ("a.txt", binary, "not text"),
        ("a.dat", lambda path: path.write_bytes(b"\x01\x02\x03abc" * 9), "binary"),
        ("half.txt", lambda path: path.write_bytes(b"\xff\xfea"), "UTF-16"),
        ("a.docx", lambda path: path.write_text("not a zip"), "Word"),
        ("b.docx", truncated_docx, "Word"),
        ("c.docx", lambda path: docx.Document().save(str(path)), "no text"),
        ("a.pdf", lambda path: path.write_text("not a pdf"), "PDF"),
        ("b.pdf", truncated_pdf, "PDF"),
        ("c.pdf", lambda path: write_pdf(path, [[], []]), "2 pages hold no text"),
        ("d.pdf", lambda path: write_pdf(path, [["text"]], password="p"), "password"),
        ("a.html", lambda path: path.write_text("<script>only()</script>"), "no text"),
        ("b.html", lambda path: path.write_bytes(b"<p>\0</p>"), "binary"),
        ("c.html", lambda path: path.write_text("<div>" * 5000), "HTML: maximum recursion depth"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, make: Callable[[Path], object], cause: str) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(DocumentError, match=f"^{re.escape(str(path))}: .*{cause}") as caught:
        documents.read(path)
    assert "\n" not in str(caught.value)


def test_the_manual_answers_its_questions() -> None:
    """Every answer stands word for word in the section named beside it."""
    manual = documents.read(DATA / "manual.md")
    questions = json.loads((DATA / "manual.questions.json").read_text(encoding="utf-8"))
    sections = dict(
        re.findall(r"^##+ (\d+(?:\.\d+)?)\.? [^\n]*\n(.*?)(?=^##|\Z)", manual, re.MULTILINE | re.DOTALL)
    )
    assert len(questions) >= 40
    assert len({item["question"] for item in questions}) == len(questions)
    for item in questions:
        text = sections[item["section"]].replace("*", "").lower()
        assert item["answer"].lower() in text, item


def test_the_manual_is_a_long_document_for_the_default_model() -> None:
    n_tokens = len(pyllm.LLM(DEFAULT_MODEL).tokenize(documents.read(DATA / "manual.md")))
    assert 5000 <= n_tokens <= 7000


def test_a_path_that_cannot_be() -> None:
    with pytest.raises(DocumentError, match=r"'a\\x00b': cannot be read: "):
        documents.read("a\0b")


def test_a_pipe_is_read_to_its_end_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tells its size beforehand, as /dev/zero does not."""
    os.mkfifo(pipe := tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_bytes, b"some words\r\nmore of them")
        assert documents.read(pipe) == "some words\nmore of them\n"
        monkeypatch.setattr(documents, "LARGEST", 1000)
        pool.submit(pipe.write_bytes, b"word " * 300)
        with pytest.raises(DocumentError, match=r"pipe: 1\.5 kB, too large"):
            documents.read(pipe)
