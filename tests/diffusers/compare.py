"""Compares dense attention by framestride with the attention of real models in diffusers.

A family is a tiny model of its real class. It has few channels, frames and layers, and random
weights, but the real head dim, norms and axes of RoPE. The model runs once, and hooks take from one
attention module what a caller of framestride would give: Q, K and V as the projections left them,
the weights of the norms, the RoPE tables, and the valid lengths of the text. `framestride run` gets
these, with a spec that says of head dim, norm, RoPE and text what the shipped spec of the model
says. Its output is compared, row by row, with what the module would give to its output projection.
The padding of the text is left out, since no model reads it.

The model computes in f32. Its projections are rounded to the spec's type, so that both sides start
from the same numbers. Those of Q and K are small, so that the eps of the norms counts.

# Tolerance

It is derived as in check/src/tolerance.rs. Let u be the largest relative error of rounding to the
spec's type. A row of the output, with softmax weights w, may lie away by the sum of
* what it moves when Q (times scale and log2 e) and K are rounded after norm and RoPE, as pack
  stores them. The row is computed again with these. A few numbers lie so near to the boundary of
  two 16-bit numbers that one f32 sum rounds them up and another down, which adds a part.
* the same again, where the class itself rounds Q and K to bf16 after RoPE;
* three standard deviations of rounding the weights and the output, which are u / sqrt(3) times the
  root of sum w^2 |v|^2 + |out|^2;
* what tensor cores cut from sums of products, which is far less.

# Controls

A comparison that would not see a missing step is worth nothing. So the module computes again
without RoPE, with norm weights of ones, with ten times the eps, with the weights of the video's
norms for the text, and with all text valid. Each must lie twice the tolerance away, so that nothing
is within the tolerance of both.

The exit code is 1 when a family differs, or when a control does not.
"""

import argparse
import inspect
import json
import math
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODELS = Path(__file__).parents[2] / "shapes" / "models"

BATCH, HEADS = 2, 2
FRAMES, HEIGHT, WIDTH = 5, 5, 6
VIDEO = FRAMES * HEIGHT * WIDTH
TEXT, LENGTHS = 24, [17, 6]
AUDIO = 8
CHANNELS = 4
EMBEDDING = 32
TIMES = torch.tensor([500.0, 500.0])

# Root mean squares of the projections.
SIZES = {"query": 0.004, "key": 0.004, "value": 1.0}
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
ROUNDOFF = {"bf16": 2.0**-8, "f16": 2.0**-11}
F32 = 2.0**-24
DEVIATIONS = 3.0
# A tensor core adds 16 products to a sum in one step. It cuts 20 numbers at 25 bits below the
# largest of them.
STEP, CUT = 16, 20 * 2.0**-25


# What specs say of a model's attention.


@dataclass
class Says:
    head_dim: int
    qk_norm: dict
    rope: dict
    # Position of the text.
    text: str | None = None


def shipped(name: str) -> Says:
    """What a shipped spec says."""
    spec = tomllib.loads((MODELS / f"{name}.toml").read_text())
    return Says(spec["attention"]["head_dim"], spec["qk_norm"], spec["rope"], spec.get("text", {}).get("position"))


def rms(eps: float) -> dict:
    return {"kind": "rms", "over": "head", "eps": eps}


INTERLEAVED = {"pairs": "interleaved"}


# Models and the arguments of their forward. What is not named has the default of its class, which
# is the real model's.


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def latents(patch: int = 2, frames: int = FRAMES) -> Tensor:
    return noise(BATCH, CHANNELS, frames, patch * HEIGHT, patch * WIDTH)


def first(lengths: list[int], tokens: int) -> Tensor:
    """A mask of the first tokens of each batch item."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=EMBEDDING, pooled_projection_dim=EMBEDDING,
    )
    return model, dict(
        hidden_states=latents(), timestep=TIMES, encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING),
        encoder_attention_mask=first(LENGTHS, TEXT), pooled_projections=noise(BATCH, EMBEDDING), guidance=TIMES,
    )


# Rows of FramePack's history: two frames as they are, two frames in patches of twice the size along
# each axis, and four in patches of four times the size.
HISTORY = 2 * HEIGHT * WIDTH + sum(math.ceil(HEIGHT / size) * math.ceil(WIDTH / size) for size in (2, 4))


def frame_pack():
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=EMBEDDING, pooled_projection_dim=EMBEDDING, has_image_proj=True,
        image_proj_dim=EMBEDDING, has_clean_x_embedder=True,
    )
    coarsest, coarse, clean, drawn = torch.arange(8 + FRAMES).split([4, 2, 2, FRAMES])
    # An image of 7 tokens comes before the prompt, so that 17 and 9 of 24 are valid.
    return model, dict(
        hidden_states=latents(), indices_latents=drawn, timestep=TIMES, guidance=TIMES,
        encoder_hidden_states=noise(BATCH, TEXT - 7, EMBEDDING), encoder_attention_mask=first([10, 2], TEXT - 7),
        pooled_projections=noise(BATCH, EMBEDDING), image_embeds=noise(BATCH, 7, EMBEDDING),
        latents_clean=latents(frames=2), indices_latents_clean=clean,
        latents_history_2x=latents(frames=2), indices_latents_history_2x=coarse,
        latents_history_4x=latents(frames=4), indices_latents_history_4x=coarsest,
    )


def hunyuan_video_1_5():
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1, num_refiner_layers=1,
        text_embed_dim=EMBEDDING, text_embed_2_dim=EMBEDDING, image_embed_dim=EMBEDDING,
    )
    # The text is two prompts and an image, which has no valid tokens when it is all zeros. The model
    # moves all valid tokens to the front, 17 and 6 of 24.
    return model, dict(
        hidden_states=latents(patch=1), timestep=TIMES, encoder_hidden_states=noise(BATCH, 12, EMBEDDING),
        encoder_attention_mask=first([10, 4], 12), encoder_hidden_states_2=noise(BATCH, 8, EMBEDDING),
        encoder_attention_mask_2=first([7, 2], 8), image_embeds=torch.zeros(BATCH, 4, EMBEDDING),
    )


def wan(model: type, **config):
    model = model(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1, text_dim=EMBEDDING,
        ffn_dim=EMBEDDING, **config,
    )
    return model, dict(
        hidden_states=latents(), timestep=TIMES, encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING),
    )


def wan_vace():
    model, inputs = wan(diffusers.WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=CHANNELS)
    return model, inputs | dict(control_hidden_states=latents())


def cogvideox(patch_size_t: int | None, **grid):
    model = diffusers.CogVideoXTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1, text_embed_dim=EMBEDDING,
        max_text_seq_length=TEXT, patch_size_t=patch_size_t, patch_bias=patch_size_t is None,
        use_rotary_positional_embeddings=True,
    )
    # The model gets the tables. They are made as in CogVideoXPipeline.
    tables = get_3d_rotary_pos_embed(embed_dim=64, grid_size=(HEIGHT, WIDTH), temporal_size=FRAMES, **grid)
    return model, dict(
        hidden_states=latents(frames=FRAMES * (patch_size_t or 1)).transpose(1, 2), timestep=TIMES,
        encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING), image_rotary_emb=tables,
    )


def cosmos(**config):
    model = diffusers.CosmosTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1, text_embed_dim=EMBEDDING,
        adaln_lora_dim=EMBEDDING, concat_padding_mask=False, **config,
    )
    return model, dict(
        hidden_states=latents(), timestep=TIMES, encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING), fps=16,
    )


def ltx_video():
    # Seconds and pixels. The batch items have frame rates, and so RoPE tables, of their own.
    axes = (torch.arange(FRAMES) * 8, torch.arange(HEIGHT) * 32, torch.arange(WIDTH) * 32)
    places = torch.cartesian_prod(*axes).T
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1,
        cross_attention_dim=HEADS * 64, caption_channels=EMBEDDING,
    )
    return model, dict(
        hidden_states=noise(BATCH, VIDEO, CHANNELS), timestep=TIMES,
        encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING), encoder_attention_mask=first(LENGTHS, TEXT),
        video_coords=torch.stack([places / torch.tensor([[rate], [1], [1]]) for rate in (25, 30)]),
    )


def ltx_2(rope_type: str):
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1,
        cross_attention_dim=HEADS * 128, audio_in_channels=CHANNELS, audio_out_channels=CHANNELS,
        audio_num_attention_heads=HEADS, audio_cross_attention_dim=HEADS * 64, caption_channels=EMBEDDING,
        rope_type=rope_type,
    )
    return model, dict(
        hidden_states=noise(BATCH, VIDEO, CHANNELS), audio_hidden_states=noise(BATCH, AUDIO, CHANNELS),
        encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING), audio_encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING),
        timestep=TIMES[:, None].expand(BATCH, VIDEO), audio_timestep=TIMES[:, None].expand(BATCH, AUDIO),
        num_frames=FRAMES, height=HEIGHT, width=WIDTH, audio_num_frames=AUDIO,
    )


def minimax_h3():
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS, hidden_size=HEADS * 128, num_layers=1, num_refiner_layers=1, ffn_dim=EMBEDDING,
        in_channels=CHANNELS, audio_in_channels=CHANNELS, text_dim=EMBEDDING, time_embed_hidden_dim=EMBEDDING,
        time_embed_dim=EMBEDDING,
    )
    # The caller lays out one sequence: the prompt, sound and then the video, whose clock starts after
    # the prompt.
    prompt, sound, video = torch.arange(TEXT + VIDEO).split([TEXT - AUDIO, AUDIO, VIDEO])
    place = torch.cartesian_prod(torch.arange(FRAMES) + len(prompt), torch.arange(HEIGHT), torch.arange(WIDTH))
    clock = torch.cat([prompt, sound])[:, None]
    return model, dict(
        hidden_states=noise(BATCH, VIDEO, 4 * CHANNELS), audio_hidden_states=noise(BATCH, AUDIO, CHANNELS),
        encoder_hidden_states=noise(BATCH, len(prompt), EMBEDDING), timestep=torch.tensor([0.5]),
        timestep_indices=torch.zeros(TEXT + VIDEO, dtype=torch.long),
        token_tags=torch.cat([torch.full_like(rows, tag) for rows, tag in ((prompt, 1), (sound, 2), (video, 0))]),
        position_ids=torch.cat([clock.expand(TEXT, 3), place]), video_indices=video, audio_indices=sound,
        text_indices=prompt,
    )


def mochi():
    model = diffusers.MochiTransformer3DModel(
        in_channels=CHANNELS, num_attention_heads=HEADS, num_layers=2, pooled_projection_dim=HEADS * 128,
        text_embed_dim=EMBEDDING,
    )
    # MochiRoPE asks the CPU for an autocast that it does not have.
    warnings.filterwarnings("ignore", "In CPU autocast")
    # The frequencies are learned, and start as zeros. Positions are up to 100.
    nn.init.normal_(model.pos_frequencies, std=0.01)
    return model, dict(
        hidden_states=latents(), timestep=TIMES, encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING),
        encoder_attention_mask=first(LENGTHS, TEXT).bool(),
    )


def kandinsky_5(axes: tuple[int, int, int]):
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS, out_visual_dim=CHANNELS, in_text_dim=EMBEDDING, in_text_dim2=EMBEDDING,
        time_dim=EMBEDDING, model_dim=HEADS * sum(axes), ff_dim=EMBEDDING, num_text_blocks=1, num_visual_blocks=1,
        axes_dims=axes,
    )
    return model, dict(
        hidden_states=latents().permute(0, 2, 3, 4, 1), timestep=TIMES,
        encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING), pooled_projections=noise(BATCH, EMBEDDING),
        visual_rope_pos=[torch.arange(size) for size in (FRAMES, HEIGHT, WIDTH)], text_rope_pos=torch.arange(TEXT),
    )


def kandinsky_6():
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=CHANNELS, out_visual_dim=CHANNELS, in_text_dim=EMBEDDING, in_text_dim2=EMBEDDING,
        time_dim=EMBEDDING, model_dim=HEADS * 128, ff_dim=EMBEDDING, num_text_blocks=1, num_visual_blocks=1,
        visual_cond=False,
    )
    return model, dict(
        hidden_states=latents().permute(0, 2, 3, 4, 1), timestep=TIMES,
        encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING), pooled_projections=noise(BATCH, EMBEDDING),
    )


def motif_video():
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1, num_single_layers=1,
        text_embed_dim=EMBEDDING,
    )
    return model, dict(
        hidden_states=latents(), timestep=TIMES, encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING),
        encoder_attention_mask=first(LENGTHS, TEXT),
    )


def easy_animate():
    model = diffusers.EasyAnimateTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, num_layers=1, patch_size=2,
        text_embed_dim=EMBEDDING,
    )
    return model, dict(
        hidden_states=latents(), timestep=TIMES, encoder_hidden_states=noise(BATCH, TEXT, EMBEDDING),
    )


@dataclass
class Family:
    name: str
    says: Says
    build: Callable[[], tuple[nn.Module, dict]]
    # Path of the attention module in the model.
    attention: str
    # Valid tokens of the text in each batch item, where the model masks the text.
    lengths: list[int] | None = None
    # Rows before the video that are projected, normalised and rotated with it. The text comes last then.
    history: int = 0
    # The model's RoPE tables are [B, H, S, D / 2].
    heads_before_rows: bool = False
    # The class rounds Q and K to bf16 after RoPE, whatever type the model has. Then the spec has
    # bf16 too.
    rounds_to_bf16: bool = False

    def spec(self) -> dict:
        """The tiny spec."""
        says = self.says
        spec = {
            "name": "tiny",
            "video": {"frames": FRAMES, "tokens_per_frame": HEIGHT * WIDTH},
            "attention": {
                "heads": HEADS, "head_dim": says.head_dim, "batch": BATCH,
                # f16 is finer than bf16, and so is the comparison.
                "dtype": "bf16" if self.rounds_to_bf16 else "f16",
            },
            "qk_norm": says.qk_norm,
            "rope": says.rope,
            # All heads are dense, but a spec has masks.
            "masks.spatial": {"half_width_frames": 1.5},
            "masks.temporal": {"half_width_frames": 1.5},
        }
        if self.history:
            rope = says.rope | {"before": True}
            return spec | {"rope": rope, "before": {"tokens": self.history}, "after": {"tokens": TEXT}}
        return spec | {"text": {"tokens": TEXT, "position": says.text}} if says.text else spec


FAMILIES = [
    Family("HunyuanVideo, double block", shipped("hunyuan_video_720p"), hunyuan_video,
           "transformer_blocks.0.attn", LENGTHS),
    Family("HunyuanVideo, single block", shipped("hunyuan_video_720p"), hunyuan_video,
           "single_transformer_blocks.0.attn", LENGTHS),
    # Rows of history come before the video, an image and the prompt after it.
    Family("FramePack, double block", shipped("hunyuan_video_720p"), frame_pack, "transformer_blocks.0.attn",
           [17, 9], HISTORY),
    Family("FramePack, single block", shipped("hunyuan_video_720p"), frame_pack, "single_transformer_blocks.0.attn",
           [17, 9], HISTORY),
    Family("HunyuanVideo-1.5", shipped("hunyuan_video_1_5_720p"), hunyuan_video_1_5,
           "transformer_blocks.0.attn", LENGTHS),
    Family("Wan", shipped("wan_14b_720p"), lambda: wan(diffusers.WanTransformer3DModel), "blocks.0.attn1"),
    Family("Wan-VACE, control block", shipped("wan_vace_14b_720p"), wan_vace, "vace_blocks.0.attn1"),
    Family("SkyReels-V2", shipped("wan_14b_720p"), lambda: wan(diffusers.SkyReelsV2Transformer3DModel),
           "blocks.0.attn1"),
    Family("CogVideoX", shipped("cogvideox_5b_480x720"),
           lambda: cogvideox(None, crops_coords=((0, 0), (HEIGHT, WIDTH))), "transformer_blocks.0.attn1"),
    Family("CogVideoX-1.5", shipped("cogvideox_1_5_5b_768x1360"),
           lambda: cogvideox(2, crops_coords=None, grid_type="slice", max_size=(30, 45)),
           "transformer_blocks.0.attn1"),
    # The shipped specs have an eps of 1e-6, as NVIDIA's code has.
    Family("Cosmos", replace(shipped("cosmos_1_14b_704x1280"), qk_norm=rms(1e-5)), cosmos,
           "transformer_blocks.0.attn1"),
    Family("Cosmos-Predict2.5", replace(shipped("cosmos_predict_2_5_2b_704x1280"), qk_norm=rms(1e-5)),
           lambda: cosmos(extra_pos_embed_type=None, rope_scale=(1.0, 3.0, 3.0)), "transformer_blocks.0.attn1"),
    Family("LTX-Video", shipped("ltx_video_512x704"), ltx_video, "transformer_blocks.0.attn1"),
    Family("LTX-2", shipped("ltx_2_1088x1920"), lambda: ltx_2("interleaved"), "transformer_blocks.0.attn1"),
    Family("LTX-2.3 and 2.5", shipped("ltx_2_5_1088x1920"), lambda: ltx_2("split"), "transformer_blocks.0.attn1",
           heads_before_rows=True),
    # Prompt and sound are rows before the video, and all rows are rotated.
    Family("MiniMax-H3", shipped("minimax_h3_5s_768x1344"), minimax_h3, "transformer_blocks.0.attn"),
    Family("Mochi", shipped("mochi_1_480x848"), mochi, "transformer_blocks.0.attn1", LENGTHS),
    Family("Kandinsky 5 Lite", shipped("kandinsky_5_lite_512x768"), lambda: kandinsky_5((16, 24, 24)),
           "visual_transformer_blocks.0.self_attention", rounds_to_bf16=True),
    Family("Kandinsky 5 Pro", shipped("kandinsky_5_pro_768x1280"), lambda: kandinsky_5((32, 48, 48)),
           "visual_transformer_blocks.0.self_attention", rounds_to_bf16=True),
    # The norms have no eps of their own. torch takes the distance of f32 numbers near 1.
    Family("Kandinsky 6", Says(128, rms(2.0**-23), INTERLEAVED), kandinsky_6,
           "visual_transformer_blocks.0.video_dec_block.self_attention"),
    Family("Motif-Video, double block", shipped("motif_video_2b_736x1280"), motif_video, "transformer_blocks.0.attn",
           LENGTHS),
    Family("Motif-Video, single block", shipped("motif_video_2b_736x1280"), motif_video,
           "single_transformer_blocks.0.attn", LENGTHS),
    Family("EasyAnimate", Says(64, {"kind": "layer", "over": "head", "eps": 1e-6}, INTERLEAVED, "first"),
           easy_animate, "transformer_blocks.0.attn1"),
]

# Self-attention over a video that is not compared, and why.
LEFT_OUT = {
    "SkyReels-V2, forcing": "not expressible: a block of frames sees no later block",
    "Cosmos 3": "not expressible: several heads of Q share one of K and V, and the text does not see the video",
    "Allegro": "not expressible: the head dim is 96",
    "Wan-Animate 2": "not expressible: there are more keys than queries",
    "LongCat-Video": "diffusers has no class of it",
}


def toml(spec: dict) -> str:
    """The text of a spec."""

    def lines(table: dict) -> str:
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())

    tables = {name: table for name, table in spec.items() if isinstance(table, dict)}
    top = {key: value for key, value in spec.items() if key not in tables}
    return lines(top) + "".join(f"\n[{name}]\n{lines(table)}" for name, table in tables.items())


def part(module: nn.Module, *names: str) -> nn.Module | None:
    """The part of a module that has one of these names."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


class Captured:
    """An attention module, and what it gets in a run of its model."""

    def __init__(self, family: Family):
        self.family = family
        self.dtype = TYPES[family.spec()["attention"]["dtype"]]
        torch.manual_seed(0)
        model, inputs = family.build()
        self.model = type(model).__name__
        attention = self.attention = model.eval().get_submodule(family.attention)
        video = {role: part(attention, f"norm_{role[0]}", f"{role}_norm") for role in ("query", "key")}
        text = {role: part(attention, f"norm_added_{role[0]}") for role in ("query", "key")}
        self.video_norms, self.text_norms = video, {role: norm for role, norm in text.items() if norm is not None}
        self.norms = [*self.video_norms.values(), *self.text_norms.values()]
        for norm in self.norms:
            nn.init.normal_(norm.weight, mean=1, std=0.3)
            if part(norm, "bias") is not None:
                nn.init.normal_(norm.bias, std=0.3)
        # Without its output projections, the module returns what they would get.
        if part(attention, "to_out") is not None:
            attention.to_out[0] = nn.Identity()
        for name in ("to_add_out", "out_layer"):
            if part(attention, name) is not None:
                setattr(attention, name, nn.Identity())
        # Whether the module computes in f32, from projections that are rounded all the same.
        self.widens = True
        self.raw: dict[str, list[Tensor]] = {}
        for role in SIZES:
            for projection in (part(attention, f"to_{role[0]}", f"to_{role}"), part(attention, f"add_{role[0]}_proj")):
                if projection is not None:
                    projection.register_forward_hook(self.keep_projection(role))
        hook = attention.register_forward_pre_hook(self.keep_arguments, with_kwargs=True)
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        self.rotary = next(name for name, value in self.arguments.items() if "rotary_emb" in name and value is not None)

    def keep_projection(self, role: str) -> Callable:
        """A hook that gives a projection its size, rounds it and keeps it."""
        factors: list[Tensor] = []

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            # All calls have the factor of the first, also those with other rows.
            factors.append(SIZES[role] / output.square().mean().sqrt())
            rounded = (output * factors[0]).to(self.dtype)
            self.raw.setdefault(role, []).append(rounded)
            return rounded.float() if self.widens else rounded

        return hook

    def keep_arguments(self, module: nn.Module, positional: tuple, named: dict):
        bound = inspect.signature(module.forward).bind(*positional, **named)
        self.arguments = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind == parameter.VAR_KEYWORD:
                self.arguments |= self.arguments.pop(name, {})

    def ordered(self, video: Tensor, text: Tensor | None = None) -> Tensor:
        """All rows in the model's order."""
        if text is None:
            return video
        return torch.cat([text, video] if self.family.says.text == "first" else [video, text], dim=1)

    def output(self, **changed) -> Tensor:
        """What the output projections would get, [B, S, H, D]."""
        self.raw.clear()
        with torch.no_grad():
            output = self.attention(**self.arguments | changed)
        output = self.ordered(*output) if isinstance(output, tuple) else output
        return output.unflatten(2, (HEADS, -1)).double()

    def scores_inputs(self) -> list[tuple]:
        """What each call of torch's attention gets: Q, K and V, [B, H, S, D], and the mask."""
        calls = []
        attend = torch.nn.functional.scaled_dot_product_attention

        def watched(query, key, value, attn_mask=None, **options):
            calls.append((query, key, value, attn_mask))
            return attend(query, key, value, attn_mask=attn_mask, **options)

        with patch("torch.nn.functional.scaled_dot_product_attention", watched):
            self.output()
        return calls

    def tensors(self) -> dict[str, Tensor]:
        """What `framestride run --qkv` reads, under the names of diffusers."""
        self.output()
        tensors = {}
        for role, (video, *text) in self.raw.items():
            # What is projected apart is given apart.
            tensors |= {role: video} | ({f"encoder_{role}": text[0]} if text else {})
        rotary = self.arguments[self.rotary]
        # Kandinsky has matrices of [[cos, -sin], [sin, cos]].
        tables = (rotary[..., 0, 0], rotary[..., 1, 0]) if isinstance(rotary, Tensor) else rotary
        if self.family.heads_before_rows:
            tables = [table.transpose(1, 2) for table in tables]
        tensors |= zip(("freqs_cos", "freqs_sin"), tables, strict=True)
        for prefix, norms in (("norm", self.video_norms), ("norm_added", self.text_norms)):
            for role, norm in norms.items():
                tensors |= {f"{prefix}_{role[0]}.{name}": value for name, value in norm.state_dict().items()}
        if self.family.lengths:
            tensors["text_lengths"] = torch.tensor(self.family.lengths)
        if self.family.history:
            # Where rows stand on both sides of the video, `run` has names of its own for each.
            ours = {f"norm_added_{role}.weight": f"{role}_norm_after.weight" for role in "qk"}
            ours |= {f"encoder_{role}": f"{role[0]}_after" for role in SIZES} | {"text_lengths": "after_lengths"}
            tensors = {ours.get(name, name): tensor for name, tensor in tensors.items()}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def controls(self) -> dict[str, Tensor]:
        """The module's output where one step is missing."""
        changes = {
            "weights": [(norm, "weight", nn.Parameter(torch.ones_like(norm.weight))) for norm in self.norms],
            "eps": [(norm, "eps", 10 * (norm.eps or torch.finfo(torch.float32).eps)) for norm in self.norms],
        }
        if self.text_norms:
            pairs = [(norm, self.video_norms[role]) for role, norm in self.text_norms.items()]
            changes["text weights"] = [(norm, "weight", video.weight) for norm, video in pairs]
        outputs = {"RoPE": self.output(**{self.rotary: None})}
        for name, change in changes.items():
            with ExitStack() as stack:
                for attribute in change:
                    stack.enter_context(patch.object(*attribute))
                outputs[name] = self.output()
        if self.family.lengths:
            outputs["lengths"] = self.output(attention_mask=torch.ones_like(self.arguments["attention_mask"]))
        return outputs


def tolerances(calls: list[tuple], family: Family) -> list[Tensor]:
    """How far the rows of each batch item may lie away, [S, H]: see the head of this file."""
    dtype = family.spec()["attention"]["dtype"]
    u = ROUNDOFF[dtype]
    # The root mean square of what f32 moves over a boundary, relative to that of rounding. It is
    # `other_side` in tolerance.rs.
    over_boundary = 2 * math.sqrt(64 * F32 * u) / (u / math.sqrt(3))
    items = []
    for query, key, value, mask in calls:
        query, key, value = query.double(), key.double(), value.double()
        head_dim = query.shape[-1]
        hidden = torch.zeros(()) if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)

        def attend(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            weights = (query @ key.mT * math.log(2) + hidden).softmax(dim=-1)
            return weights, weights @ value

        query = query * (math.log2(math.e) / math.sqrt(head_dim))
        weights, out = attend(query, key)
        _, rounded = attend(query.to(TYPES[dtype]).double(), key.to(TYPES[dtype]).double())
        moved = (rounded - out).norm(dim=-1) * (1 + DEVIATIONS * over_boundary + family.rounds_to_bf16)
        spread = (weights.square() @ value.square().sum(dim=-1, keepdim=True)).squeeze(-1).sqrt()
        size = out.norm(dim=-1)
        score = query.norm(dim=-1) * key.norm(dim=-1).amax(dim=-1, keepdim=True)
        cuts = CUT / STEP * (2 * head_dim * score * spread + key.shape[2] * torch.maximum(spread, size))
        items += (moved + DEVIATIONS * u / math.sqrt(3) * torch.hypot(spread, size) + cuts).mT
    return items


def dense_attention(command: Path, spec: dict, tensors: dict[str, Tensor]) -> Tensor:
    """Dense attention by framestride, [B, S, H, D]."""
    with tempfile.TemporaryDirectory() as folder:
        spec_file, inputs, out = (Path(folder) / name for name in ("tiny.toml", "qkv.safetensors", "out.safetensors"))
        spec_file.write_text(toml(spec))
        save_file(tensors, inputs)
        arguments = ["--device", "emulator", "--dense-heads", ",".join(map(str, range(HEADS)))]
        answer = subprocess.run(
            [command, "run", spec_file, "--qkv", inputs, "--out", out, *arguments], capture_output=True, text=True
        )
        if answer.returncode != 0:
            sys.exit(f"{toml(spec)}\nframestride run: exit code {answer.returncode}\n{answer.stdout}{answer.stderr}")
        return load_file(out)["out"].double()


def compare(family: Family, command: Path) -> bool:
    """Compares a family, and prints a line about it."""
    captured = Captured(family)
    counts = [family.history + VIDEO + length for length in family.lengths] if family.lengths else [None] * BATCH

    def rows(items: Tensor | list[Tensor]) -> Tensor:
        """All rows but the padding, which comes last."""
        return torch.cat([item[:count] for item, count in zip(items, counts, strict=True)])

    allowed = rows(tolerances(captured.scores_inputs(), family))
    theirs = rows(captured.output())
    spec = family.spec()
    ours = rows(dense_attention(command, spec, captured.tensors()))

    def away(other: Tensor) -> float:
        """The largest distance of a row, in tolerances."""
        return ((other - theirs).norm(dim=-1) / allowed).max().item()

    worst = away(ours)
    controls = {name: away(rows(output)) for name, output in captured.controls().items()}
    failures = [] if worst <= 1 else ["DIFFERS"]
    failures += [f"WOULD NOT SEE {name}" for name, distance in controls.items() if not distance >= 2]
    print(
        f"{family.name:<27} {captured.model:<35} {spec['attention']['head_dim']:>8} {spec['attention']['dtype']:<4} "
        f"{(ours - theirs).norm() / theirs.norm():>8.1e} {allowed.norm() / theirs.norm():>8.1e} {worst:>9.2f}  "
        + "; ".join([", ".join(f"{name} {distance:.0f}" for name, distance in controls.items()), *failures]),
        flush=True,
    )
    return not failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", type=Path, help="the framestride command")
    parser.add_argument("families", nargs="*", help="parts of the names of families; without any, all are compared")
    arguments = parser.parse_args()
    wanted = arguments.families or [""]
    chosen = [family for family in FAMILIES if any(name.lower() in family.name.lower() for name in wanted)]
    if not chosen:
        parser.error(f"no family has that name; there are {'; '.join(family.name for family in FAMILIES)}")
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
    print("Errors are relative. The largest distances of a row, ours and those of the controls, are in tolerances.\n")
    print(f"{'family':<27} {'class':<35} {'head dim':<13} {'error':>8} {'allowed':>8} {'worst row':>9}  controls")
    agree = [compare(family, arguments.command) for family in chosen]
    print()
    for name, reason in LEFT_OUT.items():
        print(f"{name:<27} {reason}")
    print(f"\n{sum(agree)} passed, {len(agree) - sum(agree)} failed")
    sys.exit(not all(agree))


if __name__ == "__main__":
    main()
