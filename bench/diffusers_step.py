#!/usr/bin/env python3
"""Times one denoising step of diffusers' real transformers, dense and sparse, on one GPU in one run.

Each model has its full size and random weights, but only some of its layers: it is timed with one share of them, and with a
few. The difference is the time of a share, from which that of the whole model follows. A step has one call of the transformer, or two
where the pipeline calls it twice for guidance.

Contenders:
* `diffusers`: dense, with the fastest of the backends of diffusers that run here;
* `diffusers, compiled`: the same under torch.compile;
* `FlexAttention`: what Sparse VideoGen does, in words of our own. Norm and RoPE are compiled, half of the heads are reordered token by
  token, and FlexAttention has the band of the same density. It does not profile, and all heads have the mask of spatial ones, which
  takes the same time;
* `framestride`: `framestride.diffusers.apply`, with profiling in every call;
* `framestride, compiled`: the same under torch.compile;
* `framestride, 8 bits`, and that compiled: the same with `compute="e4m3"`, which models of head dim 64 do not have.

Rounds take the contenders in a new order each; medians are kept. `first` is the first call, with all that is loaded and compiled in it.

    python3 bench/diffusers_step.py                   # a Hopper GPU, PyTorch 2.11, diffusers 0.42.1: some minutes
    python3 bench/diffusers_step.py --tiny            # any machine: tiny models on the CPU, to see that it works
    python3 bench/diffusers_step.py --models hunyuan_video_720p --who "^framestride" --rounds 5     # 8 bits beside 16
"""

import argparse
import contextlib
import datetime
import gc
import json
import math
import pathlib
import random
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import framestride
import framestride.diffusers
from framestride.diffusers.processors import rotated
from timing import own_command

ROOT = pathlib.Path(__file__).resolve().parent.parent
BACKENDS = ["native", "_native_cudnn", "_native_flash", "_native_efficient"]
DTYPE = torch.bfloat16
FLEX_BLOCK = 128


@dataclass
class Shape:
    """The size of a video in latents, and of what stands beside it."""

    frames: int
    height: int
    width: int
    text: int
    sound: int = 0


@dataclass
class Case:
    """A model and one call of it."""

    model: type
    # Its config where it differs from the class's defaults, and what a tiny model has instead.
    config: dict
    tiny: dict
    # Lists of blocks with how many make one share, and how many shares the model has.
    share: dict[str, int]
    shares: int
    shape: Shape
    inputs: Callable[["Case", Shape, nn.Module], dict]
    batch: int = 1
    calls: int = 1


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE)


def of_hunyuan_video(case: Case, shape: Shape, model: nn.Module) -> dict:
    config = model.config
    return dict(
        hidden_states=noise(case.batch, config.in_channels, shape.frames, 2 * shape.height, 2 * shape.width),
        timestep=torch.full((case.batch,), 500.0), encoder_hidden_states=noise(case.batch, shape.text, config.text_embed_dim),
        encoder_attention_mask=torch.ones(case.batch, shape.text), guidance=torch.full((case.batch,), 6000.0, dtype=DTYPE),
        pooled_projections=noise(case.batch, config.pooled_projection_dim),
    )


def of_wan(case: Case, shape: Shape, model: nn.Module) -> dict:
    config = model.config
    return dict(
        hidden_states=noise(case.batch, config.in_channels, shape.frames, 2 * shape.height, 2 * shape.width),
        timestep=torch.full((case.batch,), 500.0), encoder_hidden_states=noise(case.batch, shape.text, config.text_dim),
    )


def of_cogvideox(case: Case, shape: Shape, model: nn.Module) -> dict:
    config = model.config
    tables = get_3d_rotary_pos_embed(
        embed_dim=64, grid_size=(shape.height, shape.width), temporal_size=shape.frames, crops_coords=None, grid_type="slice",
        max_size=(max(shape.height, 48), max(shape.width, 85)), device=torch.get_default_device(),
    )
    frames = shape.frames * config.patch_size_t
    return dict(
        hidden_states=noise(case.batch, frames, config.in_channels, 2 * shape.height, 2 * shape.width),
        timestep=torch.full((case.batch,), 500.0), encoder_hidden_states=noise(case.batch, shape.text, config.text_embed_dim),
        image_rotary_emb=tables,
    )


def of_minimax_h3(case: Case, shape: Shape, model: nn.Module) -> dict:
    config = model.config
    video = shape.frames * shape.height * shape.width
    rows = torch.arange(shape.text + shape.sound + video)
    text, sound, frames = rows.split([shape.text, shape.sound, video])
    place = torch.cartesian_prod(*map(torch.arange, (shape.frames, shape.height, shape.width)))
    place[:, 0] += shape.text
    return dict(
        hidden_states=noise(case.batch, video, config.in_channels * math.prod(config.patch_size)),
        audio_hidden_states=noise(case.batch, shape.sound, config.audio_in_channels),
        encoder_hidden_states=noise(case.batch, shape.text, config.text_dim), timestep=torch.tensor([0.5]),
        timestep_indices=torch.zeros_like(rows), text_indices=text, audio_indices=sound, video_indices=frames,
        token_tags=torch.cat([torch.full_like(part, tag) for part, tag in ((text, 1), (sound, 2), (frames, 0))]),
        position_ids=torch.cat([rows[: shape.text + shape.sound, None].expand(-1, 3), place]).float(),
    )


HEADS = dict(num_attention_heads=2)
TINY_H3 = HEADS | dict(
    hidden_size=256, num_refiner_layers=1, ffn_dim=64, in_channels=4, audio_in_channels=4, text_dim=32, time_embed_hidden_dim=32,
    time_embed_dim=32,
)
CASES = {
    "hunyuan_video_720p": Case(
        diffusers.HunyuanVideoTransformer3DModel, {},
        HEADS | dict(in_channels=4, out_channels=4, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32),
        {"transformer_blocks": 1, "single_transformer_blocks": 2}, 20, Shape(33, 45, 80, 256), of_hunyuan_video,
    ),
    "wan_14b_720p": Case(
        diffusers.WanTransformer3DModel, {}, HEADS | dict(in_channels=4, out_channels=4, text_dim=32, ffn_dim=32),
        {"blocks": 1}, 40, Shape(21, 45, 80, 512), of_wan, calls=2,
    ),
    "cogvideox_1_5_5b_768x1360": Case(
        diffusers.CogVideoXTransformer3DModel,
        dict(num_attention_heads=48, patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True, max_text_seq_length=226),
        HEADS | dict(in_channels=4, out_channels=4, text_embed_dim=32), {"transformer_blocks": 1}, 42, Shape(11, 48, 85, 226),
        of_cogvideox, batch=2,
    ),
    "minimax_h3_5s_768x1344": Case(
        diffusers.MiniMaxH3Transformer3DModel, {}, TINY_H3, {"transformer_blocks": 1}, 50, Shape(37, 24, 42, 30, 414), of_minimax_h3,
    ),
    "minimax_h3_14s_768x1344": Case(
        diffusers.MiniMaxH3Transformer3DModel, {}, TINY_H3, {"transformer_blocks": 1}, 50, Shape(102, 24, 42, 84, 1150), of_minimax_h3,
    ),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES), help="names, with commas")
    parser.add_argument("--who", default="", help="contenders whose names have this regular expression; by default all")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--shares", type=int, default=3, help="shares of the layers of the larger of the two models that are timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=540, help="no new model after this long")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench/results", help="folder for the results")
    args = parser.parse_args()
    if unknown := set(args.models.split(",")) - set(CASES):
        parser.error(f"--models: {', '.join(sorted(unknown))}: not among {', '.join(CASES)}")
    if args.shares < 2:
        parser.error("--shares: at least 2")
    return args


def loaded(case: Case, args) -> nn.Module:
    """The model with random weights, of the types that it has when loaded."""
    layers = {f"num_{'single_' if 'single' in blocks else ''}layers": args.shares * count for blocks, count in case.share.items()}
    config = case.config | (case.tiny if args.tiny else {}) | layers
    model = case.model(**config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kept = any(part in name.split(".") for part in model._keep_in_fp32_modules or ())
        if tensor.is_floating_point() and not kept:
            tensor.data = tensor.data.to(DTYPE)
    return model


# Sparse VideoGen's way.


def normed(x: Tensor, norm: framestride.QkNorm | None, weights) -> Tensor:
    """A norm of [B, rows, H, D] in f32."""
    if norm is None:
        return x.float()
    weight, bias = weights if isinstance(weights, tuple) else (weights, None)
    y = x.float().flatten(2) if norm.over == "heads" else x.float()
    y = y - y.mean(-1, keepdim=True) if norm.kind == "layer" else y
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)
    y = y if weight is None else y * weight.float()
    return (y if bias is None else y + bias.float()).view(x.shape)


def prepared(x: Tensor, text: Tensor | None, spec: framestride.Spec, weights, text_weights, tables) -> Tensor:
    """All rows of Q or K after norm and RoPE, [B, S, H, D]."""
    y = normed(x, spec.qk_norm, weights)
    y = (y if tables is None else rotated(y, *tables, spec.rope.pairs)).to(x.dtype)
    return y if text is None else joined(y, normed(text, spec.qk_norm, text_weights).to(x.dtype), spec)


def joined(video: Tensor, text: Tensor | None, spec: framestride.Spec) -> Tensor:
    if text is None:
        return video
    return torch.cat([text, video] if spec.before else [video, text], dim=1)


def placed(x: Tensor, spec: framestride.Spec, frames: int) -> Tensor:
    """[B, H, S, D] with the video of half of the heads, of so many frames, token by token. Backwards with its tokens as frames."""
    spatial, temporal = x.transpose(1, 2).chunk(2, dim=1) if x.shape[1] == spec.sequence else x.chunk(2, dim=1)
    before, video, after = temporal.split([spec.before, spec.video_tokens, spec.after], dim=2)
    video = video.unflatten(2, (frames, -1)).transpose(2, 3).flatten(2, 3)
    return torch.cat([spatial, torch.cat([before, video, after], dim=2)], dim=1)


def band(spec: framestride.Spec, half_width: int, device: torch.device) -> BlockMask:
    """The mask of spatial heads, block row by block row: nothing of size S x S is made."""
    before, sinks, video, length = spec.before, spec.sink_frames * spec.tokens_per_frame, spec.video_tokens, spec.sequence

    def sees(batch, head, query, key):
        query, key = query - before, key - before
        text = (query < 0) | (key < 0) | (query >= video) | (key >= video)
        return text | ((query - key).abs() < half_width) | (key < sinks)

    size = math.ceil(length / FLEX_BLOCK) * FLEX_BLOCK
    keys, counts = torch.arange(length, device=device), []
    for queries in torch.arange(size, device=device).split(8 * FLEX_BLOCK):
        seen = sees(None, None, queries[:, None], keys[None]) & (queries < length)[:, None]
        seen = F.pad(seen, (0, size - length)).view(-1, FLEX_BLOCK, size // FLEX_BLOCK, FLEX_BLOCK)
        counts.append(seen.sum((1, 3)))
    counts = torch.cat(counts)
    blocks = []
    for wanted in ((counts > 0) & (counts < FLEX_BLOCK**2), counts == FLEX_BLOCK**2):
        blocks.append(wanted.sum(-1).to(torch.int32)[None, None])
        blocks.append(wanted.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)[None, None])
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(length, length))


class Flex:
    """Stands in for `framestride.attention`."""

    def __init__(self, compiled: Callable):
        self.prepare, self.attend = compiled(prepared), compiled(flex_attention)
        self.place = compiled(placed)
        self.masks: dict[tuple, BlockMask] = {}

    def __call__(self, q, k, v, spec, q_norm=None, k_norm=None, rope=None, before=None, after=None, half_widths=None):
        text = before or after or framestride.Text()
        q = self.prepare(q, text.q, spec, q_norm, text.q_norm, rope)
        k = self.prepare(k, text.k, spec, k_norm, text.k_norm, rope)
        v = joined(v, text.v, spec)
        key = (spec, half_widths)
        if key not in self.masks:
            self.masks[key] = band(spec, half_widths[0], q.device)
        out = self.attend(*(self.place(x, spec, spec.frames) for x in (q, k, v)), block_mask=self.masks[key])
        return self.place(out, spec, spec.tokens_per_frame).transpose(1, 2)


# Timing.


class Contender:
    """A way to compute a model. `within` sets it up, and `call` wraps the model."""

    def __init__(self, who: str, within: Callable[[nn.Module], contextlib.AbstractContextManager], compiled: Callable | None = None):
        self.who, self.within = who, within
        self.compiled, self.wrapped = compiled, {}
        self.samples: dict[int, list[float]] = {}
        self.first, self.why = None, None

    def time(self, model: nn.Module, inputs: dict, shares: int) -> float:
        """Milliseconds of one call."""
        call = model
        if self.compiled is not None:
            call = self.wrapped.setdefault(id(model), self.compiled(model))
        cuda = torch.cuda.is_available() and inputs["hidden_states"].is_cuda
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call(**inputs, return_dict=False)
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began)

    def sample(self, model: nn.Module, inputs: dict, shares: int):
        if self.why is not None:
            return
        try:
            with self.within(model):
                first = self.time(model, inputs, shares)
                self.first = first if self.first is None else self.first
                self.samples.setdefault(shares, []).append(self.time(model, inputs, shares))
        except Exception as error:  # whatever a contender throws is its result
            self.why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
            print(f"    {self.who}: {self.why}", flush=True)

    def row(self, name: str, case: Case, most: int) -> dict:
        row = {"model": name, "who": self.who, "step_ms": None, "share_ms": None, "rest_ms": None, "first_ms": self.first}
        row |= {"shares": case.shares, "calls": case.calls, "samples": {str(n): s for n, s in self.samples.items()}}
        if self.why is None and most in self.samples:
            small, large = (statistics.median(self.samples[shares]) for shares in (1, most))
            share = (large - small) / (most - 1)
            row |= {"share_ms": share, "rest_ms": small - share, "step_ms": case.calls * (small + (case.shares - 1) * share)}
        return row | ({"why": self.why} if self.why else {})


@contextlib.contextmanager
def with_backend(name: str, model: nn.Module):
    processors = [module.processor for module in model.modules() if hasattr(getattr(module, "processor", None), "_attention_backend")]
    kept = [processor._attention_backend for processor in processors]
    for processor in processors:
        processor._attention_backend = AttentionBackendName(name)
    try:
        yield
    finally:
        for processor, backend in zip(processors, kept, strict=True):
            processor._attention_backend = backend


@contextlib.contextmanager
def applied(density: float, model: nn.Module, attention: Callable = framestride.attention, compute: str = "dtype"):
    handle = framestride.diffusers.apply(model, density=density, compute=compute)
    kept, framestride.attention = framestride.attention, attention
    try:
        yield
    finally:
        framestride.attention = kept
        handle.restore()


@contextlib.contextmanager
def cut(model: nn.Module, case: Case, shares: int):
    """The model with some shares of its blocks."""
    kept = {name: getattr(model, name) for name in case.share}
    for name, count in case.share.items():
        setattr(model, name, kept[name][: shares * count])
    try:
        yield
    finally:
        for name, blocks in kept.items():
            setattr(model, name, blocks)


def fastest(model: nn.Module, inputs: dict, case: Case) -> str:
    """The backend of diffusers whose call is the shortest."""
    times = {}
    for name in BACKENDS:
        contender = Contender(f"diffusers, {name}", lambda model, name=name: with_backend(name, model))
        for _ in range(2):
            contender.sample(model, inputs, 1)
        if contender.why is None:
            times[name] = min(contender.samples[1])
    print("    " + ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in times.items()), flush=True)
    return min(times, key=times.get)


def measure(name: str, args) -> list[dict]:
    case = CASES[name]
    shape = Shape(5, 4, 6, 12, case.shape.sound and 8) if args.tiny else case.shape
    density = 0.6 if args.tiny else args.density
    compiled = (lambda function: torch.compile(function, backend="aot_eager")) if args.tiny else torch.compile
    with torch.device("cpu" if args.tiny else "cuda"):
        model = loaded(case, args)
        inputs = case.inputs(case, shape, model)
    backend = "native"
    if re.search(args.who, "diffusers"):
        with cut(model, case, 1):
            backend = fastest(model, inputs, case)
    flex = Flex((lambda function: function) if args.tiny else lambda function: torch.compile(function, dynamic=False))
    contenders = [
        Contender(f"diffusers, {backend}", lambda model: with_backend(backend, model)),
        Contender(f"diffusers, {backend}, compiled", lambda model: with_backend(backend, model), compiled),
        Contender("FlexAttention", lambda model: applied(density, model, flex)),
        Contender("framestride", lambda model: applied(density, model)),
        Contender("framestride, compiled", lambda model: applied(density, model), compiled),
        Contender("framestride, 8 bits", lambda model: applied(density, model, compute="e4m3")),
        Contender("framestride, 8 bits, compiled", lambda model: applied(density, model, compute="e4m3"), compiled),
    ]
    narrow = model.config.attention_head_dim == 128
    contenders = [who for who in contenders if re.search(args.who, who.who) and (narrow or "8 bits" not in who.who)]
    for shares in (1, args.shares):
        with cut(model, case, shares):
            for round in range(args.rounds):
                for contender in contenders if round == 0 else random.sample(contenders, len(contenders)):
                    contender.sample(model, inputs, shares)
    return [contender.row(name, case, args.shares) for contender in contenders]


def show(rows: list[dict]):
    steps = {row["who"]: row["step_ms"] for row in rows}
    dense = next((step for who, step in steps.items() if who.startswith("diffusers") and who.endswith("compiled")), None)
    for row in rows:
        number = lambda value, digits: "" if value is None else f"{value:.{digits}f}"
        gain = dense / row["step_ms"] if dense and row["step_ms"] else None
        print(
            f"{row['model']:<26} {row['who']:<36} step {number(row['step_ms'], 1):>10} ms  share {number(row['share_ms'], 2):>9} ms"
            f"  first {number(row['first_ms'], 0):>7} ms  {number(gain, 2):>5}x {row.get('why', '')}",
            flush=True,
        )
    for who, step in steps.items():
        narrow = steps.get(who.replace("framestride", "framestride, 8 bits"))
        if who.startswith("framestride") and step and narrow:
            print(f"{rows[0]['model']:<26} {who}: {step / narrow:.3f} times as long in 16 bits as in 8", flush=True)


def main():
    args = arguments()
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "In CPU autocast")
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    random.seed(0)
    torch._dynamo.config.recompile_limit = 64
    gpu = "tiny" if args.tiny else torch.cuda.get_device_name()
    path = args.out / f"{re.sub('[^a-z0-9]+', '_', gpu.lower())}_diffusers.json"
    results = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": gpu,
        "driver": driver(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "diffusers": diffusers.__version__},
        "command": own_command(),
        "density": args.density,
        "rounds": args.rounds,
        "rows": [],
    }
    began = time.monotonic()
    for name in args.models.split(","):
        if time.monotonic() - began > args.seconds:
            print(f"{name}: not started within --seconds", flush=True)
            continue
        start = time.monotonic()
        rows = measure(name, args)
        show(rows)
        results["rows"] += rows
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(f"wrote {path}")


def driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


if __name__ == "__main__":
    main()
