"""Attention over video in vllm-omni, by framestride.

vllm-omni calls a backend with Q, K and V after norm and RoPE, and models publish where the video lies
(`VideoTokenLayout`). What is not known to be attention over video goes to the backend that vllm-omni
would choose.
"""

import math
import re

import torch
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from vllm_omni.diffusion.attention.selector import get_attn_backend_for_role
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

import framestride
from framestride import backends


class FramestrideBackend(AttentionBackend):
    """Stands in for RAINFUSION_ATTN, which is for NPUs, on GPUs of NVIDIA. So its options are `block_sparse`."""

    supported_platforms = ("cuda",)

    @classmethod
    def supports_packed_mask_free(cls) -> bool:
        # Rows behind those that a layout says are used are seen by nobody.
        return True

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        return True

    @staticmethod
    def get_name() -> str:
        return "FRAMESTRIDE"

    @staticmethod
    def get_impl_cls() -> type["FramestrideImpl"]:
        return FramestrideImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> None:
        return None

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []


class FramestrideImpl(AttentionImpl):
    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False,
        num_kv_heads: int | None = None, prefix: str = "", qkv_layout: str | None = None,
        backend_kwargs: dict | None = None, role: str = "self", **options,
    ) -> None:
        given = backend_kwargs or {}
        self.density = 1.0 - given.get("sparsity", 0.0)
        self.compute = "e4m3" if given.get("precision") == "fp8" else "dtype"
        self.start_step, self.end_step = given.get("start_step", 0), given.get("end_step", 0)
        layers = re.findall(r"\.(\d+)\.", prefix)
        self.stays_dense = bool(layers) and int(layers[0]) in given.get("skip_layers", ())
        self.scale, self.causal = softmax_scale, causal
        # No configuration: what vllm-omni chooses by itself.
        chosen, _ = get_attn_backend_for_role(role, head_size)
        self.other = chosen.get_impl_cls()(
            num_heads=num_heads, head_size=head_size, softmax_scale=softmax_scale, causal=causal,
            num_kv_heads=num_kv_heads, prefix=prefix, qkv_layout=qkv_layout, role=role, **options,
        )

    @torch.compiler.disable
    def forward_cuda(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Attention of [B, S, H, D]."""
        found = self.video(query, key, value, attn_metadata)
        if found is None:
            return self.other.forward(query, key, value, attn_metadata)
        start, grid, used = found
        batch, rows, heads, head_dim = query.shape
        after = rows - start - math.prod(grid)
        dense = self.stays_dense or not self.step_is_sparse()
        density = 1.0 if dense else self.density
        # All rows of Wan see the first frame, and Wan has no rows before the video.
        shape = ("vllm_omni", tuple(grid), heads, head_dim, query.dtype, start, after, 1 if start == 0 else 0)
        spec, options = backends.plan(density, self.compute, query.device, *shape)
        if after > 0:
            # Rows between the video and those that are used are valid, such as sound. The rest is padding.
            valid = used - start - math.prod(grid)
            options |= {"after": framestride.Text(lengths=query.new_full([batch], valid, dtype=torch.int32))}
        return framestride.attention(query, key, value, spec, scale=self.scale, **options)

    def video(self, query, key, value, metadata) -> tuple[int, tuple[int, int, int], int] | None:
        """Where the video begins, its frames, height and width, and how many rows are used."""
        layout = None if metadata is None else metadata.video_layout
        if layout is None or self.causal or query.ndim != 4 or not backends.takes(query, key, value):
            return None
        if metadata.full_attn_spans is not None or metadata.query_ranges is not None:
            return None
        if layout.video_spans:
            targets = [span for span in layout.video_spans if span.role == "target"]
            if not targets:
                return None
            # Other videos are seen whole, as references.
            target = max(targets, key=lambda span: span.length)
            start, grid = target.start, target.latent_grid
        elif layout.latent_grid is not None:
            start, grid = layout.prefix_len or 0, layout.latent_grid
        else:
            return None
        end = start + math.prod(grid)
        used = end if layout.used_len is None else layout.used_len
        return (start, grid, used) if min(grid) > 0 and end <= used <= query.shape[1] else None

    def step_is_sparse(self) -> bool:
        """Whether neither the first nor the last steps, which stay dense, are under way."""
        context = get_forward_context() if is_forward_context_available() else None
        step = None if context is None else context.denoise_step_idx
        count = None if context is None else context.total_denoise_steps
        if step is None:
            return self.start_step == 0 and self.end_step == 0
        early = step < self.start_step
        late = self.end_step > 0 and (count is None or step >= count - self.end_step)
        return not early and not late


def register() -> None:
    """The entry point: from now on RAINFUSION_ATTN is framestride."""
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum, register_diffusion_backend

    path = f"{__name__}.{FramestrideBackend.__qualname__}"
    register_diffusion_backend(DiffusionAttentionBackendEnum.RAINFUSION_ATTN, path)
