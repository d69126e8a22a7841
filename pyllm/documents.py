"""A file's text with its structure kept as light Markdown: headings, lists, tables, paragraphs, pages."""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from rich.filesize import decimal

from pyllm.errors import DocumentError

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CHUNK = 1 << 24  # bytes read at once
LARGEST = 10**9  # bytes: a film among documents must not fill the memory before it is found to be binary

# Its remarks on damaged files are for those who configure logging; a DocumentError says what matters.
logging.getLogger("pypdf").addHandler(logging.NullHandler())

CONTROL = re.compile(r"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def read(path: str | os.PathLike[str]) -> str:
    """The text of a document: PDF, Word (.docx), HTML, or anything that is text (Markdown, source code, ...).

    Lines end in "\\n". Raises DocumentError naming the file and the cause: missing, a folder, binary,
    too large, encrypted, broken or without any text.
    """
    path = Path(path)
    try:
        data = _bytes(path)
    except DocumentError:
        raise
    except OSError as error:
        raise DocumentError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a zero byte in the path
        raise DocumentError(f"{str(path)!r}: cannot be read: {error}") from None
    if not data:
        raise DocumentError(f"{path}: the file is empty")
    text = re.sub(r"\n{4,}", "\n\n\n", _line_ends(_reader(path, data)(path, data))).strip("\n")
    if not text.strip():
        raise DocumentError(f"{path}: there is no text in it")
    return text + "\n"


def _bytes(path: Path) -> bytes:
    """All of a file, a pipe or a device, of which only the first tells its size beforehand."""
    chunks: list[bytes] = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while size <= LARGEST and (chunk := file.read(CHUNK)):
            chunks.append(chunk)
            size = max(size, sum(map(len, chunks)))
    if size > LARGEST:
        raise DocumentError(f"{path}: {decimal(size)}, too large for a document")
    return b"".join(chunks)


def _reader(path: Path, data: bytes) -> Callable[[Path, bytes], str]:
    """By the contents where they tell, else by the suffix."""
    if data.startswith(b"%PDF-"):
        return _pdf
    suffix = path.suffix.lower()
    return {".pdf": _pdf, ".docx": _docx, ".html": _html, ".htm": _html, ".xhtml": _html}.get(suffix, _plain)


# ---- text ----


def plain_text(name: str, data: bytes) -> str:
    """The text in data, which came from `name`; lines end in "\\n". Raises DocumentError if it is none."""
    return _line_ends(_plain(Path(name), data))


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _without_surrogates(text: str) -> str:
    """Pairs of them, as PDF fonts may name a character, become the character; lone ones U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _plain(path: Path, data: bytes) -> str:
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _decode(path, data, encoding)
    if b"\0" in data:
        raise DocumentError(f"{path}: a binary file, not text (zero byte at offset {data.index(0):,})")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = _decode(path, data, "windows-1252")  # Latin-1 with typographic quotes, as browsers read it
    # One control character in fifty is more than any text has.
    if len(CONTROL.findall(text)) * 50 > len(text):
        raise DocumentError(f"{path}: a binary file, not text (control characters)")
    return text


def _decode(path: Path, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DocumentError(
            f"{path}: not text: byte 0x{byte:02x} at offset {error.start:,} is not {encoding.upper()}"
        ) from None


# ---- HTML, Word, PDF ----


def _html(path: Path, data: bytes) -> str:
    # The page's own <meta charset> counts; without one, it is read as plain text would be.
    declared = re.search(rb"<meta[^>]+charset", data[:4096], re.IGNORECASE)
    source = data if declared else _plain(path, data)
    try:
        return _markdown(source)
    except Exception as error:  # elements in elements, thousands deep, end in a RecursionError
        raise DocumentError(f"{path}: cannot be read as HTML: {_reason(error)}") from None


def _markdown(html: str | bytes) -> str:
    from bs4 import BeautifulSoup
    from markdownify import ATX, MarkdownConverter

    # Addresses of links and pictures would only spend tokens. Nothing is escaped: no renderer follows.
    converter = MarkdownConverter(
        heading_style=ATX,
        bullets="-",
        strip=["a", "img"],
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
    )
    soup = BeautifulSoup(html, "html.parser")
    for hidden in soup(["head", "script", "style", "template"]):
        hidden.decompose()
    return str(converter.convert_soup(soup))


def _docx(path: Path, data: bytes) -> str:
    import mammoth

    try:
        return _markdown(mammoth.convert_to_html(io.BytesIO(data)).value)
    except Exception as error:  # a broken archive or XML raises whatever the parser below it raises
        raise DocumentError(f"{path}: cannot be read as a Word document: {_reason(error)}") from None


def _pdf(path: Path, data: bytes) -> str:
    import pypdf

    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(f"{path}: the PDF is protected by a password")
        pages = [_without_surrogates(page.extract_text()) for page in reader.pages]
    except DocumentError:
        raise
    except Exception as error:  # a broken PDF raises whatever the parser stumbles on
        raise DocumentError(f"{path}: cannot be read as a PDF: {_reason(error)}") from None
    if not any(page.strip() for page in pages):
        raise DocumentError(f"{path}: the PDF's {len(pages)} pages hold no text, only pictures of it perhaps")
    return "\n\n".join(page.strip("\n") for page in pages)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
