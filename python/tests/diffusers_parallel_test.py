"""Context parallelism: two processes of this machine, each with half of the rows, exchange heads."""

import os
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers_models import build, position_codes, run

from framestride.diffusers import apply

RANKS = 2
pytestmark = pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="processes share no GPU here")


def plant(handle: object, model: torch.nn.Module, rank: int = 0, ranks: int = 1):
    """Makes the first head spatial and the second temporal, so that rounding decides about no type."""
    attention = [module for module in model.modules() if getattr(module, "processor", None) in handle.layers]

    def hook(module, inputs, output):
        codes = position_codes(output.shape[-1] // 2).to(output.dtype)
        rows = torch.arange(output.shape[1]) + output.shape[1] * rank
        # The video comes last.
        places = rows - (output.shape[1] * ranks - len(codes))
        planted = output.clone()
        planted[:, places >= 0] = codes[places[places >= 0]]
        return planted

    for module in attention:
        module.to_q.register_forward_hook(hook)
        module.to_k.register_forward_hook(hook)


def one_rank(rank: int, name: str, first: str, folder: str):
    """What one process does. It leaves its output and what was warned of in a file."""
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    # diffusers counts GPUs here, of which there may be none.
    torch._C._get_accelerator, torch.accelerator.device_count = lambda: torch.device("cpu"), lambda: RANKS
    model, inputs = build(name)
    config = diffusers.ContextParallelConfig(ulysses_degree=RANKS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if first == "parallelism":
            model.enable_parallelism(config=config)
        handle = apply(model, density=0.5)
        if first == "apply":
            model.enable_parallelism(config=config)
        plant(handle, model, rank, RANKS)
        output = run(model, inputs)
    said = [str(warning.message) for warning in said if "framestride" in str(warning.message)]
    torch.save((output, said), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def two_ranks(folder: Path, name: str, first: str) -> tuple[torch.Tensor, list[str]]:
    torch.multiprocessing.spawn(one_rank, (name, first, str(folder)), nprocs=RANKS)
    outputs = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    assert torch.equal(outputs[0][0], outputs[1][0])
    return outputs[0]


@pytest.mark.parametrize("name, first", [("Wan", "apply"), ("MiniMax-H3", "parallelism")])
def test_heads_are_exchanged(name, first, tmp_path):
    output, said = two_ranks(tmp_path, name, first)
    assert said == []
    model, inputs = build(name)
    handle = apply(model, density=0.5)
    plant(handle, model)
    alone = run(model, inputs)
    assert (output - alone).norm() / alone.norm() < 0.005
@pytest.mark.parametrize("name, options", [
    ("Wan", {"ring_degree": RANKS}),
    ("Wan", {"ulysses_degree": RANKS, "ulysses_anything": True}),
    ("HunyuanVideo", {"ulysses_degree": RANKS}),
], ids=["ring", "uneven", "text"])
def test_what_is_not_known_is_left_to_the_models_own_processor(name, options, recwarn):
    model, inputs = build(name)
    handle = apply(model, density=0.5)
    called = []
    for processor in handle.layers:
        original = processor.original
        config = diffusers.ContextParallelConfig(**options)
        processor._parallel_config = diffusers.ParallelConfig(context_parallel_config=config)
        processor.original = Alone(original, called)
    run(model, inputs)
    assert len(called) == len(handle.layers)
    (message,) = [str(warning.message) for warning in recwarn if "framestride" in str(warning.message)]
    assert "context parallelism" in message


class Alone:
    """A model's own processor, which attends to the rows of its own process alone."""

    def __init__(self, processor: object, called: list):
        self._parallel_config, self.processor, self.called = processor._parallel_config, processor, called

    def __call__(self, *arguments, **named):
        self.called.append(self.processor._parallel_config)
        self.processor._parallel_config = None
        return self.processor(*arguments, **named)
