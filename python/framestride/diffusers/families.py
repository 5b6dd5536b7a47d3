"""The models that framestride knows: where their attention over video is, and how a call says the video's size."""

# Most of diffusers has no types to build on.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: allow-any-generics, no-warn-return-any

from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from framestride.diffusers import processors
from framestride.diffusers.processors import Processor

# Latent frames, and height and width of a frame, in patches.
Video = tuple[int, int, int]


@dataclass(frozen=True)
class Family:
    """Models of one class."""

    processor: type[Processor]
    # The attention of these modules, by parts of their paths. All other attention is left alone: to
    # the text, among text or sound, and in refiners.
    attention: tuple[str, ...]
    # The size of the video, from the model's config and the arguments of its forward by name. None
    # where these do not say it.
    video: Callable[[dict, dict], Video | None]
    # How rows are shared among GPUs. None where diffusers knows it, or nobody.
    plan: Callable[[Any], dict] | None = None
    # How many leading frames are seen by every row.
    sinks: int = 0
    # Which share of the steps stays dense, from the first.
    dense_steps: float = 0.1


def latents(axes: str, *patch: str) -> Callable[[dict, dict], Video]:
    """The size is that of latents with these axes. Keys of the config have the patch, together or each."""

    def video(config: dict, arguments: dict) -> Video:
        sizes = config[patch[0]] if len(patch) == 1 else [config.get(key, 1) or 1 for key in patch]
        shape = arguments["hidden_states"].shape
        # CogVideoX pads its frames to whole patches.
        frames, height, width = (-(-index(shape[axes.index(axis)]) // size) for axis, size in zip("FHW", sizes))
        return frames, height, width

    return video


def named(config: dict, arguments: dict) -> Video | None:
    """The arguments name the size."""
    if any(arguments.get(name) is None for name in ("num_frames", "height", "width")):
        return None
    return index(arguments["num_frames"]), index(arguments["height"]), index(arguments["width"])


def placed(config: dict, arguments: dict) -> Video | None:
    """The video ends a sequence, and the arguments place all rows of it."""
    return frames_at_end(arguments["position_ids"])


# The sizes that were found, so that steps after the first do not wait for the GPU.
found = WeakIdKeyDictionary()


@torch.compiler.assume_constant_result
def frames_at_end(places: Tensor) -> Video | None:
    """The size of the video whose frames end a sequence, from (t, h, w) of each row, [S, 3].

    This reads the tensor, so it waits for the GPU once for each tensor.
    """
    if found.get(places, (None,))[0] != places._version:
        found[places] = (places._version, trailing_frames(places.cpu()))
    return found[places][1]


def trailing_frames(places: Tensor) -> Video | None:
    times, grid = places[:, 0], places[:, 1:]
    other = (times != times[-1]).nonzero()
    size = len(times) - (int(other[-1]) + 1 if len(other) else 0)
    height, width = (len(axis.unique()) for axis in grid[-size:].T)
    if height * width != size:
        return None
    frames = len(times) // size
    times = times[len(times) - frames * size :].view(frames, size)
    grid = grid[len(grid) - frames * size :].view(frames, size, 2)
    frame = ((times == times[:, :1]).all(dim=1) & (grid == grid[-1]).all(dim=(1, 2))).tolist()
    count = 1
    while count < frames and frame[-count - 1] and times[-count - 1, 0] < times[-count, 0]:
        count += 1
    return count, height, width


# Plans of diffusers. Rows of the video are shared from the first block to the last projection, and tables
# of RoPE with them.
ROWS = ContextParallelInput(split_dim=1, expected_dims=3)
ALL_ROWS = ContextParallelOutput(gather_dim=1, expected_dims=3)
JOINT_PLAN = {"transformer_blocks.0": {"hidden_states": ROWS}, "proj_out": ALL_ROWS}


def of_rope(dims: int, split_dim: int = 0) -> dict:
    """Tables with so many dimensions that the module "rope" makes."""
    return {"rope": dict.fromkeys((0, 1), ContextParallelInput(split_dim, expected_dims=dims, split_output=True))}


def kandinsky_plan(model: Any) -> dict:
    blocks = "visual_transformer_blocks"
    return {
        f"{blocks}.*": {"rope": ContextParallelInput(split_dim=1, expected_dims=6)},
        f"{blocks}.0": {"visual_embed": ROWS},
        f"{blocks}.{model.config.num_visual_blocks - 1}": ALL_ROWS,
    }


HUNYUAN_LATENTS = latents("BCFHW", "patch_size_t", "patch_size", "patch_size")
WAN_LATENTS = latents("BCFHW", "patch_size")

FAMILIES: dict[str, Family] = {
    "HunyuanVideoTransformer3DModel": Family(
        processors.HunyuanVideo, ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"), HUNYUAN_LATENTS,
        lambda model: JOINT_PLAN | of_rope(dims=2),
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        processors.Joint, ("transformer_blocks.*.attn",), HUNYUAN_LATENTS,
        lambda model: JOINT_PLAN | of_rope(dims=2),
    ),
    "WanTransformer3DModel": Family(processors.Wan, ("blocks.*.attn1",), WAN_LATENTS, sinks=1, dense_steps=0.3),
    "WanVACETransformer3DModel": Family(
        processors.Wan, ("blocks.*.attn1", "vace_blocks.*.attn1"), WAN_LATENTS,
        lambda model: of_rope(dims=4, split_dim=1) | {
            "blocks.0": {"hidden_states": ROWS},
            "vace_blocks.0": {"hidden_states": ROWS, "control_hidden_states": ROWS},
            "proj_out": ALL_ROWS,
        },
        sinks=1, dense_steps=0.3,
    ),
    "CogVideoXTransformer3DModel": Family(
        processors.CogVideoX, ("transformer_blocks.*.attn1",),
        latents("BFCHW", "patch_size_t", "patch_size", "patch_size"),
        lambda model: JOINT_PLAN | {"": {"image_rotary_emb": 2 * [ContextParallelInput(0, expected_dims=2)]}},
        sinks=1, dense_steps=0.2,
    ),
    "LTXVideoTransformer3DModel": Family(processors.LTXVideo, ("transformer_blocks.*.attn1",), named),
    "LTX2VideoTransformer3DModel": Family(processors.LTX2, ("transformer_blocks.*.attn1",), named),
    "MochiTransformer3DModel": Family(
        processors.Mochi, ("transformer_blocks.*.attn1",), latents("BCFHW", "patch_size_t", "patch_size", "patch_size"),
        lambda model: JOINT_PLAN | of_rope(dims=3),
    ),
    "Kandinsky5Transformer3DModel": Family(
        processors.Kandinsky5, ("visual_transformer_blocks.*.self_attention",), latents("BFHWC", "patch_size"),
        kandinsky_plan,
    ),
    "MiniMaxH3Transformer3DModel": Family(processors.MiniMaxH3, ("transformer_blocks.*.attn",), placed),
}
