"""Sparse attention for video diffusion transformers on NVIDIA Hopper GPUs.

`attention` computes one layer on tensors of PyTorch, for the shape that a `Spec` describes.
"""

from ._library import Error, Status
from .attention import Norm, Profile, Text, attention, profile
from .module import Module, load
from .spec import QkNorm, Rope, Schedule, Spec, Width, describe, plot

__all__ = [
    "Error",
    "Module",
    "Norm",
    "Profile",
    "QkNorm",
    "Rope",
    "Schedule",
    "Spec",
    "Status",
    "Text",
    "Width",
    "attention",
    "describe",
    "load",
    "plot",
    "profile",
]
