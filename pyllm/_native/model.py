"""A model's weights on a device, and what there is of devices."""

from __future__ import annotations

from dataclasses import dataclass

from pyllm._native.file import File
from pyllm._native.loading import check, library


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU and its memory in bytes."""

    name: str
    free_bytes: int
    total_bytes: int


def device_info(device: str) -> DeviceInfo:
    """device: "cuda" or "cuda:N". Raises DeviceError, with the reason, where it cannot be used."""
    ffi, lib = library()
    out = ffi.new("pyllm_device_info *")
    check(lib.pyllm_device_get_info, device.encode(), out)
    return DeviceInfo(ffi.string(out.name).decode("utf-8", "replace"), out.free_bytes, out.total_bytes)


@dataclass(frozen=True)
class ModelInfo:
    """What the file says of the model, and what opening it took. Sizes in bytes."""

    architecture: str
    isa: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    n_threads: int
    n_params: int
    weight_bytes: int
    resident_bytes: int


class Model:
    """Weights, read-only, shared by any number of sessions; `isa` None takes the best this processor has.

    device: "cpu", "cuda" or "cuda:N".
    """

    def __init__(self, file: File, n_threads: int, isa: str | None = None, device: str = "cpu") -> None:
        ffi, lib = library()
        self.device = device
        name = ffi.NULL if isa is None else ffi.new("char[]", isa.encode())
        where = ffi.new("char[]", device.encode())
        params = ffi.new("pyllm_model_params *", {"n_threads": n_threads, "isa": name, "device": where})
        out = ffi.new("pyllm_model **")
        check(lib.pyllm_model_open, file.handle, params, out)
        self.handle = ffi.gc(out[0], lib.pyllm_model_close)
        self.info = self._read_info()

    @staticmethod
    def memory(file: File) -> int:
        """Bytes that opening a model from this file will hold resident."""
        ffi, lib = library()
        out = ffi.new("uint64_t *")
        check(lib.pyllm_model_memory, file.handle, out)
        return int(out[0])

    def _read_info(self) -> ModelInfo:
        ffi, lib = library()
        info = ffi.new("pyllm_model_info *")
        lib.pyllm_model_get_info(self.handle, info)
        values = {name: getattr(info, name) for name in ModelInfo.__dataclass_fields__}
        for name in ("architecture", "isa"):
            values[name] = ffi.string(values[name]).decode("utf-8", "replace")
        return ModelInfo(**values)
