"""Arrays of other libraries, such as CuPy, JAX and NumPy, in place of tensors of PyTorch.

Both sides share memory through DLPack, which also makes the streams of both wait for each other.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any, Protocol, TypeVar

from ._library import refuse

F = TypeVar("F", bound=Callable[..., Any])


class Array(Protocol):
    """An array that DLPack can share."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...


def taking_arrays(function: F) -> F:
    """Makes a function of tensors take arrays of any library as well. It then returns that library's."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        from ._op import is_tensor, of_array

        q = arguments[0] if arguments else options.get("q")
        if is_tensor(q):
            return function(*arguments, **options)
        if not hasattr(q, "__dlpack__"):
            allowed = "a tensor of PyTorch, or an array with __dlpack__"
            raise refuse("q", type(q).__name__, allowed, "Make a tensor or an array of it")
        share = functools.partial(_shared, of_array)
        found = function(*(_each(share, value) for value in arguments), **_each(share, options))
        return _each(functools.partial(_shared, _library_of(q).from_dlpack), found)

    return call  # type: ignore[return-value]


def _each(convert: Callable[[Any], Any], value: Any) -> Any:
    """A value with other arrays in place of those within it."""
    if hasattr(value, "__dlpack__"):
        return convert(value)
    if isinstance(value, dict):
        return {name: _each(convert, part) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [_each(convert, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type) and any(hasattr(part, "__dlpack__") for part in _parts(value)):
        return replace(value, **_each(convert, vars(value)))
    return value


def _parts(value: Any) -> list[Any]:
    return [part for parts in vars(value).values() for part in (parts if isinstance(parts, tuple) else (parts,))]


def _shared(convert: Callable[[Any], Any], array: Any) -> Any:
    try:
        return convert(array)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        kind = f"{type(array).__name__} of {getattr(array, 'dtype', 'an unknown type')}"
        allowed = "what DLPack shares: arrays in memory, those of NumPy in float16. What jax.jit traces is none"
        raise refuse("arrays", f"{kind} ({error})", allowed, "Copy it to such an array, or pass tensors of PyTorch") from None


def _library_of(array: Any) -> Any:
    """The module that makes arrays of this kind."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]
