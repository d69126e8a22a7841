"""The GGUF loader from Python: what gguf writes is read back, and whatever is broken gets one clear error."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gguf_files as files
from gguf_files import array, assemble, open_bytes, scalar, string, tensor
from pyllm import _native, errors
from pyllm._native.file import DTYPES

SMALL = files.small()

# ---- valid files ----

INTEGERS = {
    Value.UINT8: (0, 2**8 - 1),
    Value.INT8: (-(2**7), 2**7 - 1),
    Value.UINT16: (0, 2**16 - 1),
    Value.INT16: (-(2**15), 2**15 - 1),
    Value.UINT32: (0, 2**32 - 1),
    Value.INT32: (-(2**31), 2**31 - 1),
    Value.UINT64: (0, 2**64 - 1),
    Value.INT64: (-(2**63), 2**63 - 1),
}
SCALARS: dict[Value, st.SearchStrategy[Any]] = {
    **{kind: st.integers(low, high) for kind, (low, high) in INTEGERS.items()},
    Value.FLOAT32: st.floats(width=32, allow_nan=False),
    Value.FLOAT64: st.floats(allow_nan=False),
    Value.BOOL: st.booleans(),
    Value.STRING: st.text(),
}
TYPED_VALUES = st.one_of(
    *(st.tuples(st.just(kind), value) for kind, value in SCALARS.items()),
    *(st.tuples(st.just(kind), st.lists(value, min_size=1)) for kind, value in SCALARS.items()),
)
KEYS = st.text(min_size=1).filter(lambda key: not key.startswith(("general.", "split.")))
TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q4_1, Type.Q8_0, Type.Q4_K, Type.Q6_K)


def as_python(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def random_tensor(seed: int, kind: Type, rows: int, blocks: int) -> np.ndarray:
    """Rows of random bytes in the type's blocks, as gguf takes quantized tensors."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * block_bytes), np.uint8)


def tensor_set(seed: int, n: int) -> dict[str, tuple[np.ndarray, Type]]:
    """n tensors of all types, of different sizes, named t0, t1, ..."""
    kinds = [TYPES[i % len(TYPES)] for i in range(n)]
    return {
        f"t{i}": (random_tensor(seed + i, kind, i % 3 + 1, i % 2 + 1), kind) for i, kind in enumerate(kinds)
    }


@settings(deadline=None, max_examples=50)
@given(values=st.dictionaries(KEYS, TYPED_VALUES, max_size=8))
@example(values={f"all.{kind.name}": (kind, [low, high]) for kind, (low, high) in INTEGERS.items()})
def test_values_of_every_type_are_read_back(
    values: dict[str, tuple[Value, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("values") / "m.gguf"
    files.write(path, values, {})
    read = _native.File([path]).values()
    assert as_python(read.pop("general.architecture")) == "llama"
    assert {key: as_python(value) for key, value in read.items()} == {
        key: value for key, (_, value) in values.items()
    }


def test_numeric_arrays_keep_their_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    kinds = [kind for kind in SCALARS if kind != Value.STRING]
    files.write(path, {kind.name: (kind, [0, 1]) for kind in kinds}, {})
    read = _native.File([path]).values()
    for kind in kinds:
        assert read[kind.name].dtype == np.dtype(DTYPES[int(kind)])
        assert read[kind.name].dtype.itemsize == struct.calcsize(files.FORMATS[kind])


@pytest.mark.parametrize("alignment", [None, 8, 32, 64, 4096])
@given(seed=st.integers(0, 2**32 - 100), n=st.integers(1, 9), key=st.text("k", min_size=1, max_size=70))
@settings(deadline=None, max_examples=10)
def test_tensors_are_where_they_were_written(
    alignment: int | None, seed: int, n: int, key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "m.gguf"
    tensors = tensor_set(seed, n)
    # The key's length moves the end of the directory over every remainder of the alignment.
    files.write(path, {key: (Value.UINT8, 1)}, tensors, alignment)
    file = _native.File([path])
    assert files.tensor_data(file) == {name: data.tobytes() for name, (data, _) in tensors.items()}
    whole = path.read_bytes()
    for t in file.tensors():
        data, kind = tensors[t.name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        assert (t.type, t.type_name, t.part) == (kind, kind.name, 0)
        assert t.shape == (data.shape[1] // block_bytes * block, data.shape[0])
        assert t.offset % (alignment or 32) == 0
        assert whole[t.offset : t.offset + t.size] == data.tobytes()


def test_the_directory_is_what_gguf_reads(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "m.gguf"
    cube = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    values = {"a": (Value.UINT16, 3), "b": (Value.STRING, "ü"), "c": (Value.STRING, ["x", "", "yz"])}
    files.write(path, values, {**tensor_set(1, 5), "cube": (cube, Type.F32)}, alignment=64)
    reader = gguf.GGUFReader(path)
    file = _native.File([path])
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: as_python(value) for key, value in file.values().items()} == expected
    assert [(t.name, t.type, list(t.shape), t.size, t.offset) for t in file.tensors()] == [
        (t.name, t.tensor_type, t.shape.tolist(), t.n_bytes, t.data_offset) for t in reader.tensors
    ]


# ---- the fingerprint ----


def fingerprint(
    key: bytes = b"llama.rope", value: int = 7, name: bytes = b"w", data: bytes = bytes(4096)
) -> str:
    values = [scalar(b"general.architecture", Value.STRING, b"llama"), scalar(key, Value.UINT32, value)]
    return open_bytes(assemble(values, [tensor(name, (1024,))], data)).fingerprint


def changed(at: int) -> bytes:
    data = bytearray(4096)
    data[at] = 1
    return bytes(data)


def test_fingerprint_tells_models_apart() -> None:
    others = [
        fingerprint(value=8),
        fingerprint(key=b"llama.norm"),
        fingerprint(name=b"v"),
        *(fingerprint(data=changed(at)) for at in (0, 255, 2048)),
    ]
    assert len({fingerprint(), *others}) == 1 + len(others)
    assert open_bytes(SMALL).fingerprint == open_bytes(SMALL).fingerprint


@pytest.mark.parametrize("key", [b"general.name", b"tokenizer.chat_template", b"split.x"])
def test_fingerprint_is_of_what_shapes_results(key: bytes) -> None:
    assert fingerprint(key, 1) == fingerprint(key, 2)


def test_fingerprint_of_a_split_model_is_that_of_the_whole(tmp_path: Path) -> None:
    tensors = tensor_set(3, 6)
    whole = files.write(tmp_path / "whole.gguf", {}, tensors)
    parts = files.write(tmp_path / "split.gguf", {}, tensors, tensors_per_part=2)
    assert len(parts) == 3
    assert _native.File(parts).fingerprint == _native.File(whole).fingerprint


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_read_the_same(version: int) -> None:
    file = open_bytes(b"GGUF" + struct.pack("<I", version) + SMALL[8:])
    values = {key: as_python(value) for key, value in file.values().items()}
    assert values == {
        "general.architecture": "llama",
        "a.u32": 7,
        "a.bool": True,
        "a.strings": ["x", "", "é"],
        "a.floats": [0.5, -2.0],
    }
    assert [(t.name, t.type_name, t.shape, t.size) for t in file.tensors()] == [
        ("w", "Q4_0", (32, 2), 36),
        ("b", "F32", (4,), 16),
    ]
    assert files.tensor_data(file) == {"w": bytes(range(36)), "b": bytes(range(64, 80))}


def test_what_gguf_cannot_write_but_others_do() -> None:
    """Empty arrays, bytes that are not UTF-8, no padding behind a directory without tensors."""
    values = [
        array(b"no floats", Value.FLOAT64, []),
        array(b"no strings", Value.STRING, []),
        scalar(b"raw", Value.STRING, b"\xff\x00"),
    ]
    read = open_bytes(assemble(values, alignment=1)).values()
    assert {key: as_python(value) for key, value in read.items()} == {
        "no floats": [],
        "no strings": [],
        "raw": b"\xff\x00",
    }
    assert open_bytes(assemble()).tensors() == []


def test_the_mapping_outlives_the_path() -> None:
    """open_bytes removes its files, and the mapping still holds what they held."""
    files.read_everything(open_bytes(SMALL))


# ---- split files ----


@pytest.fixture
def parts(tmp_path: Path) -> list[bytes]:
    """Seven tensors in three parts."""
    paths = files.write(tmp_path / "s.gguf", {"k": (Value.UINT32, 9)}, tensor_set(5, 7), tensors_per_part=3)
    assert len(paths) == 3
    return [path.read_bytes() for path in paths]


def test_parts_load_as_one_file(parts: list[bytes]) -> None:
    file = open_bytes(*parts)
    tensors = tensor_set(5, 7)
    assert file.values()["k"] == 9
    assert [(t.name, t.part) for t in file.tensors()] == [(f"t{i}", i // 3) for i in range(7)]
    assert files.tensor_data(file) == {name: data.tobytes() for name, (data, _) in tensors.items()}
    for t in file.tensors():
        assert parts[t.part][t.offset : t.offset + t.size] == tensors[t.name][0].tobytes()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0], r"part0.gguf: .*part 1 of 3, and it was given as part 1 of 1"),
        ([1], r"part0.gguf: .*part 2 of 3, and it was given as part 1 of 1"),
        ([0, 1], r"part0.gguf: .*part 1 of 3, and it was given as part 1 of 2"),
        ([0, 2, 1], r"part1.gguf: .*part 3 of 3, and it was given as part 2 of 3"),
        ([0, 1, 1], r"part2.gguf: .*part 2 of 3, and it was given as part 3 of 3"),
        ([0, 1, 2, 2], r"part0.gguf: .*part 1 of 3, and it was given as part 1 of 4"),
    ],
)
def test_missing_or_misplaced_parts(parts: list[bytes], order: list[int], message: str) -> None:
    with pytest.raises(errors.FormatError, match=message):
        open_bytes(*(parts[i] for i in order))


def test_an_unsplit_file_is_no_part(parts: list[bytes]) -> None:
    with pytest.raises(
        errors.FormatError, match=r"part1.gguf: .*part 1 of 1, and it was given as part 2 of 3"
    ):
        open_bytes(parts[0], SMALL, parts[2])


def test_a_part_that_is_not_there(parts: list[bytes], tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for i in (0, 2):
        paths[i].write_bytes(parts[i])
    with pytest.raises(errors.FileError, match="b: cannot be opened: No such file"):
        _native.File(paths)


def split_part(
    no: int, name: bytes, *, n_parts: int = 2, kind: int = Value.UINT16, total: int | None = None
) -> bytes:
    values = [scalar(b"split.no", kind, no), scalar(b"split.count", Value.UINT16, n_parts)]
    if total is not None:
        values.append(scalar(b"split.tensors.count", Value.INT32, total))
    return assemble(values, [tensor(name, (8,))], bytes(32))


def test_parts_of_different_models() -> None:
    assert len(open_bytes(split_part(0, b"x", total=2), split_part(1, b"y")).tensors()) == 2
    with pytest.raises(errors.FormatError, match=r"part1.gguf: tensor 'x' appears twice"):
        open_bytes(split_part(0, b"x"), split_part(1, b"x"))
    with pytest.raises(errors.FormatError, match=r"'split.tensors.count' is 3, and the parts hold 2 tensors"):
        open_bytes(split_part(0, b"x", total=3), split_part(1, b"y"))
    with pytest.raises(errors.FormatError, match=r"key 'split.no' is of type f32, expected an integer"):
        open_bytes(split_part(0, b"x", kind=Value.FLOAT32), split_part(1, b"y"))


def test_a_file_marked_as_not_split() -> None:
    for n_parts in (0, 1):
        assert len(open_bytes(split_part(0, b"x", n_parts=n_parts)).tensors()) == 1


# ---- what cannot be opened ----


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "missing.gguf", "missing.gguf: cannot be opened: No such file or directory"),
        (tmp_path, f"{tmp_path}: is a directory, not a file"),
        (tmp_path / "pipe", "pipe: is not a regular file"),
    ]:
        with pytest.raises(errors.FileError) as caught:
            _native.File([path])
        assert message in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(SMALL)
    path.chmod(0)
    with pytest.raises(errors.FileError, match=r"secret\.gguf: cannot be opened: Permission denied"):
        _native.File([path])


def test_no_paths() -> None:
    with pytest.raises(errors.ArgumentError, match="no file to open"):
        _native.File([])


def test_a_very_long_path_leaves_room_for_the_cause() -> None:
    path = Path("/", *["directory" * 20] * 15, "end.gguf")
    with pytest.raises(
        errors.FileError, match=r"^\.\.\..*directory/end\.gguf: cannot be opened: No such file"
    ):
        _native.File([path])


# ---- what is broken: the file, what is asked for, and what the message must say ----

F32 = tensor(b"w", (8,))
ALIGNMENT = b"general.alignment"
TRUNCATED = "truncated or corrupt"
MAX64 = 2**64 - 1

FORMAT_ERRORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"G", "truncated: 1 bytes, and a GGUF header has 24"),
    "header cut": (SMALL[:23], "truncated: 23 bytes"),
    "zip": (b"PK\x03\x04 and so on and on", r"not a GGUF file: it begins with 'PK\\x03\\x04 and so on a'"),
    "ggml": (b"lmgg" + SMALL[4:], "not a GGUF file: it begins with 'lmgg"),
    "git lfs pointer": (b"version https://git-lfs", "begins with 'version https://'"),
    "values that cannot fit": (
        assemble([scalar(b"k", Value.UINT8, 1)], n_values=MAX64, alignment=1),
        f"the header announces {MAX64} keys, and its 38 bytes can hold 1 at most",
    ),
    "tensors that cannot fit": (
        assemble(tensors=[F32], n_tensors=2**40, alignment=1),
        f"the header announces {2**40} tensors, and its 57 bytes can hold 1 at most",
    ),
    "one value too few": (
        assemble([scalar(b"k", Value.STRING, b"text text text text")], n_values=2, alignment=1),
        f"key 2 of 2: {TRUNCATED} at byte 64: its name takes 8 bytes, and 0 are left",
    ),
    "empty key": (
        assemble([scalar(b"", Value.UINT32, 1)]),
        "key 1 of 1: its name at byte 24 has 0 bytes, expected 1 to",
    ),
    "long key": (assemble([scalar(b"k" * 65536, Value.UINT8, 1)]), "has 65536 bytes, expected 1 to 65535"),
    "endless key": (
        assemble([struct.pack("<Q", MAX64) + b"k" * 20]),
        f"key 1 of 1: {TRUNCATED} at byte 32: its name takes {MAX64} bytes, and",
    ),
    "value type": (
        assemble([scalar(b"k", 13, b"\0" * 8)]),
        "key 'k': its type at byte 33 is 13, expected 0 to 12",
    ),
    "item type": (
        assemble([string(b"k") + struct.pack("<IIQ", Value.ARRAY, 99, 1)]),
        "key 'k': its item type at byte 37 is 99",
    ),
    "endless string": (
        assemble([string(b"k") + struct.pack("<IQ", Value.STRING, MAX64 - 8)]),
        f"key 'k': {TRUNCATED} at byte 45: a string takes {MAX64 - 8} bytes, and",
    ),
    "endless array": (
        assemble([array(b"k", Value.FLOAT64, [1.0], length=2**61)]),
        f"key 'k': {TRUNCATED} at byte 49: its value takes {MAX64} bytes, and",
    ),
    "array a bit too long": (
        assemble([array(b"k", Value.UINT16, [1, 2], length=8)], alignment=1),
        f"key 'k': {TRUNCATED} at byte 49: its value takes 16 bytes, and 4 are left",
    ),
    "endless array of strings": (
        assemble([array(b"k", Value.STRING, [b"x"], length=2**62)]),
        f"key 'k': {TRUNCATED} at byte 49: an array of strings takes {MAX64} bytes, and",
    ),
    "string in an array too long": (
        assemble([array(b"k", Value.STRING, [b"x"])[:-9] + struct.pack("<Q", 1000) + b"x"]),
        f"key 'k': {TRUNCATED} at byte 57: a string takes 1000 bytes, and",
    ),
    "bool": (assemble([scalar(b"k", Value.BOOL, b"\2")]), "key 'k': the byte 2 at byte 37 is no bool"),
    "bool in an array": (
        assemble([array(b"k", Value.BOOL, [True, False])[:-1] + b"\xff"]),
        "key 'k': the byte 255 at byte 50 is no bool",
    ),
    "key twice": (
        assemble([scalar(b"k", Value.UINT8, 1), scalar(b"j", Value.UINT8, 1), scalar(b"k", Value.UINT32, 2)]),
        "key 'k': appears twice",
    ),
    "alignment of another type": (
        assemble([scalar(ALIGNMENT, Value.UINT64, 32)]),
        "key 'general.alignment': is of type u64, expected u32",
    ),
    **{
        f"alignment {n}": (assemble([scalar(ALIGNMENT, Value.UINT32, n)]), f"is {n}, expected a power of two")
        for n in (0, 1, 4, 24, 33, 2**32 - 1)
    },
    "alignment beyond the file": (
        assemble([scalar(ALIGNMENT, Value.UINT32, 2**31)], [F32], bytes(32)),
        f"tensor 'w': {TRUNCATED}: its 32 bytes of data start 0 after byte {2**31}, and",
    ),
    "tensor without a name": (
        assemble(tensors=[tensor(b"", (8,))]),
        "tensor 1 of 1: its name at byte 24 has 0 bytes",
    ),
    "tensor with a long name": (
        assemble(tensors=[tensor(b"n" * 65, (8,))]),
        "has 65 bytes, expected 1 to 64",
    ),
    "no dimensions": (assemble(tensors=[tensor(b"w", ())], data=bytes(32)), "tensor 'w': has 0 dimensions"),
    "five dimensions": (
        assemble(tensors=[tensor(b"w", [1] * 5)]),
        "tensor 'w': has 5 dimensions, expected 1 to 4",
    ),
    "dimension of nothing": (assemble(tensors=[tensor(b"w", (8, 0))]), "tensor 'w': dimension 1 is 0"),
    "shape of 2^64 values": (
        assemble(tensors=[tensor(b"w", (2**32, 2**32))]),
        rf"tensor 'w': the shape \({2**32}, {2**32}, 1, 1\) of F32 overflows 64 bits",
    ),
    "shape of 2^63 bytes": (
        assemble(tensors=[tensor(b"w", (2**62, 2), Type.Q4_0)]),
        "of Q4_0 overflows 64 bits",
    ),
    "shape of 2^64 bytes": (assemble(tensors=[tensor(b"w", (2**62,))]), "of F32 overflows 64 bits"),
    "part of a block": (
        assemble(tensors=[tensor(b"w", (320, 4), Type.Q4_K)], data=bytes(10000)),
        "tensor 'w': its first dimension 320 is not a multiple of Q4_K's block of 256",
    ),
    "offset between the steps": (
        assemble(tensors=[tensor(b"w", (8,), offset=16)], data=bytes(64)),
        "tensor 'w': its offset 16 is not a multiple of the alignment 32",
    ),
    "offset beyond the file": (
        assemble(tensors=[tensor(b"w", (8,), offset=MAX64 - 31)], data=bytes(64)),
        f"tensor 'w': {TRUNCATED}: its 32 bytes of data start {MAX64 - 31} after byte 64, and",
    ),
    "data a byte short": (
        assemble(tensors=[tensor(b"w", (8,), offset=32)], data=bytes(63)),
        f"tensor 'w': {TRUNCATED}: its 32 bytes .* 32 after byte 64, and the file ends at byte 127",
    ),
    "tensor twice": (
        assemble(tensors=[F32, tensor(b"x", (8,)), F32], data=bytes(32)),
        "tensor 'w' appears twice",
    ),
}


@pytest.mark.parametrize("name", FORMAT_ERRORS)
def test_a_broken_file_is_refused(name: str) -> None:
    data, message = FORMAT_ERRORS[name]
    with pytest.raises(errors.FormatError, match=r"part0\.gguf: .*" + f"(?:{message})"):
        open_bytes(data)


UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    **{
        f"version {n}": (assemble(version=n), rf"GGUF version {n} is not supported; supported: 2, 3")
        for n in (0, 1, 4, 99)
    },
    "swapped version": (assemble(version=0x03000000), "big-endian GGUF version 3; only little-endian"),
    "array of arrays": (assemble([array(b"k", Value.ARRAY, [], length=1)]), "key 'k': arrays of arrays"),
    "known type": (
        assemble(tensors=[tensor(b"w", (256,), Type.IQ2_XXS)], data=bytes(66)),
        r"tensor 'w': type 16 \(IQ2_XXS\) is not supported; supported: F32, F16, BF16, Q4_0, .*IQ4_XS$",
    ),
    **{
        f"type {n}": (
            assemble(tensors=[tensor(b"w", (256,), n)], data=bytes(256)),
            rf"tensor 'w': type {n} \(unknown\) is not supported; supported: F32,",
        )
        for n in (77, 2**31, 2**32 - 1)
    },
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(name: str) -> None:
    data, message = UNSUPPORTED[name]
    with pytest.raises(errors.UnsupportedError, match=r"part0\.gguf: .*" + message):
        open_bytes(data)


@pytest.mark.parametrize("kind", [kind for kind in Type if kind <= 41], ids=lambda kind: kind.name)
def test_every_type_of_the_format_is_known_by_name(kind: Type) -> None:
    data = assemble(tensors=[tensor(b"w", (256,), kind)], data=bytes(1024))
    if _native.library()[1].pyllm_type_name(kind):
        assert open_bytes(data).tensors()[0].type_name == kind.name
    else:
        with pytest.raises(errors.UnsupportedError, match=rf"tensor 'w': type {int(kind)} \({kind.name}\)"):
            open_bytes(data)


def test_a_big_endian_file(tmp_path: Path) -> None:
    big = {"w": (np.zeros(8, np.float32), Type.F32)}
    paths = files.write(tmp_path / "big.gguf", {}, big, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(errors.UnsupportedError, match="big-endian GGUF version 3"):
        _native.File(paths)


def test_names_cannot_garble_a_message() -> None:
    name = b"\x1b[31m\n\xff" + b"n" * 50
    with pytest.raises(errors.FormatError) as caught:
        open_bytes(assemble(tensors=[tensor(name, (0,))]))
    assert r"tensor '\x1b[31m\x0a\xffnnn" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_huge_file_costs_what_its_header_costs(tmp_path: Path) -> None:
    """A sparse terabyte whose counts could fit: refused where the zeros behind the header contradict them."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1000, 1000)
    with pytest.raises(errors.FormatError, match="key 1 of 1000: its name at byte 24 has 0 bytes"):
        _native.File([files.sparse(tmp_path / "huge.gguf", head, 2**40)])


def test_a_count_that_would_take_more_memory_than_there_is(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2**36)
    with pytest.raises((errors.InsufficientMemoryError, errors.FormatError), match=r"huge\.gguf: "):
        _native.File([files.sparse(tmp_path / "huge.gguf", head, 2**40)])


# ---- whatever the bytes ----


def test_every_truncation_is_refused() -> None:
    files.read_everything(open_bytes(SMALL))
    for size in range(len(SMALL)):
        with pytest.raises(errors.FormatError, match=r"truncated|the file is empty"):
            open_bytes(SMALL[:size])


def refusal(data: bytes) -> errors.PyllmError | None:
    """The error that the bytes get, or None after everything in them has been read."""
    try:
        file = open_bytes(data)
    except errors.PyllmError as error:
        return error
    files.read_everything(file)
    return None


def is_clear(error: errors.PyllmError) -> bool:
    return "part0.gguf: " in str(error) and str(error).isprintable()


@settings(deadline=None, max_examples=300)
@given(flips=st.dictionaries(st.integers(4, len(SMALL) - 1), st.integers(0, 255), min_size=1, max_size=6))
def test_changed_bytes_are_refused_or_read(flips: dict[int, int]) -> None:
    data = bytearray(SMALL)
    for at, byte in flips.items():
        data[at] = byte
    error = refusal(bytes(data))
    assert error is None or is_clear(error)


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=200), n_tensors=st.integers(0, 4), n_values=st.integers(0, 4))
def test_arbitrary_bytes_behind_a_header(data: bytes, n_tensors: int, n_values: int) -> None:
    error = refusal(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + data)
    assert error is None or is_clear(error)
