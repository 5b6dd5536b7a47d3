"""The backend, as xfuser calls it, with the real package on the emulator."""

import math
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType
from xfuser.core.distributed.attention_schedule import AttentionSchedule
from xfuser.core.distributed.runtime_state import RuntimeState
from xfuser.model_executor.layers import usp

import framestride

torch.set_default_device(os.environ.get("FRAMESTRIDE_TEST_DEVICE", "cpu"))
FOLDER = Path(__file__).parents[1]
sys.path.insert(0, str(FOLDER))
import framestride_xfuser  # noqa: E402

GRID, TEXT, HEADS, DIM = (4, 6, 8), 20, 2, 64
ROWS = math.prod(GRID)


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    """What xfuser knows in a process of its own, which a pipeline would set up on a GPU."""
    config = SimpleNamespace(use_spargeattn_head_balance=False, attention_backend=None, use_hybrid_attn_schedule=False)
    state = object.__new__(RuntimeState)
    state.runtime_config, state.fp8_comms, state.parallel_config = config, None, SimpleNamespace(ring_degree=1)
    state._select_attention_backend = lambda: AttentionBackendType.SDPA
    for module in (usp, framestride_xfuser):
        monkeypatch.setattr(module, "get_runtime_state", lambda: state)
    for name in ("sequence_parallel", "ulysses_parallel", "ring_parallel"):
        monkeypatch.setattr(usp, f"get_{name}_world_size", lambda: 1)
    return state


def inputs(rows: int = ROWS, dtype: torch.dtype = torch.bfloat16, dim: int = DIM) -> list[torch.Tensor]:
    torch.manual_seed(0)
    # As xfuser has them: [B, H, S, D], transposed from [B, S, H, D].
    return [torch.randn(2, rows, HEADS, dim).to(dtype).transpose(1, 2) for _ in "qkv"]


def through(backend: AttentionBackendType, q, k, v, runtime, **attention_kwargs) -> torch.Tensor:
    """The way of a model: USP asks the runtime which backend there is."""
    runtime.set_attention_backend(backend)
    return usp.USP(q, k, v, attention_kwargs=attention_kwargs)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_the_backend_has_a_name_that_xfuser_knows():
    framestride_xfuser.register()
    backend = framestride_xfuser.register(density=0.5)
    assert AttentionBackendType["FRAMESTRIDE"] is backend and list(AttentionBackendType)[-1] is backend
    schedule = AttentionSchedule.from_comma_delimited_string("SDPA,framestride")
    assert schedule.get_backend(1) is backend


def test_the_program_of_the_page_runs_xfusers_own(monkeypatch):
    run = []
    monkeypatch.setattr(runpy, "run_module", lambda name, run_name: run.append((name, run_name)))
    (program,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    exec(compile(program, "the program of the page", "exec"), {})
    assert run == [("xfuser.runner", "__main__")] and "FRAMESTRIDE" in AttentionBackendType.__members__
    assert ATTENTION_FUNCTION_REGISTRY[AttentionBackendType["FRAMESTRIDE"]].args == (0.25, "dtype")


def test_dense_is_what_sdpa_computes(runtime):
    backend = framestride_xfuser.register(density=1.0)
    q, k, v = inputs()
    theirs = through(AttentionBackendType.SDPA, q, k, v, runtime)
    assert distance(through(backend, q, k, v, runtime, thw=GRID), theirs) < 0.01
    # Where no model says the size of the video, too.
    assert distance(through(backend, q, k, v, runtime), theirs) < 0.01


def test_log_sum_exps_merge_chunks_of_keys(runtime):
    """What a ring does, each of whose GPUs has a part of the keys."""
    call = ATTENTION_FUNCTION_REGISTRY[framestride_xfuser.register(density=0.5)]
    q, k, v = inputs()
    theirs = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    half = ROWS // 2
    merged = []
    for queries in q.split(half, dim=2):
        parts = [call(queries, *rows, dropout_p=0.0, is_causal=False, attention_kwargs={"thw": GRID})
                 for rows in zip(k.split(half, dim=2), v.split(half, dim=2))]
        outs, lses = (torch.stack(part).float() for part in zip(*parts))
        merged.append((outs * lses.softmax(dim=0)[..., None]).sum(dim=0))
    assert distance(torch.cat(merged, dim=2), theirs) < 0.01


def test_sparse_heads_see_a_part(runtime):
    backend = framestride_xfuser.register(density=0.5)
    q, k, v = inputs()
    ours = through(backend, q, k, v, runtime, thw=GRID)
    spec = framestride.Spec(
        frames=4, tokens_per_frame=48, heads=HEADS, head_dim=DIM, spatial=0.5, temporal=0.5, sink_frames=1
    )
    expected = framestride.attention(*(x.transpose(1, 2) for x in (q, k, v)), spec)
    assert torch.equal(ours.transpose(1, 2), expected)
    assert distance(ours, through(AttentionBackendType.SDPA, q, k, v, runtime)) > 0.1


def test_text_behind_the_video_is_seen_as_far_as_it_is_valid(runtime):
    backend = framestride_xfuser.register(density=1.0)
    q, k, v = inputs(ROWS + TEXT)
    mask = torch.arange(TEXT) < torch.tensor([[7], [TEXT]])
    ours = through(backend, q, k, v, runtime, thw=GRID, encoder_sequence_length=TEXT, text_mask=mask)
    keys = torch.cat([torch.ones(2, ROWS, dtype=torch.bool), mask], dim=1)[:, None, None]
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
    assert distance(ours[:, :, :ROWS], theirs[:, :, :ROWS]) < 0.01
    assert ours[0, :, ROWS + 7 :].eq(0).all()


@pytest.mark.parametrize("change", ["f32", "keys", "mask"])
def test_what_is_not_known_goes_to_xfusers_own(change, runtime):
    backend = framestride_xfuser.register(density=0.5)
    q, k, v = inputs(dtype=torch.float32 if change == "f32" else torch.bfloat16)
    if change == "keys":
        k, v = k[:, :, :50], v[:, :, :50]
    mask = {"attn_mask": torch.rand(2, 1, 1, ROWS) < 0.5} if change == "mask" else {}
    ours = through(backend, q, k, v, runtime, thw=GRID, **mask)
    assert torch.equal(ours, through(AttentionBackendType.SDPA, q, k, v, runtime, thw=GRID, **mask))


def test_a_density_that_text_alone_exceeds_is_said(runtime, caplog):
    backend = framestride_xfuser.register(density=0.05)
    q, k, v = inputs(ROWS + TEXT)
    ours = through(backend, q, k, v, runtime, thw=GRID, encoder_sequence_length=TEXT)
    assert distance(ours, through(AttentionBackendType.SDPA, q, k, v, runtime)) < 0.01
    assert "stays dense" in caplog.text


def test_8_bits_are_near_16_and_there_are_16_where_they_cannot_be_had(runtime, caplog):
    outs = {}
    for compute in ("dtype", "e4m3"):
        backend = framestride_xfuser.register(density=0.5, compute=compute)
        outs[compute] = [through(backend, *inputs(dim=dim), runtime, thw=GRID) for dim in (DIM, 128)]
    (small, wide), (same, narrow) = outs["dtype"], outs["e4m3"]
    assert torch.equal(small, same) and 0.005 < distance(narrow, wide) < 0.1
    (record,) = [record for record in caplog.records if record.name == "framestride"]
    assert "is in 16 bits" in record.message and "head_dim = 64" in record.message


@pytest.mark.parametrize("wrong", [{"density": 0}, {"density": 1.5}, {"compute": "fp8"}])
def test_an_option_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        framestride_xfuser.register(**wrong)
