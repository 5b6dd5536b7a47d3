"""Context parallelism: processes of this machine, each with a part of the rows, exchange heads."""

import json
import os
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers_models import Loop, build, compare, model_of, outputs_of, plant, run

import framestride
from framestride.diffusers import apply, cp_plan
from framestride.diffusers.exchange import Gpus, gpus_of

pytestmark = pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="processes share no GPU here")


def one_rank(
    rank: int, ranks: int, names: list[str], first: str, heads: int, uneven: bool, folder: str, options: dict
):
    """What one process does. It leaves its outputs, what was warned of and the bits of its heads in a file."""
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    # diffusers counts GPUs here, of which there may be none.
    torch._C._get_accelerator, torch.accelerator.device_count = lambda: torch.device("cpu"), lambda: ranks
    outputs, bits = [], []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name in names:
            model, inputs = model_of(name, heads)
            config = diffusers.ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=uneven)
            if first == "parallelism":
                model.enable_parallelism(config=config, cp_plan=cp_plan(model))
            handle = apply(model, density=0.5, **options)
            if first == "apply":
                model.enable_parallelism(config=config, cp_plan=cp_plan(model))
            plant(handle, model, Gpus(ranks, uneven, rank))
            outputs += outputs_of(handle, model, inputs)
            bits += [layer.bits for layer in handle.layers]
            if handle.largest_error:
                # An apply within it undoes this one.
                study = framestride.study(Loop(model, inputs), 1, densities=[0.5], error=0.1, compute="e4m3")
                (Path(folder) / f"{rank}.json").write_text(study.text)
    check_rows(gpus_of(model._parallel_config))
    said = [str(warning.message) for warning in said if "framestride" in str(warning.message)]
    torch.save((outputs, said, bits), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def check_rows(gpus: Gpus):
    """Rows in unlike shares, which diffusers gathers through NCCL alone, between rows that all GPUs have."""
    torch.manual_seed(0)
    rows, before, after = 10, 2, 1
    q, k, v = torch.randn(3, 2, before + rows + after, 4, 8)
    attend = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)

    def joined(*own: torch.Tensor) -> torch.Tensor:
        sides = ((gpus.heads(x[:, :before]), gpus.heads(x[:, before + rows :])) for x in (q, k, v))
        return attend(*(torch.cat([first, x, last], dim=1) for x, (first, last) in zip(own, sides, strict=True)))

    own = [x[:, before : before + rows].split(gpus.shares(rows), dim=1)[gpus.rank] for x in (q, k, v)]
    first, video, last = attend(q, k, v).split([before, rows, after], dim=1)
    expected = torch.cat([first, video.split(gpus.shares(rows), dim=1)[gpus.rank], last], dim=1)
    torch.testing.assert_close(gpus.attend(*own, rows, joined, before, after), expected)


WITH_TEXT = ["HunyuanVideo", "HunyuanVideo-1.5", "CogVideoX-1.5", "Mochi"]


@pytest.mark.parametrize("ranks, names, first, heads, uneven", [
    (2, ["Wan", "Wan-VACE", *WITH_TEXT], "apply", 2, False),
    (2, ["MiniMax-H3", "Kandinsky 5 Pro", *WITH_TEXT], "parallelism", 2, False),
    (3, ["HunyuanVideo", "CogVideoX", "Wan"], "apply", 4, True),
], ids=["apply first", "parallelism first", "four heads on three"])
def test_heads_are_exchanged(ranks, names, first, heads, uneven, tmp_path, monkeypatch):
    arguments = (ranks, names, first, heads, uneven, str(tmp_path), {})
    torch.multiprocessing.spawn(one_rank, arguments, nprocs=ranks)
    outputs, said, _ = torch.load(tmp_path / "0.pt")
    assert said == []
    monkeypatch.setattr(compare, "HEADS", heads)
    for other in range(1, ranks):
        assert all(map(torch.equal, outputs, torch.load(tmp_path / f"{other}.pt")[0]))
    for name, output in zip(names, outputs, strict=True):
        model, inputs = model_of(name, heads)
        plant(apply(model, density=0.5), model, Gpus())
        alone = run(model, inputs)
        assert (output - alone).norm() / alone.norm() < 0.005, name


def test_each_process_finds_the_bits_of_its_heads(tmp_path, monkeypatch):
    name, heads, ranks = "HunyuanVideo", 4, 2
    options = {"compute": "e4m3", "largest_error": 0.02}
    monkeypatch.setattr(compare, "HEADS", heads)
    model, inputs = model_of(name, heads)
    handle = apply(model, density=0.5, **options)
    plant(handle, model, Gpus())
    outputs, bits = outputs_of(handle, model, inputs), [layer.bits for layer in handle.layers]
    assert all(layer.tolist() == [8, 8, 16, 16] for layer in bits)

    arguments = (ranks, [name], "apply", heads, False, str(tmp_path), options)
    torch.multiprocessing.spawn(one_rank, arguments, nprocs=ranks)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for output, other, expected in zip(of_ranks[0][0], of_ranks[1][0], outputs, strict=True):
        assert torch.equal(output, other) and (output - expected).norm() / expected.norm() < 0.005
    # A study has all heads in every process.
    found, other = ((tmp_path / f"{rank}.json").read_text() for rank in range(ranks))
    alone = framestride.study(Loop(model, inputs), 1, densities=[0.5], error=0.1, compute="e4m3").numbers
    assert found == other and framestride.Study(found).numbers | {"steps": None} == alone | {"steps": None}
    for layer, expected in zip(json.loads(found)["steps"][0]["layers"], alone["steps"][0]["layers"], strict=True):
        assert layer["size"] == pytest.approx(expected["size"], rel=0.01)
        # Q and K are rounded before heads are exchanged, and other rows are sampled.
        for name in ("eight_bits", "errors"):
            own, other = torch.tensor(layer[name]), torch.tensor(expected[name])
            torch.testing.assert_close(own, other, rtol=0.5, atol=0.001 * min(expected["size"]))
        # Heads stand in their order: those whose V has a mean lose less in 8 bits than all others.
        lost = torch.tensor(layer["eight_bits"][-1]) / torch.tensor(layer["size"])
        assert lost[:2].max() < 0.1 * lost[2:].min()
    # Of the heads of others, a process knows nothing.
    for rank, (_, _, found) in enumerate(of_ranks):
        assert [layer.tolist() for layer in found] == [[8, 8, 8, 8] if rank == 0 else [8, 8, 16, 16]] * len(bits)


def shared(model: torch.nn.Module, **options):
    """Sets the config of parallelism that `enable_parallelism` would, without other processes."""
    config = diffusers.ContextParallelConfig(**options, _ulysses_local_rank=0)
    model._parallel_config = diffusers.ParallelConfig(context_parallel_config=config)


@pytest.mark.parametrize("name, options, reason", [
    ("Wan", {"ring_degree": 2}, "Ulysses"),
    ("Wan", {"ulysses_degree": 2}, "150 rows on one of 2 GPUs"),
    ("MiniMax-H3", {"ulysses_degree": 4}, "2 heads for 4 GPUs"),
    ("MiniMax-H3", {"ulysses_degree": 2, "ulysses_anything": True}, "rows on one of 2 GPUs"),
], ids=["ring", "rows", "few heads", "uneven rows"])
def test_what_is_not_known_is_left_to_the_models_own_processor(name, options, reason, recwarn):
    model, inputs = build(name)
    handle = apply(model, density=0.5)
    called = []
    for processor in handle.layers:
        processor.original = lambda attn, rows, **arguments: called.append(processor) or rows
    shared(model, **options)
    run(model, inputs)
    assert len(called) == len(handle.layers)
    (message,) = [str(warning.message) for warning in recwarn if "framestride" in str(warning.message)]
    assert reason in message


@pytest.mark.parametrize("options, reason", [
    ({"ring_degree": 2}, "Ulysses"), ({"ulysses_degree": 4}, "on one of 4 GPUs"),
], ids=["ring", "rows"])
def test_text_is_never_left_to_the_models_own_processor(options, reason):
    model, inputs = build("HunyuanVideo")
    apply(model, density=0.5)
    shared(model, **options)
    with pytest.raises(ValueError, match=f"HunyuanVideo.*{reason}"):
        run(model, inputs)


def test_models_without_a_plan_are_refused():
    model, _ = build("HunyuanVideo")
    model.register_to_config(image_condition_type="token_replace")
    with pytest.raises(ValueError, match="first frame"):
        cp_plan(model)
    with pytest.raises(ValueError, match="no plan.*Allegro"):
        cp_plan(diffusers.AllegroTransformer3DModel(
            num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=1,
            cross_attention_dim=24, caption_channels=8,
        ))
