#!/usr/bin/env python3
"""Measures framestride beside its peers on one GPU, in one run: see README.md beside this file.

Every contender is timed once a round, ours (a child process that waits for its turn) and then the peers, each in a new order every
time, so that drifting clocks reach all alike; medians over the rounds are kept. A sample is the mean of enough runs, back to back
between two events, to last 20 ms, after as many untimed ones: clocks depend on the power that the work before took.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import random
import re
import subprocess
import tempfile
import threading
import time
import tomllib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from fp8_peers import BlockSparseFp8, CudnnFp8
from precisions import in_8_bits
from timing import Sampled, own_command
from torch.nn.attention.flex_attention import BlockMask, flex_attention

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULT_SHAPES = [
    "hunyuan_video_720p",
    "wan_14b_720p",
    "cogvideox_1_5_5b_768x1360",
    "ltx_video_512x704",
    "wan_2_1_1_3b_480p",
]
PEERS = ["cudnn", "flash2", "flex", "flash4", "torch", "compile"]
# Those in 8 bits are timed when they are named.
FP8_PEERS = ["cudnn_fp8", "block_sparse_fp8"]
# So are those for the instructions that all GPUs since Ampere have, which a Hopper's own leave behind.
AMPERE_PEERS = ["efficient", "sage1"]
ALL_PEERS = PEERS + FP8_PEERS + AMPERE_PEERS
OURS, COMPILED, OURS_FP8 = "framestride", "framestride, compiled for the spec", "framestride, 8 bits"
FLEX_BLOCK = 128
ERROR_ROWS = 64
DEVICE = "cuda"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(DEFAULT_SHAPES), help="names of shipped specs, or TOML files, with commas")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {','.join(ALL_PEERS)}; 'none' for ours alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape-seconds", type=float, default=80, help="no new round, and no new peer, of a shape after this long")
    parser.add_argument("--seconds", type=float, default=450, help="no new shape after this long, and the last one is cut short")
    parser.add_argument("--binary", default=os.environ.get("FRAMESTRIDE", str(ROOT / "target/release/framestride")))
    parser.add_argument("--compiled", type=pathlib.Path, help="folder where `framestride build` put kernels: timed beside the templates")
    parser.add_argument("--family", help="a family of kernels, such as sm_80, that is timed beside the one that suits the GPU best")
    parser.add_argument("--e4m3", action="store_true", help="time each spec of head dim 128 with compute = \"e4m3\" too")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench/results", help="folder for the results")
    parser.add_argument("--name", help="name of the results file; the GPU's when not given")
    parser.add_argument("--error-mib", type=float, default=256, help="errors are measured where Q is at most so large")
    args = parser.parse_args()
    args.peers = [] if args.peers == "none" else args.peers.split(",")
    if unknown := set(args.peers) - set(ALL_PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: not among {', '.join(ALL_PEERS)}")
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    args.binary = str(pathlib.Path(args.binary).resolve())
    if not pathlib.Path(args.binary).exists():
        parser.error(f"--binary: {args.binary} is not there: cargo build --release -p framestride-cli, or set FRAMESTRIDE")
    return args


def output_of(command):
    """What a command prints, or None."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def reason(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


class Shape:
    """A spec: what `framestride describe` says of it, and the keys of its TOML file that this does not show."""

    def __init__(self, argument, args):
        self.path = path = pathlib.Path(argument) if argument.endswith(".toml") else ROOT / f"shapes/models/{argument}.toml"
        toml = tomllib.loads(path.read_text())
        self.argument = str(path) if argument.endswith(".toml") else argument
        described = subprocess.run([args.binary, "--json", "describe", self.argument], capture_output=True, text=True)
        if described.returncode != 0:
            raise RuntimeError(described.stderr.strip() or described.stdout.strip())
        self.described = json.loads(described.stdout)
        for key in ["name", "sequence", "frames", "tokens_per_frame", "text_tokens", "before_tokens", "after_tokens", "sink_frames", "heads", "head_dim", "batch"]:
            setattr(self, key, self.described[key])
        self.dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[self.described["dtype"]]
        self.video = self.frames * self.tokens_per_frame
        self.first_video = self.before_tokens
        self.masks = {mask["mask"]: mask for mask in self.described["masks"]}
        self.norm, self.rope = toml.get("qk_norm"), toml.get("rope")
        if self.norm:
            self.norm = {"over": "head", "eps": 1e-6} | self.norm
        compiled = args.compiled and args.compiled / f"{self.name}.ptx"
        self.compiled = ["--ptx", str(compiled)] if compiled and compiled.exists() else None
        self.tensor_bytes = 2 * self.batch * self.sequence * self.heads * self.head_dim
        self.table_shape = None
        if self.rope:
            text = self.rope.get("text") and toml["text"].get("position", "last")
            self.first_rotated = 0 if self.rope.get("before") or text == "first" else self.first_video
            end = self.sequence if self.rope.get("after") or text == "last" else self.first_video + self.video
            heads = [self.heads] if self.rope.get("per_head") else []
            self.rotated = self.rope.get("channels", self.head_dim)
            self.table_shape = [end - self.first_rotated, *heads, self.rotated // 2]
        self.table_bytes = 2 * 4 * math.prod(self.table_shape) if self.table_shape else 0

    def in_e4m3(self, folder):
        """A file with the same spec, computed in 8 bits."""
        path = pathlib.Path(folder) / f"{self.name}.toml"
        path.write_text(in_8_bits(self.path.read_text()))
        return str(path)

    def flop(self, mask):
        return self.masks[mask]["density"] * 4 * self.batch * self.heads * self.sequence**2 * self.head_dim

    def rule(self, mask="spatial"):
        """Which rows see which, in model order, all text valid, as a function of the two rows: from the rule, not from our code."""
        first, video, frames, patches = self.first_video, self.video, self.frames, self.tokens_per_frame
        half_width, sinks, after = self.masks[mask]["half_width"], self.sink_frames * patches, self.after_tokens
        temporal = mask == "temporal"

        def sees(query, key):
            query, key = query - first, key - first
            if temporal:
                distance = (query % patches * frames + query // patches) - (key % patches * frames + key // patches)
            else:
                distance = query - key
            seen = distance.abs() < half_width
            if sinks:
                seen = seen | ((key >= 0) & (key < sinks))
            if first:
                seen = seen | (query < 0) | (key < 0)
            if after:
                seen = seen | (query >= video) | (key >= video)
            return seen

        return sees

    def norm_rope(self, x, weight, bias, cos, sin, wide=torch.float32):
        """QK-norm and RoPE of [B, S, H, D] in `wide`, rounded once to the type of `x`; an f64 result is left as it is."""
        dtype, shape = x.dtype, x.shape
        y = x.to(wide)
        if self.norm:
            if self.norm["over"] == "heads":
                y = y.flatten(2)
            if self.norm["kind"] == "layer":
                y = y - y.mean(-1, keepdim=True)
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.norm["eps"])
            y = y * weight.to(wide)
            if bias is not None:
                y = y + bias.to(wide)
            y = y.view(shape)
        if self.rope:
            first, rows = self.first_rotated, self.table_shape[0]
            if len(self.table_shape) == 2:
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            cos, sin = cos.to(wide), sin.to(wide)
            turning = y[:, first : first + rows, :, : self.rotated]
            interleaved = self.rope.get("pairs") == "interleaved"
            a, b = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, -1)
            turned = (a * cos - b * sin, b * cos + a * sin)
            turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
            if self.rotated < self.head_dim:
                turned = torch.cat((turned, y[:, first : first + rows, :, self.rotated :]), -1)
            y = torch.cat((y[:, :first], turned, y[:, first + rows :]), 1)
        return y if wide == torch.float64 else y.to(dtype)

    def ordered(self, x, temporal):
        """[B, S, H, D] to contiguous [B, H, S, D], video tokens patch by patch when `temporal`."""
        if temporal:
            first, end = self.first_video, self.first_video + self.video
            video = x[:, first:end].unflatten(1, (self.frames, self.tokens_per_frame)).transpose(1, 2).flatten(1, 2)
            x = torch.cat((x[:, :first], video, x[:, end:]), 1)
        return x.transpose(1, 2).contiguous()

    def block_mask(self):
        """FlexAttention's block mask of the spatial band, block row by block row: nothing of size S x S is made."""
        count, block = math.ceil(self.sequence / FLEX_BLOCK), FLEX_BLOCK
        keys, sees = torch.arange(self.sequence, device=DEVICE), self.rule()
        counts = []
        for queries in torch.arange(count * block, device=DEVICE).split(8 * block):
            seen = sees(queries[:, None], keys[None]) & (queries < self.sequence)[:, None]
            seen = F.pad(seen, (0, count * block - self.sequence))
            counts.append(seen.view(-1, block, count, block).sum((1, 3)))
        counts = torch.cat(counts)
        density, expected = counts.sum().item() / self.sequence**2, self.masks["spatial"]["density"]
        if abs(density - expected) > 1e-9:
            raise RuntimeError(f"the mask here has density {density}, ours {expected}")

        def blocks(wanted):
            indices = wanted.int().argsort(dim=-1, descending=True, stable=True)
            return wanted.sum(-1).to(torch.int32)[None, None], indices.to(torch.int32)[None, None]

        full = counts == block * block
        partial_count, partial = blocks((counts > 0) & ~full)
        full_count, full = blocks(full)
        return BlockMask.from_kv_blocks(
            partial_count,
            partial,
            full_count,
            full,
            BLOCK_SIZE=block,
            mask_mod=lambda batch, head, query, key: sees(query, key),
            seq_lengths=(self.sequence, self.sequence),
        )


class Inputs:
    """Random tensors of a layer: raw, and as attention takes them."""

    def __init__(self, shape):
        self.shape = shape
        size = (shape.batch, shape.sequence, shape.heads, shape.head_dim)
        self.q, self.k, self.v = (torch.randn(size, device=DEVICE, dtype=shape.dtype) for _ in range(3))
        self.weights = {"q": (None, None), "k": (None, None)}
        if shape.norm:
            length = shape.head_dim * (shape.heads if shape.norm["over"] == "heads" else 1)
            near = lambda centre: centre + 0.2 * torch.randn(length, device=DEVICE)
            for key in self.weights:
                self.weights[key] = (near(1.0), near(0.0) if shape.norm["kind"] == "layer" else None)
        self.cos = self.sin = None
        if shape.table_shape:
            angles = math.pi * torch.randn(shape.table_shape, device=DEVICE)
            self.cos, self.sin = angles.cos(), angles.sin()
        # Heads first, what SDPA and FlexAttention take.
        self.ready = [shape.ordered(x, False) for x in (self.rotated("q"), self.rotated("k"), self.v)]

    def rotated(self, key, wide=torch.float32):
        return self.shape.norm_rope(getattr(self, key), *self.weights[key], self.cos, self.sin, wide)

    def save(self, path):
        from safetensors.torch import save_file

        tensors = {"q": self.q, "k": self.k, "v": self.v, "cos": self.cos, "sin": self.sin}
        for key, (weight, bias) in self.weights.items():
            tensors[f"{key}_norm.weight"], tensors[f"{key}_norm.bias"] = weight, bias
        save_file({name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}, path)

    def reference(self, rows, mask):
        """Rows of the layer's output in f64 from the raw inputs, [B, H, rows, D]."""
        shape = self.shape
        query = self.rotated("q", torch.float64)[:, rows].transpose(1, 2)
        key = self.rotated("k", torch.float64).transpose(1, 2)
        scores = query @ key.transpose(-1, -2) / math.sqrt(shape.head_dim)
        if mask != "dense":
            keys = torch.arange(shape.sequence, device=DEVICE)
            scores.masked_fill_(~shape.rule(mask)(rows[:, None], keys[None]), -math.inf)
        return scores.softmax(-1) @ self.v.double().transpose(1, 2)


class Contender(Sampled):
    """Something of the peers to time. `call` returns its output, for attention [B, H, S, D]."""

    def __init__(self, what, who, call, mask=None, flop=None, size=None, density=None, output=None):
        super().__init__(call)
        # What gives attention's output under the shape's mask, if it can be had.
        self.output = output
        self.what, self.who, self.mask = what, who, mask
        self.flop, self.size, self.density = flop, size, density
        self.why, self.rel_error = None, None

    def attempt(self, do):
        """Does something that may fail, and keeps the reason."""
        try:
            return do()
        except Exception as error:  # whatever a peer throws is its result
            self.why = reason(error)
            print(f"    {self.who}, {self.what}: {self.why}", flush=True)
            torch.cuda.empty_cache()

    def row(self, shape, ceilings):
        row = dict.fromkeys(["ms", "low", "high", "tflops", "gbps", "of_ceiling"])
        if self.samples:
            ms = self.median()
            row |= {"ms": ms, "low": min(self.samples), "high": max(self.samples)}
            row["tflops"] = self.flop and self.flop / ms / 1e9
            row["gbps"] = self.size and self.size / ms / 1e6
            if self.flop:
                row["of_ceiling"] = ceilings["matmul"] and row["tflops"] / ceilings["matmul"]
            elif self.size:
                row["of_ceiling"] = ceilings["copy"] and row["gbps"] / ceilings["copy"]
        row = {"shape": shape, "what": self.what, "mask": self.mask, "who": self.who, **row}
        row |= {"density": self.density, "rel_error": self.rel_error}
        return row | ({"why": self.why} if self.why else {})


def contenders(shape, inputs, wanted):
    """The peers of one shape. What cannot even be set up is there too, with the reason."""
    q, k, v = inputs.ready
    tensor, found = shape.tensor_bytes, []
    compiled = lambda function: torch.compile(function, dynamic=False)

    def add(what, who, call, **rest):
        found.append(Contender(what, who, call, **rest))

    def attention(who, call, mask=None, output=None):
        name = mask or "dense"
        what = "sparse" if mask else "dense"
        density = shape.masks[name]["density"]
        add(what, who, call, mask=mask, flop=shape.flop(name), size=4 * tensor, density=density, output=output or call)

    def sdpa(backend, q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    if "cudnn" in wanted:
        attention("cuDNN", lambda: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v))
    if "flash2" in wanted:
        attention("FlashAttention-2", lambda: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v))
    if "efficient" in wanted:
        attention("memory-efficient (SDPA)", lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION, q, k, v))
    if "sage1" in wanted:
        own_keys = []

        def run_sage1():
            from sageattention import sageattn

            # It subtracts the mean of the keys from them in place.
            if not own_keys:
                own_keys.append(k.clone())
            return sageattn(q, own_keys[0], v)

        attention("SageAttention 1, Q K in int8", run_sage1)
    if "flex" in wanted:
        flex, masks = compiled(flex_attention), {}

        def run_flex():
            if not masks:
                masks["spatial"] = shape.block_mask()
            return flex(q, k, v, block_mask=masks["spatial"])

        attention("FlexAttention", run_flex, "spatial")
    if "flash4" in wanted:
        heads_last = []

        def run_flash4(**window):
            from flash_attn.cute import flash_attn_func

            if not heads_last:
                heads_last.extend(x.transpose(1, 2).contiguous() for x in (q, k, v))
            out = flash_attn_func(*heads_last, **window)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        attention("FlashAttention-4", run_flash4)
        # Its window has neither text nor sinks: the band alone, whose pairs are counted here.
        half = shape.masks["spatial"]["half_width"]
        if not shape.text_tokens and not shape.sink_frames:
            attention("FlashAttention-4", lambda: run_flash4(window_size=(half - 1, half - 1)), "spatial")
        else:
            pairs = sum(2 * shape.sequence - 2 * d for d in range(1, half)) + shape.sequence
            density = pairs / shape.sequence**2
            flop = shape.flop("dense") * density
            call = lambda: run_flash4(window_size=(half - 1, half - 1))
            add("sparse", "FlashAttention-4, band alone", call, mask="spatial", flop=flop, size=4 * tensor, density=density)

    if "cudnn_fp8" in wanted:
        plans = []

        def cudnn_fp8():
            if not plans:
                plans.append(CudnnFp8(q, k, v))
            return plans[0]

        attention("cuDNN FP8", lambda: cudnn_fp8()(), output=lambda: cudnn_fp8().output())
    if "block_sparse_fp8" in wanted:
        sparse = BlockSparseFp8(q, k, v, shape.masks["spatial"]["density"])
        flop = 4 * shape.batch * shape.heads * sparse.pairs * shape.head_dim
        density = sparse.pairs / shape.sequence**2
        add("sparse", "block-sparse FP8", sparse.attend, mask="spatial", flop=flop, size=4 * tensor, density=density)
        add("sparse", "block-sparse FP8, with rounding", sparse, mask="spatial", flop=flop, size=4 * tensor, density=density)

    cos, sin, weights = inputs.cos, inputs.sin, inputs.weights

    def prepare(q, k):
        return (
            shape.norm_rope(q, *weights["q"], cos, sin).transpose(1, 2),
            shape.norm_rope(k, *weights["k"], cos, sin).transpose(1, 2),
        )

    def pack(q, k, v, temporal):
        q, k = shape.norm_rope(q, *weights["q"], cos, sin), shape.norm_rope(k, *weights["k"], cos, sin)
        return shape.ordered(q, temporal), shape.ordered(k, temporal), shape.ordered(v, temporal)

    pack_spatial = lambda q, k, v: pack(q, k, v, False)
    pack_temporal = lambda q, k, v: pack(q, k, v, True)
    samples = (shape.first_video + torch.randperm(shape.video, device=DEVICE)[:64]).sort().values
    keys = torch.arange(shape.sequence, device=DEVICE)
    seen = [shape.rule(mask)(samples[:, None], keys[None]) for mask in ("spatial", "temporal")]

    def profile(q, k, v):
        rows = q[:, :, samples]
        dense = F.scaled_dot_product_attention(rows, k, v).float()
        sparse = [F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).float() for mask in seen]
        return torch.stack([(out - dense).square().mean((-2, -1)) for out in sparse]).argmin(0)

    for key, who, make in (("torch", "PyTorch", lambda function: function), ("compile", "torch.compile", compiled)):
        if key not in wanted:
            continue
        for mask, function in ((None, pack_spatial), ("temporal", pack_temporal)):
            made = make(function)
            call = lambda made=made: made(inputs.q, inputs.k, inputs.v)
            add("pack", who, call, mask=mask, size=6 * tensor + shape.table_bytes)
        add("profile", who, lambda made=make(profile): made(q, k, v), size=2 * tensor)
    if "cudnn" in wanted and "compile" in wanted:
        prepared = compiled(prepare)

        def layer():
            query, key = prepared(inputs.q, inputs.k)
            return sdpa(SDPBackend.CUDNN_ATTENTION, query, key, inputs.v.transpose(1, 2))

        size = 4 * tensor + shape.table_bytes
        add("layer", "cuDNN, torch.compile", layer, flop=shape.flop("dense"), size=size, density=1.0)
    return found


class Ours:
    """`framestride bench --paced`: a round for each line that it is sent. `options` say which kernels, if not the templates."""

    def __init__(self, who, spec, args, matmul_tflops, seconds, options=()):
        self.who = who
        self.log = tempfile.TemporaryFile("w+")
        command = [args.binary, "--json", "bench", spec, "--device", "gpu", "--paced", *options]
        if matmul_tflops:
            command += ["--matmul-tflops", f"{matmul_tflops:.3f}"]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, bufsize=1)
        # A kernel that hangs would never answer.
        self.watchdog = threading.Timer(seconds, self.child.kill)
        self.watchdog.start()
        self.expect("ready")

    def expect(self, start):
        line = self.child.stdout.readline()
        if not line.startswith(start):
            self.fail(line + self.child.stdout.read())

    def fail(self, text):
        self.stop()
        self.log.seek(0)
        text = self.log.read().strip() or text.strip()
        raise RuntimeError(text or f"it ended with {self.child.returncode}")

    def round(self):
        try:
            self.child.stdin.write("\n")
        except BrokenPipeError:
            self.fail("it is gone")
        self.expect("round")

    def finish(self):
        self.child.stdin.close()
        text = self.child.stdout.read()
        if self.child.wait() != 0:
            self.fail(text)
        self.watchdog.cancel()
        return json.loads(text)

    def stop(self):
        self.watchdog.cancel()
        self.child.kill()
        self.child.wait()


def rel_error(out, reference):
    return ((out.double() - reference).norm() / reference.norm()).item()


def measure_errors(shape, inputs, args, peers, our_rows):
    """||out - f64|| / ||f64|| over sampled rows of all heads, of ours and the peers on the same raw inputs."""
    from safetensors.torch import load_file

    rows = torch.randperm(shape.sequence, device=DEVICE)[:ERROR_ROWS].sort().values
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        tensors, out = f"{folder}/qkv.safetensors", f"{folder}/out.safetensors"
        inputs.save(tensors)
        for mask in ("dense", "spatial", "temporal"):
            reference = inputs.reference(rows, mask)
            name = None if mask == "dense" else mask
            for peer in peers:
                if peer.what in ("dense", "sparse") and peer.mask == name and peer.samples and peer.output:
                    peer.rel_error = peer.attempt(lambda: rel_error(peer.output()[:, :, rows], reference))
            command = [args.binary, "bench", shape.argument, "--device", "gpu", "--rounds", "1", "--types", mask]
            command += ["--qkv", tensors, "--out", out]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                raise RuntimeError(done.stderr.strip())
            found = load_file(out)["out"][:, rows.cpu()].transpose(1, 2).to(DEVICE)
            for row in our_rows:
                if row["who"] == OURS and row["what"] in ("dense", "sparse") and row["mask"] == name:
                    row["rel_error"] = rel_error(found, reference)


def measure(shape, args, ceilings, end):
    """Rows of one shape, and of ours the memory and the digest of the kernels."""
    started = time.monotonic()
    deadline = min(started + args.shape_seconds, end)
    rows, ours, about = [], [], {}

    def fail(who, error):
        rows.append({"shape": shape.name, "what": "layer", "mask": None, "who": who, "ms": None, "density": None, "why": reason(error)})
        print(f"    {who}: {reason(error)}", flush=True)

    # Before anything is allocated here: they measure by how much free memory falls.
    family = (f"{OURS}, {args.family}", shape.argument, args.family and ["--family", args.family])
    with tempfile.TemporaryDirectory() as folder:
        in_e4m3 = (OURS_FP8, *((shape.in_e4m3(folder), ()) if args.e4m3 and shape.head_dim == 128 else (None, None)))
        for who, spec, options in [(OURS, shape.argument, ()), (COMPILED, shape.argument, shape.compiled), family, in_e4m3]:
            if options is not None:
                try:
                    ours.append(Ours(who, spec, args, ceilings["matmul"], deadline - started + 120, options))
                except Exception as error:
                    fail(who, error)
    inputs = Inputs(shape)
    peers = contenders(shape, inputs, args.peers)
    for index in range(args.rounds):
        for child in ours if index == 0 else random.sample(ours, len(ours)):
            try:
                child.round()
            except Exception as error:
                fail(child.who, error)
                ours.remove(child)
        for peer in peers if index == 0 else random.sample(peers, len(peers)):
            if peer.why is None and not peer.samples and time.monotonic() > deadline:
                peer.why = "not started within the time limit"
            if peer.why is None:
                began = time.monotonic()
                peer.attempt(peer.sample)
                if index == 0 and peer.samples:
                    mask = f" {peer.mask}" if peer.mask else ""
                    spent = time.monotonic() - began
                    print(f"    {peer.who}, {peer.what}{mask}: {peer.samples[0]:.3f} ms at first ({spent:.1f} s)", flush=True)
        if time.monotonic() > deadline:
            print(f"    time limit after {index + 1} rounds", flush=True)
            break
    for child in ours:
        try:
            report = child.finish()
            rows += [row | {"who": child.who} for row in report["rows"]]
            if child.who == OURS:
                about = {key: report[key] for key in ("memory", "ptx_sha256", "loading")}
        except Exception as error:
            fail(child.who, error)
    if shape.tensor_bytes <= args.error_mib * 2**20 and time.monotonic() < deadline:
        try:
            measure_errors(shape, inputs, args, peers, rows)
        except Exception as error:
            print(f"    errors: {reason(error)}", flush=True)
    return rows + [peer.row(shape.name, ceilings) for peer in peers], about


def measure_ceilings():
    """A device-to-device copy of 2 GiB, and an 8192 cubed matrix product of random bf16 values."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    found = [
        Contender("ceiling", "copy", lambda: target.copy_(source), size=2 * source.numel()),
        Contender("ceiling", "matmul", lambda: a @ b, flop=2 * 8192**3),
    ]
    for _ in range(7):
        for contender in found:
            contender.sample()
    rows = [contender.row(None, {"copy": None, "matmul": None}) for contender in found]
    return rows, {"copy": rows[0]["gbps"], "matmul": rows[1]["tflops"]}


def show(rows):
    for row in rows:
        number = lambda key, digits: "" if row.get(key) is None else f"{row[key]:.{digits}f}"
        share = "" if row.get("of_ceiling") is None else f"{100 * row['of_ceiling']:.1f}%"
        error = "" if row.get("rel_error") is None else f"{row['rel_error']:.2e}"
        print(
            f"{row['shape'] or '':<26} {row['what']:<8} {row['mask'] or '':<9} {row['who']:<29} {number('ms', 4):>11}"
            f" {number('tflops', 1):>7} {number('gbps', 0):>6} {share:>7} {number('density', 4):>7} {error:>9} {row.get('why', '')}",
            flush=True,
        )


def versions(args):
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found["framestride"] = (output_of([args.binary, "--version"]) or "unknown").removeprefix("framestride ")
    for name in ("triton", "flash-attn-4", "nvidia-cudnn-frontend", "sageattention"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a peer that is not there
            found[name] = None
    return found


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(path)


def main():
    args = arguments()
    end = time.monotonic() + args.seconds
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    random.seed(0)
    gpu = torch.cuda.get_device_name()
    driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    path = args.out / f"{args.name or re.sub('[^a-z0-9]+', '_', gpu.lower())}.json"
    ceiling_rows, ceilings = measure_ceilings()
    gc.collect()
    torch.cuda.empty_cache()
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": gpu,
        "driver": driver and driver.splitlines()[0],
        "versions": versions(args),
        "command": own_command(),
        "rounds": args.rounds,
        "shapes": {},
        "rows": ceiling_rows,
    }
    show(ceiling_rows)
    write(path, results)
    for argument in args.shapes.split(","):
        if time.monotonic() > end - 20:
            print(f"{argument}: not started within --seconds", flush=True)
            continue
        began = time.monotonic()
        try:
            shape = Shape(argument, args)
            print(f"{shape.name}", flush=True)
            rows, about = measure(shape, args, ceilings, end)
            results["shapes"][shape.name] = shape.described | about
            results["rows"] += rows
            show(rows)
        except Exception as error:
            print(f"{argument}: {reason(error)}", flush=True)
        write(path, results)
        print(f"{argument}: {time.monotonic() - began:.0f} s", flush=True)
        # Compiled code of one shape would make the next one's dynamic.
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
