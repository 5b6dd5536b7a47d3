#!/usr/bin/env python3
"""Measures what it saves that text may lie in tensors of its own, on one GPU, in one run.

Models project text and video apart. Before this could be said at a call, a caller joined them: torch.cat of Q, of K and of V, and then
the layer. Here both ways compute the same layer, and the copies are timed alone too. The outputs must be the same bytes.

Every contender is timed once a round, in a new order every time, as in bench.py; medians over the rounds are kept. The library is
found as `import framestride` finds it: PYTHONPATH=python, and FRAMESTRIDE_LIBRARY where it is not in the package.
"""

import argparse
import json
import random

import torch
from timing import Sampled

import framestride


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="hunyuan_video_720p", help="name of a shipped spec with text")
    parser.add_argument("--head-types", default="profile,dense", help="what the heads are, with commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda", help="cpu compares outputs on the emulator, and times nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    return parser.parse_args()


class Layer:
    """The projections of one layer, text and video apart, and what both ways make of them."""

    def __init__(self, name, device):
        torch.manual_seed(0)
        self.spec = spec = framestride.Spec.shipped(name)
        self.sizes = {"before": spec.before, "video": spec.video_tokens, "after": spec.after}
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[spec.dtype]
        # A projection gives all heads of a row at once.
        self.parts = {
            part: [torch.randn(spec.batch, rows, spec.heads, spec.head_dim, device=device).to(dtype) for _ in "qkv"]
            for part, rows in self.sizes.items() if rows
        }
        if len(self.parts) == 1:
            raise SystemExit(f"--spec: {name} has no text")
        self.options = {}
        if spec.qk_norm:
            length = spec.head_dim * (spec.heads if spec.qk_norm.over == "heads" else 1)
            self.options |= {f"{role}_norm": 1 + 0.3 * torch.randn(length, device=device) for role in "qk"}
        if spec.rope:
            angles = torch.randn(*spec.rope_shape, device=device)
            self.options["rope"] = (angles.cos(), angles.sin())

    def apart(self, head_types):
        sides = {
            side: framestride.Text(*self.parts[side]) for side in ("before", "after") if side in self.parts
        }
        return framestride.attention(
            *self.parts["video"], self.spec, head_types=head_types, **sides, **self.options
        )

    def joined(self):
        return [torch.cat(rows, dim=1) for rows in zip(*(self.parts[part] for part in self.sizes if part in self.parts))]

    def after_joining(self, head_types):
        return framestride.attention(*self.joined(), self.spec, head_types=head_types, **self.options)


class Contender(Sampled):
    def __init__(self, what, head_types, call):
        super().__init__(call)
        self.what, self.head_types = what, head_types

    def memory(self):
        """The most bytes that a run allocates, its output included."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def main():
    args = arguments()
    layer = Layer(args.spec, args.device)
    head_types = args.head_types.split(",")
    for types in head_types:
        if not torch.equal(layer.apart(types), layer.after_joining(types)):
            raise SystemExit(f"{args.spec}, {types}: the outputs differ")
    if args.device == "cpu":
        print(f"{args.spec}: the outputs are the same, {', '.join(head_types)}")
        return
    contenders = [Contender("torch.cat", None, layer.joined)]
    for types in head_types:
        contenders.append(Contender("apart", types, lambda types=types: layer.apart(types)))
        contenders.append(Contender("torch.cat and layer", types, lambda types=types: layer.after_joining(types)))
    for _ in range(args.rounds):
        for contender in random.sample(contenders, len(contenders)):
            contender.sample()
    rows = [
        {
            "what": contender.what,
            "head_types": contender.head_types,
            "ms": contender.median(),
            "samples": contender.samples,
            "bytes": contender.memory(),
        }
        for contender in contenders
    ]
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "spec": args.spec}
    if args.json:
        print(json.dumps(versions | {"rows": rows}, indent=2))
        return
    print(f"{args.spec} on {versions['gpu']}, torch {versions['torch']}: the outputs are the same")
    for row in rows:
        spread = f"{min(row['samples']):.3f} to {max(row['samples']):.3f}"
        print(f"{row['what']:<20} {row['head_types'] or '':<8} {row['ms']:9.3f} ms ({spread}) {row['bytes'] / 2**20:9.1f} MiB")
    for types in head_types:
        apart, joined = (
            next(row["ms"] for row in rows if (row["what"], row["head_types"]) == (what, types))
            for what in ("apart", "torch.cat and layer")
        )
        print(f"{types}: apart saves {joined - apart:.3f} ms, {100 * (1 - apart / joined):.1f}% of the layer")


if __name__ == "__main__":
    main()
