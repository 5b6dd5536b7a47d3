"""Kernels of a spec, loaded on a device."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import _library
from ._library import Error, ModuleDetails, Status, refuse
from .spec import Spec, handle_of

if TYPE_CHECKING:
    import torch

    Device = int | str | torch.device | None


@dataclass(frozen=True)
class Module:
    """Kernels of a spec, loaded on a device. They stay loaded until the process ends."""

    spec: Spec
    device: str
    """`"cpu"`, the emulator, or a GPU such as `"cuda:0"`."""
    fill_seconds: float
    """Seconds that it took to fill the numbers of the spec into the kernels."""
    load_seconds: float
    """Seconds that the device took to load them."""
    compile_seconds: float
    """Seconds of these that the driver's compiler took: 0 when the driver had them in its cache."""
    handle: int
    """The `framestride_module` of the C interface."""


@dataclass(frozen=True)
class Plan:
    """Calls of a batch and a number of heads."""

    handle: int
    """The `framestride_attention` of the C interface."""
    workspace_bytes: int


_LOCK = threading.RLock()
_DEVICES: dict[str, int] = {}
_MODULES: dict[tuple[str, str], int] = {}
_PLANS: dict[tuple[str, str, int, int], Plan] = {}


def load(spec: Spec, device: Device = None) -> Module:
    """Loads the kernels of a spec, or finds those that are loaded already.

    `device` is a GPU as PyTorch names it (`"cuda"`, `"cuda:1"`, 1, a `torch.device`), or `"cpu"` for the
    emulator. By default it is PyTorch's current GPU.

    A GPU's driver compiles them in a second or two, unless it has them in its cache. `attention` does it
    at its first call; load before you capture a CUDA graph, or where the first call should not wait.

    Raises an `Error` where the GPU does not run the kernels, with the reason.
    """
    name = _device_name(device)
    handle = _module(spec.toml, name)
    details = ModuleDetails()
    _library.call("module_info", handle, ctypes.byref(details))
    seconds = details.fill_seconds, details.load_seconds, details.compile_seconds
    return Module(spec, name, *seconds, handle)


def in_8_bits(
    spec: Spec,
    device: Device = None,
    otherwise: Callable[[str], object] = lambda reason: None,
    largest_error: float | None = None,
) -> Spec:
    """The spec with `compute="e4m3"` and a `largest_error`, whose kernels are then loaded on the device.

    It is the spec as it came where 8 bits cannot be had: for head dim 64, and on other GPUs than a Hopper.
    `otherwise` gets the reason. What else goes wrong is raised.
    """
    try:
        found = replace(spec, compute="e4m3", largest_error=largest_error)
        load(found, device)
    except Error as error:
        if error.status not in (Status.INVALID_SPEC, Status.UNSUPPORTED):
            raise
        otherwise(str(error))
        return spec
    return found


def is_loaded(toml: str, device: str) -> bool:
    """Whether the kernels of the text of a spec are loaded on a device."""
    return (toml, device) in _MODULES


def plan(toml: str, device: str, batch: int, heads: int) -> Plan:
    """Plans calls, or finds the plan that was made already."""
    key = toml, device, batch, heads
    found = _PLANS.get(key)
    if found is None:
        with _LOCK:
            handle = _library.handle("attention_new", _module(toml, device), batch, heads)
            found = _PLANS.setdefault(key, Plan(handle, _library.handle("workspace_bytes", handle)))
    return found


def _module(toml: str, device: str) -> int:
    with _LOCK:
        found = _MODULES.get((toml, device))
        if found is None:
            found = _MODULES[toml, device] = _library.handle("load", _opened(device), handle_of(toml))
        return found


def _opened(device: str) -> int:
    if device not in _DEVICES:
        if device == "cpu":
            _DEVICES[device] = _library.handle("device_emulator")
        else:
            _DEVICES[device] = _library.handle("device_gpu", int(device.removeprefix("cuda:")))
    return _DEVICES[device]


def _device_name(device: Device) -> str:
    """The name of a device with its index, as PyTorch has it."""
    name = f"cuda:{device}" if isinstance(device, int) else "cuda" if device is None else str(device)
    if name == "cuda":
        return f"cuda:{_current_gpu()}"
    kind, _, index = name.partition(":")
    if name == "cpu" or (kind == "cuda" and index.isdecimal()):
        return name
    raise refuse("device", repr(name), '"cuda", "cuda:N", N or "cpu" (the emulator)', "Name a GPU, or the emulator")


def _current_gpu() -> int:
    """PyTorch's current GPU, or the first one where PyTorch is not in use."""
    import sys

    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_available() else 0
