"""Sparse attention for video diffusion transformers on NVIDIA GPUs.

`attention` computes one layer on tensors of PyTorch, for the shape that a `Spec` describes.
"""

from ._library import Error, Status
from .attention import Norm, Profile, Text, attention, profile
from .module import Module, in_8_bits, load
from .spec import QkNorm, Rope, Schedule, Spec, Width, describe, plot
from .study import DensitySchedule, ScheduledStep, Study, study

__all__ = [
    "DensitySchedule",
    "Error",
    "Module",
    "Norm",
    "Profile",
    "QkNorm",
    "Rope",
    "Schedule",
    "ScheduledStep",
    "Spec",
    "Status",
    "Study",
    "Text",
    "Width",
    "attention",
    "describe",
    "in_8_bits",
    "load",
    "plot",
    "profile",
    "study",
]
