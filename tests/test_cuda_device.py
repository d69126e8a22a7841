"""Choosing a device and what fits onto it, with an emulated GPU and with what this machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulated import GIGABYTE, fail_next, set_memory
from pyllm import LLM, _native
from pyllm.device import RESERVE, UNIT
from pyllm.errors import ArgumentError, DeviceError, InsufficientMemoryError
from tiny_models import write_tiny


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
    set_memory(RESERVE + needed - 1)
    with pytest.raises(InsufficientMemoryError, match=r"on cuda \(emulated.*only .* 1 of 2 layers would fit"):
        LLM(tiny_model, device="cuda")
    assert LLM(tiny_model, device="auto").device == "cpu"


@pytest.mark.usefixtures("emulated_gpu")
def test_memory_that_is_given_out_in_units(tmp_path: Path) -> None:
    """Of each of the large matrices half a unit more is needed."""
    path = write_tiny(tmp_path / "wide.gguf", n_ff=1536, tokenizer=True)  # 1.5 MiB for each matrix of the FFN
    needed = _native.Model.memory(_native.File([path])) + 2 * 3 * UNIT // 2
    set_memory(RESERVE + needed - 1)
    with pytest.raises(InsufficientMemoryError):
        LLM(path, device="cuda")
    set_memory(RESERVE + needed)
    assert LLM(path, device="cuda").device == "cuda"


@pytest.mark.usefixtures("emulated_gpu")
def test_auto_takes_a_gpu_that_holds_the_model_and_a_session(tiny_model: Path, tmp_path: Path) -> None:
    llm = LLM(tiny_model)
    assert llm.device == "cuda"
    needed = llm.session_memory(llm.n_ctx)
    del llm
    free = _native.device_info("cuda").free_bytes
    weights = _native.Model.memory(_native.File([tiny_model]))
    set_memory(4 * GIGABYTE - free + RESERVE + weights + needed // 2)
    llm = LLM(tiny_model)
    assert llm.device == "cpu"
    assert llm.session().eval([1, 2, 3]).shape == (llm.info.n_vocab,)
    assert LLM(tiny_model, n_ctx=64, n_batch=16).device == "cuda"
    set_memory(4 * GIGABYTE)
    odd = write_tiny(tmp_path / "odd.gguf", head_dim=48, n_heads=8, tokenizer=True)
    assert LLM(odd).device == "cpu"  # no kernels for such heads


@pytest.mark.usefixtures("emulated_gpu")
def test_a_gpu_without_kernels(tiny_model: Path) -> None:
    """An older card, or a library that was built for another: told before anything is loaded onto it."""
    message = r"no kernels for emulated on the processor, of compute capability 9\.0 \(no kernel image"
    file = _native.File([tiny_model])
    for open_it in (_native.device_info, lambda name: _native.Model(file, 1, None, name)):
        fail_next("cudaFuncGetAttributes", 209)
        with pytest.raises(DeviceError, match=message):
            open_it("cuda")
    fail_next("cudaFuncGetAttributes", 209)
    assert LLM(tiny_model).device == "cpu"
    assert LLM(tiny_model).device == "cuda"


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
