"""Attention over video in SGLang's diffusion engine, by framestride.

SGLang calls a backend with Q, K and V after norm and RoPE, and tells it the size of the latents, the step
and a sparsity. What is not known to be attention over video goes to the backend that SGLang would choose.
"""

import math
from dataclasses import dataclass
from pkgutil import resolve_name

import torch
from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum, current_platform
from sglang.multimodal_gen.runtime.server_args import get_global_server_args

import framestride
from framestride import backends


class FramestrideBackend(AttentionBackend):
    """Stands in for RAIN_FUSION_ATTN, which is for NPUs, on GPUs of NVIDIA. SGLang tells it what it tells that."""

    accept_output_buffer = True

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return list(backends.HEAD_DIMS)

    @staticmethod
    def get_enum() -> AttentionBackendEnum:
        return AttentionBackendEnum.RAIN_FUSION_ATTN

    @staticmethod
    def get_impl_cls() -> type["FramestrideImpl"]:
        return FramestrideImpl

    @staticmethod
    def get_metadata_cls() -> type["FramestrideMetadata"]:
        return FramestrideMetadata

    @staticmethod
    def get_builder_cls() -> type["FramestrideMetadataBuilder"]:
        return FramestrideMetadataBuilder


@dataclass
class FramestrideMetadata(AttentionMetadata):
    # The density of this step, and what tensor cores multiply.
    density: float
    compute: str
    # Frames, height and width of the video in patches.
    grid: tuple[int, int, int]


class FramestrideMetadataBuilder(AttentionMetadataBuilder):
    def build(
        self, current_timestep: int, skip_first_steps: int, sparsity: float, raw_latent_shape, patch_size, **options,
    ) -> FramestrideMetadata:
        """`current_timestep` is the number of the step. The first ones stay dense."""
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity is {sparsity}. It is the part of all pairs that no head sees: from 0, below 1")
        # SGLang hands on its own options alone.
        compute = (get_global_server_args().attention_backend_config or {}).get("compute", "dtype")
        if compute not in ("dtype", "e4m3"):
            raise ValueError(f"compute is {compute!r}. It is 'dtype' or 'e4m3'")
        grid = tuple(size // patch for size, patch in zip(raw_latent_shape[-3:], patch_size, strict=True))
        density = 1.0 if current_timestep < skip_first_steps else 1.0 - sparsity
        return FramestrideMetadata(current_timestep, density, compute, grid)


class FramestrideImpl(AttentionImpl):
    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False,
        num_kv_heads: int | None = None, prefix: str = "", **options,
    ) -> None:
        self.scale, self.causal = softmax_scale, causal
        # No selection: what SGLang chooses by itself.
        chosen = resolve_name(current_platform.get_attn_backend_cls_str(None, head_size, torch.bfloat16))
        self.other = chosen.get_impl_cls()(
            num_heads=num_heads, head_size=head_size, softmax_scale=softmax_scale, causal=causal,
            num_kv_heads=num_kv_heads, prefix=prefix, **options,
        )

    @torch.compiler.disable
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: FramestrideMetadata
    ) -> torch.Tensor:
        """Attention of [B, S, H, D]."""
        takes = backends.takes(query, key, value) and not self.causal
        ours = isinstance(attn_metadata, FramestrideMetadata) and takes
        if not ours or query.shape[1] != math.prod(attn_metadata.grid):
            # SGLang made the metadata for this backend, and no other one reads them.
            return self.other.forward(query, key, value, None)
        _, _, heads, head_dim = query.shape
        # All rows of Wan see the first frame.
        shape = ("sglang", attn_metadata.grid, heads, head_dim, query.dtype, 0, 0, 1)
        spec, options = backends.plan(attn_metadata.density, attn_metadata.compute, query.device, *shape)
        return framestride.attention(query, key, value, spec, scale=self.scale, **options)


class Resolver:
    """How SGLang's table of backends finds this one."""

    backend = AttentionBackendEnum.RAIN_FUSION_ATTN

    @classmethod
    def resolve(cls, platform) -> str:
        return f"{FramestrideBackend.__module__}.{FramestrideBackend.__qualname__}"


def register() -> None:
    """The entry point: from now on rain_fusion_attn is framestride, on GPUs of NVIDIA."""
    from sglang.multimodal_gen.runtime.platforms import cuda

    cuda._CUDA_ATTENTION_BACKEND_RESOLVERS[Resolver.backend] = Resolver
