"""libframestride.so through ctypes: its structures, its functions, and its errors.

`capi/include/framestride.h` explains every one of them, under the same names.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
from ctypes import POINTER, c_char, c_char_p, c_double, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

ABI_VERSION = 3


class Status(enum.IntEnum):
    """What kind of error it is."""

    INVALID_ARGUMENT = 1
    INVALID_HANDLE = 2
    INVALID_SPEC = 3
    INVALID_FILE = 4
    UNSUPPORTED = 5
    NO_GPU = 6
    DRIVER = 7
    EMULATOR = 8
    INTERNAL = 9


class Error(ValueError):
    """What was found, what is allowed, and how to mend it. Nothing was launched.

    `status` says what kind of error it is.
    """

    def __init__(self, message: str, status: Status = Status.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[Error], tuple[str, Status]]:
        return type(self), (str(self), self.status)


def refuse(subject: str, found: object, allowed: str, mend: str, status: Status = Status.INVALID_ARGUMENT) -> Error:
    """An error in the words of the library."""
    return Error(f"{subject}: found {found}\n = allowed: {allowed}\n = mend: {mend}", status)


class Sized(ctypes.Structure):
    """A structure that begins with its size."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(size=ctypes.sizeof(self), **fields)


class Width(ctypes.Structure):
    _fields_ = [("value", c_double), ("unit", c_uint32), ("reserved", c_uint32)]


class SpecDetails(Sized):
    _fields_ = [
        ("size", c_uint64),
        ("name", c_char * 128),
        ("sequence", c_uint32),
        ("video_tokens", c_uint32),
        ("before_tokens", c_uint32),
        ("after_tokens", c_uint32),
        ("frames", c_uint32),
        ("tokens_per_frame", c_uint32),
        ("grid_height", c_uint32),
        ("grid_width", c_uint32),
        ("sink_frames", c_uint32),
        ("heads", c_uint32),
        ("head_dim", c_uint32),
        ("dtype", c_uint32),
        ("batch", c_uint32),
        ("most_heads", c_uint32),
        ("norm_kind", c_uint32),
        ("norm_over", c_uint32),
        ("rope_pairs", c_uint32),
        ("rope_channels", c_uint32),
        ("rope_before", c_uint32),
        ("rope_after", c_uint32),
        ("rope_rows", c_uint32),
        ("rope_per_head", c_uint32),
        ("spatial_half_width", c_uint32),
        ("temporal_half_width", c_uint32),
        ("profile_rows", c_uint32),
        ("schedule_steps", c_uint32),
        ("schedule_layers", c_uint32),
        ("schedule_dense_steps", c_uint32),
        ("schedule_dense_layers", c_uint32),
        ("compute", c_uint32),
        ("profile_seed", c_uint64),
        ("norm_eps", c_double),
        ("spatial_density", c_double),
        ("temporal_density", c_double),
        ("spatial", Width),
        ("temporal", Width),
        ("largest_error", c_double),
    ]


class ModuleDetails(Sized):
    _fields_ = [
        ("size", c_uint64),
        ("fill_seconds", c_double),
        ("load_seconds", c_double),
        ("compile_seconds", c_double),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch", c_uint64), ("row", c_uint64), ("head", c_uint64)]


class NormWeights(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class TextSide(ctypes.Structure):
    _fields_ = [
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("lengths", c_void_p),
        ("q_norm", NormWeights),
        ("k_norm", NormWeights),
        ("has_q_norm", c_uint32),
        ("has_k_norm", c_uint32),
    ]


class Call(Sized):
    _fields_ = [
        ("size", c_uint64),
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("out", Tensor),
        ("q_norm", NormWeights),
        ("k_norm", NormWeights),
        ("before", TextSide),
        ("after", TextSide),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rope_batch", c_uint64),
        ("lse", c_void_p),
        ("head_types", c_void_p),
        ("found_head_types", c_void_p),
        ("found_errors", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_uint64),
        ("seed", c_uint64),
        ("has_seed", c_uint32),
        ("head_types_from", c_uint32),
        ("spatial_half_width", c_uint32),
        ("temporal_half_width", c_uint32),
        ("scale", c_float),
        ("reserved", c_uint32),
        ("precisions", c_void_p),
        ("found_precisions", c_void_p),
        ("found_precision_errors", c_void_p),
    ]


# Handles are structures of one uint64_t, which are passed as the number itself.
_HANDLE = c_uint64
_OUT = POINTER(c_uint64)

_FUNCTIONS: dict[str, list[Any]] = {
    "device_gpu": [c_int32, _OUT],
    "device_emulator": [_OUT],
    "spec_parse": [c_char_p, c_size_t, _OUT],
    "spec_shipped": [c_char_p, _OUT],
    "spec_names": [c_char_p, c_size_t, POINTER(c_size_t)],
    "spec_info": [_HANDLE, POINTER(SpecDetails)],
    "spec_free": [_HANDLE],
    "describe": [_HANDLE, c_char_p, c_char_p, c_size_t, POINTER(c_size_t)],
    "plot": [_HANDLE, c_char_p, c_size_t, POINTER(c_size_t)],
    "study_table": [c_char_p, c_size_t, c_double, c_uint32, c_char_p, c_size_t, POINTER(c_size_t)],
    "study_schedule": [c_char_p, c_size_t, c_double, c_char_p, c_size_t, POINTER(c_size_t)],
    "study_plot": [c_char_p, c_size_t, c_double, c_char_p, c_size_t, POINTER(c_size_t)],
    "half_width": [_HANDLE, c_uint32, c_double, POINTER(c_uint32)],
    "load": [_HANDLE, _HANDLE, _OUT],
    "module_info": [_HANDLE, POINTER(ModuleDetails)],
    "attention_new": [_HANDLE, c_uint32, c_uint32, _OUT],
    "workspace_bytes": [_HANDLE, _OUT],
    "forward": [_HANDLE, POINTER(Call), c_void_p],
    "profile": [_HANDLE, POINTER(Call), c_void_p],
}


def path() -> Path:
    """Where the library lies: in this package, or where FRAMESTRIDE_LIBRARY says."""
    own = Path(__file__).with_name("libframestride.so")
    return Path(os.environ.get("FRAMESTRIDE_LIBRARY") or own)


@functools.cache
def library() -> ctypes.CDLL:
    """The library. It is loaded at the first call, so the package can be imported without it."""
    file = path()
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise refuse(
            str(file),
            f"no library that this system loads ({error})",
            "libframestride.so for x86-64 Linux, which the wheel has",
            "Install the wheel, or build it: pip install ./python in the repository",
            Status.UNSUPPORTED,
        ) from None
    loaded.framestride_last_error.restype = c_char_p
    loaded.framestride_version.restype = c_char_p
    loaded.framestride_abi_version.restype = c_uint32
    version = loaded.framestride_abi_version()
    if version < ABI_VERSION:
        raise refuse(
            str(file),
            f"version {version} of the C interface",
            f"version {ABI_VERSION} or later",
            "Unset FRAMESTRIDE_LIBRARY, or build the library again",
            Status.UNSUPPORTED,
        )
    for name, parameters in _FUNCTIONS.items():
        function = getattr(loaded, f"framestride_{name}", None)
        if function is None:
            raise refuse(
                str(file),
                f"no framestride_{name}",
                "the library of this package's version",
                "Unset FRAMESTRIDE_LIBRARY, or build the library again",
                Status.UNSUPPORTED,
            )
        function.argtypes = parameters
        function.restype = c_int32
    return loaded


def call(name: str, *arguments: Any) -> None:
    """Calls a function, and raises what it says."""
    loaded = library()
    status = getattr(loaded, f"framestride_{name}")(*arguments)
    if status != 0:
        message = loaded.framestride_last_error().decode("utf-8", "replace")
        raise Error(message, Status(status) if status in Status._value2member_map_ else Status.INTERNAL)


def handle(name: str, *arguments: Any) -> int:
    """Calls a function whose last argument is where a handle, or a u64, is written."""
    value = c_uint64()
    call(name, *arguments, ctypes.byref(value))
    return value.value


def contents(name: str, *arguments: Any, capacity: int = 1 << 12) -> bytes:
    """Calls a function whose last arguments are a buffer, its capacity, and how many bytes it needs."""
    needed = c_size_t(capacity)
    while True:
        buffer = ctypes.create_string_buffer(needed.value)
        call(name, *arguments, buffer, len(buffer), ctypes.byref(needed))
        if needed.value <= len(buffer):
            return buffer.raw[: needed.value]
