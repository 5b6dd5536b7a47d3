"""The backend, as vllm-omni calls it: with its real classes of backends, and without vllm.

vllm needs a CUDA machine and gigabytes, so small modules stand in for what these classes import of it, for
the platform, which is a GPU here, and for the forward's context. The package must be installed with
`pip install --no-deps vllm-omni==0.30.0`.
"""

import importlib.util
import logging
import math
import os
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType, SimpleNamespace

import pytest
import torch

import framestride

torch.set_default_device(os.environ.get("FRAMESTRIDE_TEST_DEVICE", "cpu"))
FOLDER = Path(__file__).parents[1]
sys.path.insert(0, str(FOLDER))
PACKAGE = Path(importlib.util.find_spec("vllm_omni").origin).parent


class Platform:
    def __getattr__(self, name):
        return lambda *arguments: name == "is_cuda"

    def get_device_capability(self):
        return None

    def get_diffusion_attn_backend_cls(self, selected_backend, head_size, allow_trtllm_default=True):
        """vllm-omni's platform for CUDA, with SDPA where it looks for packages."""
        from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

        return DiffusionAttentionBackendEnum[selected_backend or "TORCH_SDPA"].get_path()


def module(name: str, path: Path | None = None, **contents: object):
    made = sys.modules[name] = ModuleType(name)
    made.__path__ = [] if path is None else [str(path)]
    vars(made).update(contents)


def logger(name: str) -> logging.Logger:
    made = logging.getLogger(name)
    made.warning_once, made.info_once = made.warning, made.info
    return made


context = SimpleNamespace(denoise_step_idx=None, total_denoise_steps=None)
module("vllm")
module("vllm.logger", init_logger=logger)
module("vllm.utils")
module("vllm.utils.import_utils", resolve_obj_by_qualname=resolve_name)
# Packages alone, since what stands in their own files imports vllm.
for package in ("", ".diffusion", ".diffusion.attention", ".diffusion.attention.backends"):
    module(f"vllm_omni{package}", PACKAGE.joinpath(*package.split(".")[1:]))
module("vllm_omni.platforms", current_omni_platform=Platform())
module(
    "vllm_omni.diffusion.forward_context", get_forward_context=lambda: context, is_forward_context_available=lambda: True
)

from vllm_omni.diffusion.attention.backends.abstract import (  # noqa: E402
    AttentionMetadata,
    VideoTokenLayout,
    VideoTokenSpan,
)
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum  # noqa: E402
from vllm_omni.diffusion.attention.selector import get_attn_backend_for_role  # noqa: E402

GRID, HEADS, DIM = (4, 6, 8), 2, 64
VIDEO = math.prod(GRID)


@pytest.fixture(autouse=True)
def registered():
    """What vllm-omni does with the entry points of its group."""
    group = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["entry-points"]
    resolve_name(group["vllm_omni.general_plugins"]["framestride"])()
    context.denoise_step_idx = context.total_denoise_steps = None


def implementation(
    prefix: str = "blocks.3.attn1", causal: bool = False, role: str = "self", dim: int = DIM, **block_sparse
):
    """One layer's, made as `Attention` makes it of a configuration with `block_sparse`."""
    attention_config = SimpleNamespace(
        resolve_with_source=lambda role, role_category: (SimpleNamespace(backend="RAINFUSION_ATTN"), "test")
    )
    backend, _ = get_attn_backend_for_role(role, dim, attention_config)
    return backend.get_impl_cls()(
        num_heads=HEADS, head_size=dim, softmax_scale=dim**-0.5, causal=causal, num_kv_heads=HEADS, qkv_layout=None,
        prefix=prefix, backend_kwargs=block_sparse, role=role, backend_explicit=True,
    )


def inputs(rows: int, batch: int = 1, dim: int = DIM) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, rows, HEADS, dim).to(torch.bfloat16) for _ in "qkv"]


def dense(q, k, v) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


LAYOUTS = {
    "Wan": VideoTokenLayout(prefix_len=0, latent_grid=GRID, used_len=VIDEO),
    "a prefix": VideoTokenLayout(prefix_len=20, latent_grid=GRID),
    "no prefix said": VideoTokenLayout(latent_grid=GRID),
    "references and sound": VideoTokenLayout(
        used_len=10 + 24 + VIDEO + 7,
        video_spans=(VideoTokenSpan(10, (1, 4, 6), "reference"), VideoTokenSpan(34, GRID, "target")),
    ),
}


def used_rows(layout: VideoTokenLayout) -> int:
    return layout.used_len or (layout.prefix_len or 0) + VIDEO


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("name", LAYOUTS)
def test_dense_is_what_torch_computes(name, padding):
    layout = LAYOUTS[name]
    used = used_rows(layout)
    q, k, v = inputs(used + padding, batch=2)
    out = implementation(sparsity=0.0).forward(q, k, v, AttentionMetadata(video_layout=layout))
    assert distance(out[:, :used], dense(*(x[:, :used] for x in (q, k, v)))) < 0.01
    assert out[:, used:].eq(0).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_sparse_heads_see_a_part(name):
    layout = LAYOUTS[name]
    start = layout.video_spans[-1].start if layout.video_spans else layout.prefix_len or 0
    q, k, v = inputs(used_rows(layout))
    out = implementation(sparsity=0.4).forward(q, k, v, AttentionMetadata(video_layout=layout))
    spec = framestride.Spec(
        frames=4, tokens_per_frame=48, before=start, after=q.shape[1] - start - VIDEO, heads=HEADS, head_dim=DIM,
        spatial=0.6, temporal=0.6, sink_frames=0 if start else 1,
    )
    assert torch.equal(out, framestride.attention(q, k, v, spec))
    assert distance(out, dense(q, k, v)) > 0.05


def test_8_bits_are_near_16_and_there_are_16_where_they_cannot_be_had(caplog):
    metadata, outs = AttentionMetadata(video_layout=LAYOUTS["a prefix"]), {}
    for precision in ("bf16", "fp8"):
        made = [implementation(dim=dim, sparsity=0.4, precision=precision) for dim in (DIM, 128)]
        outs[precision] = [
            one.forward(*inputs(VIDEO + 20, dim=dim), metadata) for one, dim in zip(made, (DIM, 128), strict=True)
        ]
    (small, wide), (same, narrow) = outs["bf16"], outs["fp8"]
    assert torch.equal(small, same) and 0.005 < distance(narrow, wide) < 0.1
    (record,) = caplog.records
    assert "is in 16 bits" in record.message and "head_dim = 64" in record.message


@pytest.mark.parametrize("step, count, layer, is_dense", [
    (1, 10, 3, True), (2, 10, 3, False), (7, 10, 3, False), (8, 10, 3, True), (5, 10, 1, True), (None, None, 3, True),
    (5, None, 3, True),
])
def test_steps_and_layers_stay_dense(step, count, layer, is_dense):
    context.denoise_step_idx, context.total_denoise_steps = step, count
    q, k, v = inputs(VIDEO)
    sparse = implementation(f"blocks.{layer}.attn1", sparsity=0.4, start_step=2, end_step=2, skip_layers=[1])
    out = sparse.forward(q, k, v, AttentionMetadata(video_layout=LAYOUTS["Wan"]))
    assert (distance(out, dense(q, k, v)) < 0.01) == is_dense


@pytest.mark.parametrize("change", ["no metadata", "no layout", "nothing said", "f32", "keys", "causal", "short", "spans"])
def test_what_is_not_known_goes_to_vllm_omnis_own(change):
    q, k, v = inputs(VIDEO)
    metadata = AttentionMetadata(video_layout=LAYOUTS["Wan"])
    if change == "no metadata":
        metadata = None
    elif change == "no layout":
        metadata = AttentionMetadata()
    elif change == "nothing said":
        metadata = AttentionMetadata(video_layout=VideoTokenLayout())
    elif change == "f32":
        q, k, v = (x.float() for x in (q, k, v))
    elif change == "keys":
        k, v = k[:, :50], v[:, :50]
    elif change == "short":
        q, k, v = (x[:, :-1] for x in (q, k, v))
    elif change == "spans":
        metadata = replace(metadata, full_attn_spans=[[(0, VIDEO)]])
    ours = implementation(causal=change == "causal", sparsity=0.4)
    out = ours.forward(q, k, v, metadata)
    assert torch.equal(out, ours.other.forward(q, k, v, metadata))
    assert type(ours.other).__name__ == "SDPAImpl"


def test_a_density_that_text_alone_exceeds_is_said(caplog):
    q, k, v = inputs(VIDEO + 20)
    out = implementation(sparsity=0.95).forward(q, k, v, AttentionMetadata(video_layout=LAYOUTS["a prefix"]))
    assert distance(out, dense(q, k, v)) < 0.01
    assert "stays dense" in caplog.text


def test_it_is_for_gpus_of_nvidia():
    backend = DiffusionAttentionBackendEnum.RAINFUSION_ATTN.get_class()
    assert backend.get_name() == "FRAMESTRIDE" and backend.supported_platforms == ("cuda",)
    assert backend.supports_attention_mask() and backend.supports_packed_mask_free()
