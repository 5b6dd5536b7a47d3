"""What stands in for ComfyUI's attention.

ComfyUI calls it with Q, K and V after norm and RoPE. It does not say which rows are video, so `watch`
reads the size of the latents when a forward of the model begins. What is not known to be attention over
video goes on to ComfyUI's own attention, with the arguments as they came.
"""

import inspect
import logging
import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch

import framestride
from framestride.backends import DTYPES, make_spec

# On a CPU, framestride is an emulator, far too slow for a video.
DEVICES = ("cuda",)
# An additive mask hides a key by a number as low as this, and its weight is then 0.
HIDDEN = -1e4

# Models in which all rows see the first frame.
FIRST_FRAME_SEEN = ("WanModel", "CogVideoXTransformer3DModel")


@dataclass
class Forward:
    """One forward of a model."""

    model: str
    # Noise of its input. None where the call does not say it.
    sigma: float | None
    # Latent frames, and height and width of a frame, in patches. None where the input is no video.
    video: tuple[int, int, int] | None
    # None where it is not known that text stands beside the video.
    side: str | None
    sinks: int
    # Masks that were read. All layers get the same one, and reading it waits for the GPU.
    masks: list = field(default_factory=list)


# The forward that is under way. Samplers on several GPUs have a thread each.
forward: ContextVar[Forward | None] = ContextVar("forward", default=None)


def watch(executor, *args, **kwargs):
    """Wraps the forward of a diffusion model."""
    token = forward.set(begin(executor, args, kwargs))
    try:
        return executor(*args, **kwargs)
    finally:
        forward.reset(token)


def begin(executor, args, kwargs):
    """What attention must know of a forward."""
    arguments = inspect.signature(executor.original).bind(*args, **kwargs).arguments
    latent = next(iter(arguments.values()))
    # Models of video and sound get a list of both.
    latent = latent[0] if isinstance(latent, (list, tuple)) else latent
    model = executor.class_obj
    classes = [cls.__name__ for cls in type(model).__mro__]
    patch = getattr(model, "patch_size", 1)
    if isinstance(patch, int):
        patch = (getattr(model, "patch_size_t", None) or 1, patch, patch)
    video = None
    if latent.ndim == 5 and latent.shape[2] > 1 and len(patch) == 3:
        # Models pad to whole patches.
        video = tuple(-(-size // part) for size, part in zip(latent.shape[2:], patch))
    # Rows of a reference image cannot be told from text.
    side = None if arguments.get("ref_latent") is not None else text_side(model, classes)
    sinks = int(any(name in FIRST_FRAME_SEEN for name in classes))
    sigmas = (arguments.get("transformer_options") or {}).get("sigmas")
    return Forward(classes[0], None if sigmas is None else float(sigmas[0]), video, side, sinks)


def text_side(model, classes):
    """On which side of the video a model's text stands. None where that is not known."""
    if "CogVideoXTransformer3DModel" in classes:
        return "before"
    if "HunyuanVideo" in classes:
        # Older versions of ComfyUI have it after the video, and then blocks say so.
        return "after" if getattr(model.double_blocks[0], "flipped_img_txt", False) else "before"
    return None


class SparseAttention:
    """An `optimized_attention_override`, sparse while the noise is from `sigma_start` down to `sigma_end`."""

    def __init__(self, density, sigma_start, sigma_end, compute, previous=None):
        self.density = density
        self.sigma_start = sigma_start
        self.sigma_end = sigma_end
        self.compute = compute
        # The override that another node has set.
        self.previous = previous
        self.plans = {}
        self.said = set()

    def __call__(self, func, *args, **kwargs):
        out = self.attend(*args, **kwargs)
        if out is not None:
            return out
        return func(*args, **kwargs) if self.previous is None else self.previous(func, *args, **kwargs)

    def attend(
        self, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
        transformer_options=None, scale=None, low_precision_attention=True, _inside_attn_wrapper=True, **unknown,
    ):
        """The output as ComfyUI wants it. None where its own attention is to compute it.

        Q, K and V are [B, S, H * D], or [B, H, S, D] with `skip_reshape`. `attn_precision` and
        `low_precision_attention` are kept by any kernel that accumulates in f32, as these do.
        """
        now = forward.get()
        if now is None or now.sigma is None:
            return self.refuse(now, "it tells no wrapper of its latents and their noise")
        if now.video is None or not self.sigma_end <= now.sigma <= self.sigma_start:
            return None
        if not all(isinstance(x, torch.Tensor) for x in (q, k, v)):
            return self.refuse(now, "a call gives something else than tensors")
        axis = 2 if skip_reshape else 1
        rows, tokens = q.shape[axis], math.prod(now.video)
        # Attention to the text, in refiners and over sound stays dense, as it should.
        if rows < tokens or k.shape[axis] != rows:
            return None
        found = self.sides(now, rows, (transformer_options or {}).get("minimax_h3_layout"))
        if found is None:
            return self.refuse(now, f"there are {rows} rows, and not {' x '.join(map(str, now.video))}")
        if unknown := [name for name, value in unknown.items() if value is not None and value is not False]:
            return self.refuse(now, f"a call has arguments that are not known: {', '.join(unknown)}")
        if k.shape != q.shape or v.shape != q.shape:
            return self.refuse(now, "Q, K and V have different shapes")
        if q.dtype not in DTYPES or q.device.type not in DEVICES:
            return self.refuse(now, f"tensors are {q.dtype} on {q.device.type}, and not bfloat16 or float16 on a GPU")

        q, k, v = (x.transpose(1, 2) if skip_reshape else x.unflatten(2, (heads, -1)) for x in (q, k, v))
        before, after = found
        texts = {}
        if mask is not None:
            lengths = self.lengths(now, mask, q.shape[0], before, tokens, after)
            if lengths is None:
                return self.refuse(now, "a mask hides more than the end of the text")
            texts = {side: framestride.Text(lengths=valid) for side, valid in lengths.items()}
        plan = self.plan(now, before, after, heads, q)
        if plan is None:
            return None
        spec, options = plan
        try:
            out = framestride.attention(q, k, v, spec, scale=scale, **texts, **options)
        except framestride.Error as error:
            return self.refuse(now, str(error))
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)

    def sides(self, now, rows, layout):
        """How many rows stand before and after the video. None where they are not known."""
        tokens = math.prod(now.video)
        if layout is not None:
            videos = [(start, end) for start, end, kind in layout.segments if kind == "video"]
            if len(videos) != 1 or videos[0][1] - videos[0][0] != tokens or layout.segments[-1][1] != rows:
                return None
            return videos[0][0], rows - videos[0][1]
        if rows > tokens and now.side is None:
            return None
        return (rows - tokens, 0) if now.side == "before" else (0, rows - tokens)

    def lengths(self, now, mask, batch, before, tokens, after):
        """Valid lengths by side, of a mask that hides the end of the text alone. None for any other."""
        for known, found in now.masks:
            if known is mask:
                return found
        found = text_lengths(mask, batch, before, tokens, after)
        now.masks.append((mask, found))
        return found

    def plan(self, now, before, after, heads, q):
        """The spec, and which heads and masks it is called with. None where there are no kernels for it."""
        key = (now.video, now.sinks, before, after, heads, q.shape[3], q.dtype, q.device)
        if key not in self.plans:
            try:
                spec = make_spec("comfyui", now.video, heads, q.shape[3], q.dtype, before, after, now.sinks)
                dense = self.density >= 1
                options = {"head_types": "dense"} if dense else {"half_widths": spec.half_widths(self.density)}
                if self.compute == "e4m3":
                    spec = framestride.in_8_bits(spec, q.device, partial(self.say, now, "in 16 bits"))
                framestride.load(spec, q.device)
                self.plans[key] = spec, options
            except framestride.Error as error:
                self.plans[key] = self.refuse(now, str(error))
        return self.plans[key]

    def refuse(self, now, reason):
        """Says once why attention over video stays as it was."""
        self.say(now, "as it was", reason)

    def say(self, now, how, reason):
        if reason not in self.said:
            self.said.add(reason)
            model = "a model" if now is None else now.model
            logging.warning("framestride leaves attention of %s %s: %s", model, how, reason)


def text_lengths(mask, batch, before, tokens, after):
    """Valid lengths by side, int32 [B], from a mask [B, 1, K] or [B, 1, 1, K], where B may be 1. It is
    additive, or True where a key is seen.

    None where it hides video, or text before valid text, and where it adds any other number.
    """
    rows = before + tokens + after
    if mask.ndim not in (3, 4) or mask.shape[0] not in (1, batch) or mask.shape[1:].numel() != rows:
        return None
    if mask.shape[-1] != rows:
        return None
    keys = mask.reshape(mask.shape[0], rows)
    seen, hidden = (keys, ~keys) if keys.dtype == torch.bool else (keys == 0, keys <= HIDDEN)
    right = (seen | hidden).all() & seen[:, before : before + tokens].all()
    lengths = {}
    for side, valid in (("before", seen[:, :before]), ("after", seen[:, before + tokens :])):
        if valid.shape[1]:
            length = valid.sum(dim=1, dtype=torch.int32)
            right &= (valid == (torch.arange(valid.shape[1], device=mask.device) < length[:, None])).all()
            lengths[side] = length.expand(batch)
    return lengths if right else None
