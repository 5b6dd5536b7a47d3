#!/usr/bin/env python3
"""Makes BENCHMARKS.md and its pictures in docs from results of bench.py, e4m3.py and diffusers_step.py. Standard library only: see README.md
beside this file."""

import argparse
import html
import json
import math
import pathlib
import re
import statistics

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS, OURS_FP8, OURS_SM80 = "framestride", "framestride, 8 bits", "framestride, sm_80"
# The inputs of e4m3.py that are in its picture.
DRAWN = ["N(0, 1)", "V ~ N(1, 1)", "K with a mean and an outlier"]
# A spec that only differs from another by its density, for the picture.
SWEPT = re.compile(r"_d\d+$")


def cell(value, pattern="{}"):
    return "" if value is None else pattern.format(value)


def table(head, rows):
    # The first column is text, the others numbers.
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


class Rows(list):
    """Rows of the results, to choose from by their keys."""

    def of(self, **keys):
        return Rows(row for row in self if all(row.get(key) == value for key, value in keys.items()))

    def ours(self, who=OURS):
        return self.of(who=who).measured()

    def families(self):
        """Ours, and if the run had two families of kernels, those of the other."""
        return [who for who in (OURS, OURS_SM80) if self.ours(who)]

    def peers(self):
        # Those in 8 bits are no peers of ours in 16.
        return Rows(row for row in self.measured() if not row["who"].startswith(OURS) and "FP8" not in row["who"])

    def measured(self):
        return Rows(row for row in self if row.get("ms"))

    def fastest(self):
        return min(self.measured(), key=lambda row: row["ms"], default=None)


def ratio(above, below, key="ms"):
    return above[key] / below[key] if above and below else None


def glance(rows, memory, who):
    """The ratios that the project is judged by, of the kernels that are called `who`."""
    ours, peers = rows.ours(who), rows.peers()
    dense, flex = ours.of(what="dense").fastest(), peers.of(who="FlexAttention").fastest()
    # The slower of the two masks, so that nothing is flattered.
    sparse = max(ours.of(what="sparse"), key=lambda row: row["ms"], default=None)
    spatial = ours.of(what="sparse", mask="spatial").fastest()
    pack, peer_pack = ours.of(what="pack", mask=None).fastest(), peers.of(what="pack", mask=None).fastest()
    peer_dense = peers.of(what="dense").fastest()
    return [
        cell(ratio(peer_dense, dense), "{:.2f}x") + (f" ({peer_dense['who']})" if peer_dense and dense else ""),
        cell(ratio(sparse, dense, "tflops"), "{:.2f}"),
        cell(ratio(dense, sparse), "{:.2f}x"),
        cell(ratio(peer_dense, sparse), "{:.2f}x"),
        cell(ratio(flex, spatial), "{:.2f}x"),
        cell(pack and 100 * pack["of_ceiling"], "{:.0f}%"),
        cell(ratio(peer_pack, pack), "{:.1f}x"),
        cell(ratio(ours.of(what="profile").fastest(), sparse), "{:.2%}"),
        cell(ratio(peers.of(what="layer").fastest(), ours.of(what="layer").fastest()), "{:.2f}x"),
        cell((memory or {}).get("beyond_tensors") if who == OURS else None, "{:.2f}"),
    ]


GLANCE = [
    "shape",
    "dense, over the fastest peer",
    "sparse TFLOP/s over dense TFLOP/s",
    "sparse over own dense",
    "sparse over the fastest dense peer",
    "spatial over FlexAttention, same mask",
    "pack, of copy bandwidth",
    "pack over the fastest PyTorch",
    "profile, of sparse attention's time",
    "layer over cuDNN with compiled norm and RoPE",
    "memory, times Q",
]


def sections(name, shape, rows):
    extent = f"{shape['batch']} x {shape['sequence']} tokens x {shape['heads']} heads x {shape['head_dim']}, {shape['dtype']}"
    whose = " for Hopper" if rows.of(who=OURS_SM80) else ""
    kernels = f" Kernels{whose}: PTX with the SHA-256 {shape['ptx_sha256'][:16]}..." if "ptx_sha256" in shape else ""
    text = f"### {name}\n\n{extent}.{kernels}\n\n"
    measured = rows.measured()
    attention = [row for row in measured if row["what"] in ("dense", "sparse", "layer")]
    text += table(
        ["attention", "density", "ms", "TFLOP/s", "of matmul", "relative error"],
        [
            [
                f"{row['who']}, {' '.join(filter(None, [row['what'], row['mask']]))}",
                cell(row["density"], "{:.3f}"),
                cell(row["ms"], "{:.3f}"),
                cell(row["tflops"], "{:.0f}"),
                cell(row["of_ceiling"], "{:.0%}"),
                cell(row["rel_error"], "{:.2e}"),
            ]
            for row in attention
        ],
    )
    memory_bound = [row for row in measured if row["what"] in ("pack", "profile", "select", "repack")]
    text += "\n" + table(
        ["norm, RoPE, order; profiling", "ms", "GB/s", "of copy"],
        [
            [
                f"{row['who']}, {' '.join(filter(None, [row['what'], row['mask']]))}",
                cell(row["ms"], "{:.4f}"),
                cell(row["gbps"], "{:.0f}"),
                cell(row["of_ceiling"], "{:.0%}"),
            ]
            for row in memory_bound
        ],
    )
    if memory := shape.get("memory"):
        beyond = memory["beyond_bytes"] or memory["workspace_bytes"]
        text += f"\nMemory beyond Q, K, V and the output: {beyond / 2**20:.0f} MiB.\n"
    missing = [f"{row['who']}, {row['what']}: {row['why']}" for row in rows if row.get("why")]
    if missing:
        text += "\nNot measured: " + "; ".join(reason.rstrip(".") for reason in missing) + ".\n"
    return text + "\n"


def header(results):
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    ceilings = Rows(results.get("rows", [])).of(what="ceiling", shape=None)
    copy, matmul = ceilings.of(who="copy").fastest(), ceilings.of(who="matmul").fastest()
    rounds = results.get("rounds", 0)
    rounds = f" Medians of {rounds} rounds." if rounds > 1 else " One round." if rounds else ""
    text = f"{results['gpu']}, driver {results['driver']}, {results['date']}; {versions}.{rounds}\n"
    if copy and matmul:
        text += (
            f"Ceilings: a copy of 2 GiB at {copy['gbps']:.0f} GB/s, an 8192 cubed bf16 matrix product at"
            f" {matmul['tflops']:.0f} TFLOP/s.\n"
        )
    return text + f"\n```console\n$ {results['command']}\n```\n\n"


def steps(results):
    """Denoising steps of diffusers' transformers, from diffusers_step.py."""
    by_model = {}
    for row in results["rows"]:
        by_model.setdefault(row["model"], []).append(row)
    rows = []
    for model, found in by_model.items():
        compiled = next((row for row in found if "diffusers" in row["who"] and "compiled" in row["who"]), None)
        for row in found:
            rows.append(
                [
                    model,
                    row["who"],
                    cell(row.get("step_ms"), "{:.0f}"),
                    cell(row.get("first_ms"), "{:.0f}"),
                    cell(compiled and row.get("step_ms") and compiled["step_ms"] / row["step_ms"], "{:.2f}x"),
                ]
            )
    head = ["model", "who", "step, ms", "first call, ms", "over diffusers, compiled"]
    # Names are text too.
    lines = table(head, rows).split("\n")
    lines[1] = "| --- | --- | ---: | ---: | ---: |"
    return "\n".join(lines)


INTRO = """# Benchmarks

Made by [`bench/render.py`](bench/render.py) from [`bench/results`](bench/results); [`bench`](bench/README.md) says what is measured,
and how to repeat it. All contenders of a shape take turns in one run. TFLOP/s count visible pairs only (4 x head_dim operations
each); GB/s count every byte that must be moved once. Relative errors are against f64 on the same random inputs. Results of a GPU stay
until it is measured again: the digest of the PTX, or the commit, says which kernels were measured.

"""


def sweep(all_results):
    """Shapes that differ by their density alone, most densities first: (extent, {shape name: (density, rows)})."""
    groups = {}
    for results in all_results:
        for name, shape in results["shapes"].items():
            spatial = next(mask["density"] for mask in shape["masks"] if mask["mask"] == "spatial")
            extent = (results["gpu"], *(shape[key] for key in ("batch", "sequence", "heads", "head_dim", "dtype")))
            groups.setdefault(extent, {})[name] = (spatial, Rows(results["rows"]).of(shape=name))
    extent, group = max(groups.items(), key=lambda item: len({density for density, _ in item[1].values()}), default=(None, {}))
    return (extent, group) if len({density for density, _ in group.values()}) >= 3 else (None, {})


class Picture:
    """An SVG of a plot with a legend at its right. Methods take pixels."""

    width, height, left, top, bottom = 880, 480, 70, 50, 55

    def __init__(self, title, right):
        self.right = self.width - right
        self.base = self.height - self.bottom
        size = f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif" font-size="13"'
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f'<rect width="{self.width}" height="{self.height}" fill="white"/>']
        self.text(self.left, 28, title, 'font-size="15"')

    def text(self, x, y, words, rest=""):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {rest}>{html.escape(words)}</text>')

    def line(self, points, rest):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{points}" fill="none" {rest}/>')

    def grid(self, columns, rows, below, beside):
        """Lines through places of both axes, which have a label each, and the names of the axes."""
        for x, label in columns:
            self.line([(x, self.base), (x, self.top)], 'stroke="#e5e5e5"')
            self.text(x, self.base + 18, label, 'text-anchor="middle"')
        for y, label in rows:
            self.line([(self.left, y), (self.right, y)], 'stroke="#e5e5e5"')
            self.text(self.left - 8, y + 4, label, 'text-anchor="end"')
        middle = (self.top + self.base) / 2
        self.text((self.left + self.right) / 2, self.height - 14, below, 'text-anchor="middle"')
        self.text(18, middle, beside, f'text-anchor="middle" transform="rotate(-90 18 {middle:.0f})"')

    def svg(self):
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def density_picture(extent, group):
    """Time against density, with the ideal: own dense time x density."""
    series = {}
    for _, rows in group.values():
        for row in rows.of(what="sparse").measured():
            series.setdefault(f"{row['who']}, {row['mask']}", []).append((row["density"], row["ms"]))
    levels = {}
    for who in (OURS, "cuDNN", "FlashAttention-2", "FlashAttention-4"):
        found = [row["ms"] for _, rows in group.values() for row in rows.of(what="dense", who=who).measured()]
        if found:
            levels[who] = statistics.median(found)
    if not series or OURS not in levels:
        return None
    gpu, batch, sequence, heads, head_dim, dtype = extent
    picture = Picture(f"Attention, {gpu}: {batch} x {sequence} x {heads} x {head_dim}, {dtype}", 310)
    most = 1.08 * max([ms for points in series.values() for _, ms in points] + list(levels.values()))
    x = lambda density: picture.left + density * (picture.right - picture.left)
    y = lambda ms: picture.base - ms / most * (picture.base - picture.top)
    power = 10 ** (len(str(int(most))) - 1) if most >= 1 else 0.1
    step = next(step for step in (power / 5, power / 2, power, 2 * power) if most / step <= 8)
    columns = [(x(tenth / 10), f"{tenth / 10:g}") for tenth in range(0, 11, 2)]
    rows = [(y(index * step), f"{index * step:g}") for index in range(int(most / step) + 1)]
    picture.grid(columns, rows, "density: visible pairs over all pairs", "milliseconds")
    legend = []
    picture.line([(x(0), y(0)), (x(1), y(levels[OURS]))], 'stroke="#555" stroke-dasharray="2 4"')
    legend.append(("#555", 'stroke-dasharray="2 4"', "ideal: own dense x density"))
    colours = iter(["#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#444"])
    for name, points in sorted(series.items(), key=lambda item: not item[0].startswith(OURS)):
        colour = next(colours)
        placed = [(x(density), y(ms)) for density, ms in sorted(points)]
        picture.line(placed, f'stroke="{colour}" stroke-width="1.5"')
        picture.parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in placed]
        legend.append((colour, "", name))
    for who, ms in levels.items():
        colour = next(colours, "#444")
        picture.line([(x(0), y(ms)), (x(1), y(ms))], f'stroke="{colour}" stroke-dasharray="7 4"')
        legend.append((colour, 'stroke-dasharray="7 4"', f"{who}, dense"))
    for index, (colour, dash, name) in enumerate(legend):
        at = picture.top + 12 + 22 * index
        picture.line([(picture.right + 18, at), (picture.right + 46, at)], f'stroke="{colour}" stroke-width="2" {dash}')
        picture.text(picture.right + 52, at + 4, name)
    return picture.svg()


def errors_table(results, sequence):
    """Relative errors of e4m3.py at one length, inputs by contenders, with the bias where it was taken."""
    found = {(row["inputs"], row["who"]): row for row in results["errors"] if row["sequence"] == sequence}
    inputs, names = (list(dict.fromkeys(key[index] for key in found)) for index in (0, 1))
    rows = []
    for kind in inputs:
        of_kind = [found[kind, who] for who in names]
        rows.append([kind, *(cell(row["error"], "{:.4f}") for row in of_kind)])
        if any(row.get("bias") is not None for row in of_kind):
            rows.append([f"{kind}, bias", *(cell(row.get("bias"), "{:+.0e}") for row in of_kind)])
    return table([f"relative error over {sequence} keys", *names], rows)


def error_picture(results, kernels):
    """Error against speed: TFLOP/s of attention in bench.py's results of the same GPU, errors over the most keys."""
    timed = [of_kernels for of_kernels in kernels if any(row["who"] == OURS_FP8 and row["ms"] for row in of_kernels["rows"])]
    timed = next((of_kernels for of_kernels in timed if of_kernels["gpu"] == results["gpu"]), None)
    if not timed:
        return None
    shape = next(row["shape"] for row in timed["rows"] if row["who"] == OURS_FP8)
    speeds = {}
    for row in timed["rows"]:
        if row["shape"] == shape and row["tflops"] and row["what"] in ("dense", "sparse"):
            density = "dense" if row["what"] == "dense" else f"density {row['density']:.2f}"
            speeds.setdefault(row["who"], {}).setdefault(density, row["tflops"])
    sequence = max(row["sequence"] for row in results["errors"])
    errors = {}
    for row in results["errors"]:
        if row["sequence"] == sequence and row["inputs"] in DRAWN and row["error"]:
            errors.setdefault(row["who"], {})[row["inputs"]] = row["error"]
    points = [(who, density, speed) for who in errors for density, speed in speeds.get(who, {}).items()]
    picture = Picture(f"Attention, {results['gpu']}: error against speed", 250)
    most, low, high = 1.1 * max(speed for *_, speed in points), 1e-3, 1.0
    x = lambda speed: picture.left + speed / most * (picture.right - picture.left)
    y = lambda error: picture.top + math.log(high / error) / math.log(high / low) * (picture.base - picture.top)
    columns = [(x(speed), f"{speed}") for speed in range(0, int(most) + 1, 200)]
    rows = [(y(error), f"{error:g}") for error in (0.001, 0.01, 0.1, 1.0)]
    picture.grid(columns, rows, f"TFLOP/s on visible pairs, {shape}", f"relative error over {sequence} keys")
    colours = dict(zip(errors, ["#444", "#1d4ed8", "#c2410c", "#15803d", "#7e22ce"]))
    marks = {
        DRAWN[0]: lambda px, py, colour: f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{colour}"/>',
        DRAWN[1]: lambda px, py, colour: f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="white" stroke="{colour}" stroke-width="2"/>',
        DRAWN[2]: lambda px, py, colour: f'<path d="M{px:.1f} {py - 6:.1f}l6 11h-12z" fill="{colour}"/>',
    }
    for who, density, speed in points:
        found = [y(error) for error in errors[who].values()]
        dash = "" if density == "dense" else 'stroke-dasharray="4 3"'
        picture.line([(x(speed), min(found)), (x(speed), max(found))], f'stroke="{colours[who]}" {dash}')
        picture.parts += [marks[kind](x(speed), y(error), colours[who]) for kind, error in errors[who].items()]
    at = picture.top + 12
    for who, colour in colours.items():
        picture.parts.append(f'<rect x="{picture.right + 18:.1f}" y="{at - 9:.1f}" width="12" height="12" fill="{colour}"/>')
        picture.text(picture.right + 40, at + 2, who)
        at += 22
    for kind, mark in marks.items():
        picture.parts.append(mark(picture.right + 24, at - 3, "#666"))
        picture.text(picture.right + 40, at + 2, kind)
        at += 22
    for words, dash in (("dense", ""), ("sparse", 'stroke-dasharray="4 3"')):
        picture.line([(picture.right + 24, at - 12), (picture.right + 24, at + 5)], f'stroke="#666" {dash}')
        picture.text(picture.right + 40, at + 2, words)
        at += 22
    return picture.svg()


def sweep_table(group):
    rows = []
    for density, found in sorted(group.values(), key=lambda item: item[0]):
        ours, dense = found.ours().of(what="sparse", mask="spatial").fastest(), found.ours().of(what="dense").fastest()
        temporal = found.ours().of(what="sparse", mask="temporal").fastest()
        flex = found.peers().of(what="sparse", who="FlexAttention").fastest()
        rows.append(
            [
                f"{density:.3f}",
                cell(ours and ours["ms"], "{:.2f}"),
                cell(temporal and temporal["ms"], "{:.2f}"),
                cell(flex and flex["ms"], "{:.2f}"),
                cell(ratio(dense, ours), "{:.2f}x"),
                f"{1 / density:.2f}x",
                cell(ratio(flex, ours), "{:.2f}x"),
            ]
        )
    head = ["density", "spatial, ms", "temporal, ms", "FlexAttention spatial, ms", "over own dense", "ideal", "over FlexAttention"]
    return table(head, rows)


STEPS = """One denoising step of diffusers' real transformers at density 0.25, with random weights and the full size of a layer:
[`bench/diffusers_step.py`](bench/diffusers_step.py) says what each contender does. A few layers are timed, and the step follows from
them. framestride profiles in every call. HunyuanVideo's padded text comes with a mask, which the FlashAttention backend refuses.

"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=pathlib.Path, help="all of bench/results when not given")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT, help="folder that gets BENCHMARKS.md and docs/density.svg")
    args = parser.parse_args()
    (args.out / "docs").mkdir(parents=True, exist_ok=True)
    paths = args.results or sorted((ROOT / "bench/results").glob("*.json"))
    if not paths:
        parser.error("no results: run bench/bench.py on a machine with a Hopper GPU first")
    all_results = [json.loads(path.read_text()) for path in paths]
    of_errors = [results for results in all_results if "errors" in results]
    of_steps = [results for results in all_results if "shapes" not in results and "errors" not in results]
    kernels = [(path, results) for path, results in zip(paths, all_results) if "shapes" in results]
    all_results = [results for _, results in kernels]
    text = INTRO
    for path, results in kernels:
        rows = Rows(results["rows"])
        shown = {name: shape for name, shape in results["shapes"].items() if not SWEPT.search(name)}
        if not shown:
            continue
        # A GPU may have several files: the rest of the name says what is in each.
        gpu = re.sub("[^a-z0-9]+", "_", results["gpu"].lower())
        about = path.stem.removeprefix(gpu).replace("_", " ")
        text += f"## {results['gpu']}{':' if about else ''}{about}\n\n" + header(results)
        glances = [
            [name + who.removeprefix(OURS), *glance(rows.of(shape=name), shape.get("memory"), who)]
            for name, shape in shown.items()
            for who in rows.of(shape=name).families()
        ]
        text += table(GLANCE, glances) + "\n"
        text += "".join(sections(name, shape, rows.of(shape=name)) for name, shape in shown.items())
    extent, group = sweep(all_results)
    picture = density_picture(extent, group) if group else None
    if picture:
        (args.out / "docs/density.svg").write_text(picture)
        text += "## Time against density\n\n![Milliseconds of attention against density](docs/density.svg)\n\n"
        for results in all_results:
            if results["gpu"] == extent[0] and any(name in group for name in results["shapes"]):
                text += header(results)
        text += sweep_table(group)
    for results in of_errors:
        lengths = sorted({row["sequence"] for row in results["errors"]})
        text += f"\n## {results['gpu']}: errors of 8 bits\n\n" + header(results)
        text += "\n".join(errors_table(results, sequence) for sequence in lengths) + "\n"
        if error_svg := error_picture(results, all_results):
            (args.out / "docs/errors.svg").write_text(error_svg)
            text += "![Relative error of attention against its speed](docs/errors.svg)\n"
    for results in of_steps:
        about = STEPS if results is of_steps[0] else ""
        text += f"\n## {results['gpu']}: steps of diffusers\n\n{about}" + header(results) + steps(results) + "\n"
    (args.out / "BENCHMARKS.md").write_text(text.rstrip() + "\n")
    print(f"wrote {args.out / 'BENCHMARKS.md'}" + (f" and {args.out / 'docs/density.svg'}" if picture else ""))


if __name__ == "__main__":
    main()
