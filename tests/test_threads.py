"""The pool of threads: whatever is dealt out is done, once, in pieces that are not too large."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from native import check, ffi, lib

# Items, and those of a piece: around a piece for each of up to 5 threads, and beyond.
JOBS = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(n_threads=st.integers(1, 5), jobs=JOBS)
@example(n_threads=3, jobs=[(1 << 20, 4)])  # as a prompt through a wide matrix has them
def test_every_item_is_done_once(n_threads: int, jobs: list[tuple[int, int]]) -> None:
    items, grains = (np.array(column, np.int32) for column in zip(*jobs, strict=True))
    done = np.full(int(items.sum()), -1, np.int32)
    err = ffi.new("pyllm_error *")
    arrays = (ffi.from_buffer("int32_t[]", array) for array in (items, grains))
    out = ffi.from_buffer("int32_t[]", done, True)
    check(lib.hook_pool(n_threads, *arrays, len(jobs), out, err), err)
    assert (done == 1).all()
