"""The emulator that runs CUDA kernels on the processor: what right and wrong kernels give."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from emulated import check, ffi, lib
from pyllm.errors import DeviceError


def run(kernel: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x: (blocks, threads)."""
    out, err = np.full_like(x, np.inf), ffi.new("pyllm_error *")
    arrays = ffi.from_buffer("float[]", x), ffi.from_buffer("float[]", out)
    check(lib.hook_emu(kernel.encode(), *x.shape, *arrays, err), err)
    return out


@pytest.mark.parametrize("threads", [1, 31, 32, 64])
def test_shared_memory_and_barrier(rng: np.random.Generator, threads: int) -> None:
    x = rng.standard_normal((3, threads)).astype(np.float32)
    assert np.array_equal(run("reverse", x), x[:, ::-1])


def test_a_missing_barrier_shows(rng: np.random.Generator) -> None:
    """What was not yet written reads as NaN, in the first half of one block and the second of the next."""
    x = rng.standard_normal((2, 64)).astype(np.float32)
    out = run("reverse_without_barrier", x)
    assert np.isnan(out[0, :32]).all()
    assert np.isnan(out[1, 32:]).all()


@pytest.mark.parametrize("threads", [32, 64])
def test_warp_and_block_sums(rng: np.random.Generator, threads: int) -> None:
    x = rng.integers(-100, 100, (3, threads)).astype(np.float32)
    assert np.array_equal(run("sums", x), np.broadcast_to(x.sum(1, keepdims=True), x.shape))


def test_parts_of_a_warp_on_different_paths(rng: np.random.Generator) -> None:
    x = rng.integers(-100, 100, (2, 64)).astype(np.float32)
    halves = x.reshape(2, 2, 2, 16)
    expected = np.empty_like(halves)
    expected[:, :, 0] = halves[:, :, 0].sum(-1, keepdims=True)
    expected[:, :, 1] = halves[:, :, 1] + halves[:, :, 1].reshape(2, 2, 8, 2)[..., ::-1].reshape(2, 2, 16)
    assert np.array_equal(run("half_warps", x), expected.reshape(2, 64) + 16)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("barrier_in_branch", "a barrier not all threads reach"),
        ("two_barriers", "a barrier not all threads reach"),
        ("shuffle_with_ended_lanes", "lane 3, which has ended"),
        ("shuffle_outside_mask", "a lane that is not in its mask"),
        ("shuffle_some_do_not_reach", "others do not reach"),
    ],
)
def test_mistakes_are_found(kernel: str, message: str) -> None:
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(DeviceError, match=message):
        run(kernel, x)
    assert np.array_equal(run("reverse", x), x)


def test_a_grid_that_is_none() -> None:
    with pytest.raises(DeviceError, match="0 threads"):
        run("reverse", np.zeros((1, 0), np.float32))
    with pytest.raises(DeviceError, match="1025 threads"):
        run("reverse", np.zeros((1, 1025), np.float32))


def test_matrix_of_halves(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    d, err = np.empty((16, 8), np.float32), ffi.new("pyllm_error *")
    bits = [ffi.from_buffer("uint16_t[]", x) for x in (a, b)]
    check(lib.hook_emu_matrix(*bits, ffi.from_buffer("float[]", d), err), err)
    assert np.allclose(d, a.astype(np.float64) @ b.astype(np.float64), atol=1e-5)
