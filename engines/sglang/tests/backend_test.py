"""The backend, as SGLang calls it: with its real classes of backends and its table of them, and without its engine.

Its packages import kernels for GPUs, so empty ones stand in for them, for logging and for the platform, which
is a GPU here. The package must be installed with `pip install --no-deps sglang==0.5.23`.
"""

import importlib.util
import logging
import math
import os
import sys
import tomllib
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType, SimpleNamespace

import pytest
import torch

import framestride

torch.set_default_device(os.environ.get("FRAMESTRIDE_TEST_DEVICE", "cpu"))
FOLDER = Path(__file__).parents[1]
sys.path.insert(0, str(FOLDER))
PACKAGE = Path(importlib.util.find_spec("sglang").origin).parent
RUNTIME = "sglang.multimodal_gen.runtime"


def module(name: str, path: Path | None = None, **contents: object):
    made = sys.modules[name] = ModuleType(name)
    made.__path__ = [] if path is None else [str(path)]
    vars(made).update(contents)


for package in (
    "sglang", "sglang.kernels", "sglang.srt", "sglang.multimodal_gen", "sglang.multimodal_gen.third_party", RUNTIME,
    f"{RUNTIME}.layers", f"{RUNTIME}.layers.attention", f"{RUNTIME}.layers.attention.backends", f"{RUNTIME}.platforms",
):
    module(package, PACKAGE.joinpath(*package.split(".")[1:]))
module(f"{RUNTIME}.utils")
module(f"{RUNTIME}.utils.common", get_bool_env_var=lambda name, default="false": default == "true")
module(f"{RUNTIME}.utils.logging_utils", init_logger=logging.getLogger)

config = {}
module(f"{RUNTIME}.server_args", get_global_server_args=lambda: SimpleNamespace(attention_backend_config=config))

interface = importlib.import_module(f"{RUNTIME}.platforms.interface")


class Platform:
    """SGLang's platform for CUDA, with SDPA where it looks for packages."""

    @staticmethod
    def get_attn_backend_cls_str(selected_backend, head_size, dtype):
        cuda = importlib.import_module(f"{RUNTIME}.platforms.cuda")
        selected = selected_backend or interface.AttentionBackendEnum.TORCH_SDPA
        return cuda._CUDA_ATTENTION_BACKEND_RESOLVERS[selected].resolve(Platform)


vars(sys.modules[f"{RUNTIME}.platforms"]).update(
    AttentionBackendEnum=interface.AttentionBackendEnum, current_platform=Platform
)

LATENT, PATCH, GRID, HEADS, DIM = (1, 16, 4, 12, 16), (1, 2, 2), (4, 6, 8), 2, 64
VIDEO = math.prod(GRID)


@pytest.fixture(autouse=True)
def registered():
    """What SGLang does with the entry points of its group."""
    group = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["entry-points"]
    resolve_name(group["sglang.multimodal_gen.plugins"]["framestride"])()
    config.clear()


def backend() -> type:
    rain_fusion = interface.AttentionBackendEnum["rain_fusion_attn".upper()]
    return resolve_name(Platform.get_attn_backend_cls_str(rain_fusion, DIM, torch.bfloat16))


def implementation(causal: bool = False, dim: int = DIM):
    """One layer's, made as `USPAttention` makes it."""
    return backend().get_impl_cls()(
        num_heads=HEADS, head_size=dim, softmax_scale=dim**-0.5, num_kv_heads=HEADS, causal=causal,
        is_cross_attention=False, prefix="blocks.0.attn1.attn",
    )


def metadata(sparsity: float, step: int = 20, skip_first_steps: int = 10, shape: tuple = LATENT):
    """A step's, built as the denoising stage builds it for RAIN_FUSION_ATTN."""
    return backend().get_builder_cls()().build(
        current_timestep=step, skip_first_steps=skip_first_steps, sparsity=sparsity, raw_latent_shape=shape,
        patch_size=PATCH,
    )


def inputs(rows: int = VIDEO, dim: int = DIM) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, rows, HEADS, dim).to(torch.bfloat16) for _ in "qkv"]


def dense(q, k, v) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_the_table_of_backends_has_it():
    assert backend().__name__ == "FramestrideBackend"
    assert backend().get_enum().is_sparse and DIM in backend().get_supported_head_sizes()


@pytest.mark.parametrize("shape", [LATENT, LATENT[2:]], ids=["five", "three"])
def test_dense_is_what_torch_computes(shape):
    q, k, v = inputs()
    assert distance(implementation().forward(q, k, v, metadata(0.0, shape=shape)), dense(q, k, v)) < 0.01


def test_sparse_heads_see_a_part():
    q, k, v = inputs()
    out = implementation().forward(q, k, v, metadata(0.4))
    spec = framestride.Spec(
        frames=4, tokens_per_frame=48, heads=HEADS, head_dim=DIM, spatial=0.6, temporal=0.6, sink_frames=1
    )
    assert torch.equal(out, framestride.attention(q, k, v, spec))
    assert distance(out, dense(q, k, v)) > 0.05


def test_8_bits_are_near_16_and_there_are_16_where_they_cannot_be_had(caplog):
    outs = {}
    for compute in (None, "e4m3"):
        config.update({"compute": compute} if compute else {})
        outs[compute] = [implementation(dim=dim).forward(*inputs(dim=dim), metadata(0.4)) for dim in (DIM, 128)]
    (small, wide), (same, narrow) = outs[None], outs["e4m3"]
    assert torch.equal(small, same) and 0.005 < distance(narrow, wide) < 0.1
    (record,) = caplog.records
    assert "is in 16 bits" in record.message and "head_dim = 64" in record.message
    config["compute"] = "fp8"
    with pytest.raises(ValueError, match="compute is 'fp8'"):
        metadata(0.4)


@pytest.mark.parametrize("step, is_dense", [(0, True), (9, True), (10, False)])
def test_the_first_steps_are_dense(step, is_dense):
    q, k, v = inputs()
    out = implementation().forward(q, k, v, metadata(0.4, step))
    assert (distance(out, dense(q, k, v)) < 0.01) == is_dense


@pytest.mark.parametrize("change", ["no metadata", "text", "f32", "keys", "causal"])
def test_what_is_not_known_goes_to_sglangs_own(change):
    q, k, v = inputs(VIDEO + 20 if change == "text" else VIDEO)
    if change == "f32":
        q, k, v = (x.float() for x in (q, k, v))
    elif change == "keys":
        k, v = k[:, :50], v[:, :50]
    ours = implementation(causal=change == "causal")
    out = ours.forward(q, k, v, None if change == "no metadata" else metadata(0.4))
    assert torch.equal(out, ours.other.forward(q, k, v, None))
    assert type(ours.other).__name__ == "SDPAImpl"


def test_a_density_that_the_first_frame_alone_exceeds_is_said(caplog):
    q, k, v = inputs()
    assert distance(implementation().forward(q, k, v, metadata(0.9)), dense(q, k, v)) < 0.01
    assert "stays dense" in caplog.text


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_is_a_part(sparsity):
    with pytest.raises(ValueError, match="sparsity is"):
        metadata(sparsity)
