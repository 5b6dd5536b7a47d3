"""Tiny models of the real classes of diffusers, in bfloat16, with random weights.

They have few channels, frames and layers, but the real head dims, norms and axes of RoPE. Their
builders are those of tests/diffusers/compare.py, which compares single modules.

FRAMESTRIDE_TEST_DEVICE=cuda runs the tests on a GPU instead of the emulator, those that compile left
out: `-k "not compil"`.
"""

import copy
import math
import os
import sys
from pathlib import Path

import torch
from torch import nn

from framestride.diffusers import Handle
from framestride.diffusers.exchange import Gpus

# torch.compile traces no model while there is a default device.
if device := os.environ.get("FRAMESTRIDE_TEST_DEVICE"):
    torch.set_default_device(device)

sys.path.append(str(Path(__file__).parents[2] / "tests" / "diffusers"))

import compare  # noqa: E402

VIDEO = {"num_frames": compare.FRAMES, "height": compare.HEIGHT, "width": compare.WIDTH}


def ltx_video():
    model, inputs = compare.ltx_video()
    return model, inputs | VIDEO


def wan_image_to_video():
    model, inputs = compare.wan(
        compare.diffusers.WanTransformer3DModel, image_dim=compare.EMBEDDING, added_kv_proj_dim=compare.HEADS * 128
    )
    # The class takes 512 tokens for the text, and what is before them for the image.
    text = compare.noise(compare.BATCH, 512, compare.EMBEDDING)
    image = compare.noise(compare.BATCH, 8, compare.EMBEDDING)
    return model, inputs | dict(encoder_hidden_states=text, encoder_hidden_states_image=image)


def wan_timesteps_by_row():
    """Wan 2.2 TI2V gives each row a timestep of its own."""
    model, inputs = compare.wan(compare.diffusers.WanTransformer3DModel)
    return model, inputs | dict(timestep=torch.full((compare.BATCH, compare.VIDEO), 500.0))


BUILDERS = {
    "HunyuanVideo": compare.hunyuan_video,
    "HunyuanVideo-1.5": compare.hunyuan_video_1_5,
    "Wan": lambda: compare.wan(compare.diffusers.WanTransformer3DModel),
    "Wan I2V": wan_image_to_video,
    "Wan TI2V": wan_timesteps_by_row,
    "Wan-VACE": compare.wan_vace,
    "CogVideoX": lambda: compare.cogvideox(None, crops_coords=((0, 0), (compare.HEIGHT, compare.WIDTH))),
    "CogVideoX-1.5": lambda: compare.cogvideox(2, crops_coords=None, grid_type="slice", max_size=(30, 45)),
    "LTX-Video": ltx_video,
    "LTX-2": lambda: compare.ltx_2("interleaved"),
    "LTX-2.3": lambda: compare.ltx_2("split"),
    "Mochi": compare.mochi,
    "Kandinsky 5 Lite": lambda: compare.kandinsky_5((16, 24, 24)),
    "Kandinsky 5 Pro": lambda: compare.kandinsky_5((32, 48, 48)),
    "MiniMax-H3": compare.minimax_h3,
}


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, dict]:
    """A model and the arguments of its forward."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[name]()
    # Norms have weights as trained ones do, large enough that attention is no mean of all values.
    for module in model.modules():
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "query_norm", "key_norm"):
            if getattr(module, norm, None) is not None:
                nn.init.normal_(getattr(module, norm).weight, mean=1.5, std=0.3)
        # Kandinsky's gates begin as zeros.
        if type(module).__name__ == "Kandinsky5Modulation":
            nn.init.normal_(module.out_layer.weight, std=0.05)
    return cast(model.eval(), inputs, dtype)


def cast(model: nn.Module, inputs: dict, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """A copy in another type. As when loaded, some modules stay in f32, and so do tables and places."""
    model = copy.deepcopy(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kept = any(part in name.split(".") for part in model._keep_in_fp32_modules or ())
        if tensor.is_floating_point() and not kept:
            tensor.data = tensor.data.to(dtype)

    def of_type(name: str, value: object) -> object:
        converted = ("timestep", "guidance", "pooled_projections", "image_embeds")
        return value.to(dtype) if name in converted or "hidden_states" in name else value

    return model, {name: of_type(name, value) for name, value in inputs.items()}


def position_codes(head_dim: int) -> torch.Tensor:
    """Q or K of the video that make a first head spatial and a second one temporal, [rows, 2 x D].

    A product of two codes is large where their rows are near, in the order of the head.
    """
    video, tokens = torch.arange(compare.VIDEO), compare.HEIGHT * compare.WIDTH
    positions = torch.stack([video, video % tokens * compare.FRAMES + video // tokens], dim=1) / compare.VIDEO
    frequencies = 2 * torch.randn(head_dim // 2, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    angles = 2 * math.pi * positions[..., None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)


def planted_wan(heads: list[list[str]]) -> nn.Module:
    """A Wan whose heads have types that are known, by layer: "spatial", "temporal", or "neither"."""
    torch.manual_seed(0)
    model, _ = compare.wan(compare.diffusers.WanTransformer3DModel)
    model = type(model)(**dict(model.config) | {"num_layers": len(heads), "num_attention_heads": len(heads[0])})
    near = position_codes(128).unflatten(1, (2, 128))
    # A query that looks at a place far away from its own in both orders.
    far = near[torch.randperm(compare.VIDEO), 0]
    of_query = {"spatial": near[:, 0], "temporal": near[:, 1], "neither": far}
    of_key = of_query | {"neither": near[:, 0]}

    def plant(linear: nn.Module, codes: list[torch.Tensor]):
        rows = torch.cat(codes, dim=1)
        linear.register_forward_hook(lambda module, inputs, out: rows.to(out.dtype).expand(out.shape))

    for block, kinds in zip(model.blocks, heads, strict=True):
        plant(block.attn1.to_q, [of_query[kind] for kind in kinds])
        plant(block.attn1.to_k, [of_key[kind] for kind in kinds])
    return model.to(torch.bfloat16).eval()


def model_of(name: str, heads: int) -> tuple[nn.Module, dict]:
    """A model with so many heads, whose rows GPUs can share."""
    compare.HEADS = heads
    model, inputs = build(name)
    if name.startswith("Kandinsky"):
        # A plan needs a first block and a last one.
        model.visual_transformer_blocks.append(copy.deepcopy(model.visual_transformer_blocks[0]))
        model.register_to_config(num_visual_blocks=2)
    return model, inputs


def plant(handle: Handle, model: nn.Module, gpus: Gpus):
    """Makes heads spatial and temporal in turn, so that rounding decides about no type. Where a bound of
    errors is given, V of the first half of them has a mean, of which 8 bits take nothing."""

    def hook(module, inputs, output):
        rows = output.shape[1]
        if rows == compare.TEXT:
            return output
        codes = position_codes(output.shape[-1] // compare.HEADS).to(output).chunk(2, dim=-1)
        codes = torch.cat([codes[head % 2] for head in range(compare.HEADS)], dim=-1)
        total = len(codes) if gpus.uneven else rows * gpus.count
        # The video comes last.
        first = sum(gpus.shares(total)[: gpus.rank]) - (total - len(codes))
        places = torch.arange(first, first + rows)
        planted = output.clone()
        planted[:, places >= 0] = codes[places[places >= 0]]
        return planted

    def with_mean(module, inputs, output):
        heads = output.unflatten(2, (compare.HEADS, -1)).clone()
        heads[:, :, : compare.HEADS // 2] += 16
        return heads.flatten(2)

    for module in model.modules():
        if (processor := getattr(module, "processor", None)) in handle.layers:
            for projection in processor.projections[:2]:
                getattr(module, projection).register_forward_hook(hook)
            for name in (processor.projections[2], processor.text_projections[2]):
                if handle.largest_error and (projection := getattr(module, name, None)) is not None:
                    projection.register_forward_hook(with_mean)


class TinyWan(compare.diffusers.WanPipeline):
    """The real pipeline of Wan, without the models that read a prompt and paint frames."""

    def __call__(self, prompt: str, negative_prompt: str = "", num_inference_steps: int = 10):
        # The densities of the first layer, of which the list has what the next step gets.
        self.densities = []
        noise = lambda: torch.randn(1, compare.TEXT, compare.EMBEDDING, dtype=torch.bfloat16)
        return super().__call__(
            prompt_embeds=noise(), negative_prompt_embeds=noise(), height=16 * compare.HEIGHT, width=16 * compare.WIDTH,
            num_frames=4 * compare.FRAMES - 3, num_inference_steps=num_inference_steps, output_type="latent",
            callback_on_step_end=self.keep,
        )

    def keep(self, pipe, index, time, tensors):
        self.densities.append(getattr(pipe.transformer.blocks[0].attn1.processor, "density", None))
        return tensors

    def to(self, device):
        return self


def tiny_wan(transformer: nn.Module, **parts: object) -> TinyWan:
    scheduler = compare.diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = TinyWan(transformer=transformer, scheduler=scheduler, **nothing, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Loop:
    """A pipeline of any model: a call of it in each step."""

    def __init__(self, model: nn.Module, inputs: dict):
        self.components, self.inputs = {"transformer": model}, inputs
        self.scheduler = compare.diffusers.FlowMatchEulerDiscreteScheduler()
        self._progress_bar_config = {"disable": True}

    def __call__(self, num_inference_steps: int):
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.zeros(1, 4, 1, 2, 2)
        for time in self.scheduler.timesteps:
            run(self.components["transformer"], self.inputs)
            self.scheduler.step(sample, time, sample)


def run(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs, return_dict=False)
    return (output[0] if isinstance(output, tuple) else output).float()


def outputs_of(handle: Handle, model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    """Of a step that may find the bits of heads, and of one that gets them."""
    return [(handle.step(index, 2), run(model, inputs))[1] for index in range(2 if handle.largest_error else 1)]
