"""Choosing a device and what fits onto it, with an emulated GPU and with what this machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulated import GIGABYTE, lib
from pyllm import LLM, _native
from pyllm.errors import ArgumentError, DeviceError, InsufficientMemoryError


@pytest.mark.usefixtures("emulated_gpu")
def test_a_gpu_tells_its_name_and_memory() -> None:
    info = _native.device_info("cuda")
    assert info.name == "emulated on the processor"
    assert info.free_bytes <= info.total_bytes == 4 * GIGABYTE
    assert _native.device_info("cuda:0") == info
    with pytest.raises(DeviceError, match="CUDA device 1 is not there: this machine has 1"):
        _native.device_info("cuda:1")


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:1 ", "cuda1", "cuda:99999", "gpu", ""])
def test_unknown_names(tiny_model: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match="device"):
        _native.device_info(name)
    with pytest.raises(ArgumentError, match="device"):
        LLM(tiny_model, device=name)


@pytest.mark.usefixtures("emulated_gpu")
def test_weights_move_to_the_gpu_and_leave_it_again(tiny_model: Path) -> None:
    before = _native.device_info("cuda").free_bytes
    llm = LLM(tiny_model, device="cuda")
    assert llm.device == "cuda"
    taken = before - _native.device_info("cuda").free_bytes
    assert llm.info.resident_bytes <= taken <= 1.1 * llm.info.resident_bytes + 10_000
    del llm
    assert _native.device_info("cuda").free_bytes == before


@pytest.mark.usefixtures("emulated_gpu")
def test_weights_that_do_not_fit(tiny_model: Path) -> None:
    needed = _native.Model.memory(_native.File([tiny_model]))
    lib.hook_emu_memory(needed - 1)
    with pytest.raises(InsufficientMemoryError, match=r"on cuda \(emulated.*only .* 1 of 2 layers would fit"):
        LLM(tiny_model, device="cuda")
    assert LLM(tiny_model, device="auto").device == "cpu"


def test_this_machine(tiny_model: Path) -> None:
    """`auto` works with and without a GPU; asking for one that cannot be used says why."""
    try:
        _native.device_info("cuda")
    except DeviceError as error:
        with pytest.raises(DeviceError, match=str(error)[:20]):
            LLM(tiny_model, device="cuda")
        assert LLM(tiny_model).device == "cpu"
    else:
        assert LLM(tiny_model).device == "cuda"
