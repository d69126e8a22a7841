"""A real HTTP server on the loopback that can break off, refuse ranges and ask for a password."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """Files by path, and how the server behaves. Requests are recorded as (method, path, Range header)."""

    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(
        default_factory=list
    )  # bytes of the body after which each GET in turn breaks off
    ranges: bool = True
    etags: bool = True
    authorization: str | None = None  # the header without which everything is refused
    length: bool = True  # False: the body's end is the connection's
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            asked = self.headers.get("Range")
            site.requests.append((self.command, self.path, asked))
            data = site.files.get(self.path)
            if site.authorization not in (None, self.headers.get("Authorization")):
                self.send_error(401)
                return
            if data is None:
                self.send_error(404)
                return
            sha256 = hashlib.sha256(data).hexdigest()
            start = 0
            if asked and site.ranges and self.headers.get("If-Range") in (None, f'"{sha256}"'):
                match = re.fullmatch(r"bytes=(\d+)-", asked)
                assert match, asked
                start = int(match[1])
                if start >= len(data):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            if site.length:
                self.send_header("Content-Length", str(len(data) - start))
            if site.etags:
                self.send_header("ETag", f'"{sha256}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header(
                "Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream"
            )
            self.end_headers()
            if with_body:
                cut = site.cut_after.pop(0) if site.cut_after else len(data)
                with suppress(ConnectionError):  # the client may break off
                    self.wfile.write(data[start : start + cut])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        site.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()
