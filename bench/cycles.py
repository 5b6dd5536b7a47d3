#!/usr/bin/env python3
"""Compares kernels from templates with kernels that were compiled for a spec, by elapsed cycles.

Times of attention differ from run to run by more than these kernels do, because power limits the clocks. Cycles do not depend on
them: `ncu` (Nsight Compute) counts them without touching the clocks, and clears the caches before each launch.
"""

import argparse
import csv
import io
import pathlib
import statistics
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ["pack", "profile", "select", "attention"]
METRIC = "sm__cycles_elapsed.max"


def cycles(binary, spec, mask, options):
    """Cycles of the launches of each kernel in a round of `framestride bench`."""
    measured = [binary, "bench", spec, "--device", "gpu", "--rounds", "1", "--types", mask, *options]
    counted = ["ncu", "--clock-control", "none", "--metrics", METRIC, "--csv", "--launch-count", "600"]
    counted += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})$"]
    done = subprocess.run(counted + measured, capture_output=True, text=True, timeout=300)
    begin = done.stdout.find('"ID"')
    if begin < 0:
        raise SystemExit(f"ncu or {binary} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = {kernel: [] for kernel in KERNELS}
    for row in csv.DictReader(io.StringIO(done.stdout[begin:])):
        if row.get("Metric Name") == METRIC:
            found[row["Kernel Name"].split("(")[0]].append(float(row["Metric Value"].replace(",", "")))
    return {kernel: statistics.median(values) for kernel, values in found.items() if values}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compiled", type=pathlib.Path, help="folder where `framestride build` put NAME.ptx of each spec")
    parser.add_argument("specs", nargs="+", help="names of shipped specs")
    parser.add_argument("--masks", default="dense,spatial,temporal,profiled", help="what is launched, with commas")
    parser.add_argument("--binary", default=str(ROOT / "target/release/framestride"))
    args = parser.parse_args()
    for spec in args.specs:
        compiled = ["--ptx", str(args.compiled / f"{spec}.ptx")]
        for mask in args.masks.split(","):
            template, own = (cycles(args.binary, spec, mask, options) for options in ([], compiled))
            for kernel in own:
                ratio = template[kernel] / own[kernel]
                print(f"{spec:<28} {mask:<9} {kernel:<10} {template[kernel]:>12.0f} {own[kernel]:>12.0f} {ratio:7.4f}", flush=True)


if __name__ == "__main__":
    main()
