#!/usr/bin/env python3
"""What it costs that a head chooses 8 or 16 bits, in one run on a GPU: `framestride bench` of a spec in 16 bits, in 8 bits, in 8 bits with
a bound that every head keeps, and with one that none keeps. The last computes every head twice.

    FRAMESTRIDE=target/release/framestride python3 bench/precisions.py [--shapes hunyuan_video_720p] [--rounds 3]

It needs nothing but the command, and takes half a minute a shape on an H200. `pack` and `sparse` with a bound have launches in 16 bits that find
nothing to do, and only `layer` differs where none keeps it. "first load" is what the driver's compiler took, where its cache did not have the kernels.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

VARIANTS = {
    "16 bits": lambda text: text,
    "8 bits": lambda text: in_8_bits(text),
    "all within": lambda text: in_8_bits(text, 1.0),
    "none within": lambda text: in_8_bits(text, 1e-9),
}


def timed(command, spec, rounds):
    done = subprocess.run(
        [command, "bench", spec, "--rounds", str(rounds), "--device", "gpu", "--json"], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{command} bench {spec} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def in_8_bits(text, largest_error=None):
    """The text of a spec that computes in 16 bits, with 8 bits in their place, and with a bound of their errors if one is given."""
    text = text.replace("[attention]", '[attention]\ncompute = "e4m3"')
    return text if largest_error is None else f"{text}\n[precision]\nlargest_error = {largest_error}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="hunyuan_video_720p", help="shipped specs of head dim 128")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    command = os.environ.get("FRAMESTRIDE", "target/release/framestride")
    models = Path(__file__).resolve().parent.parent / "shapes/models"
    with tempfile.TemporaryDirectory() as folder:
        for name in options.shapes.split(","):
            reports = []
            for index, variant in enumerate(VARIANTS.values()):
                spec = Path(folder) / f"{name}_{index}.toml"
                spec.write_text(variant((models / f"{name}.toml").read_text()))
                reports.append(timed(command, str(spec), options.rounds))
            print(f"\n{name:32}" + "".join(f"{title:>14}" for title in VARIANTS))
            for rows in zip(*(report["rows"] for report in reports)):
                label = f"{rows[0]['what']} {rows[0].get('mask') or ''}, ms"
                print(f"{label:32}" + "".join(f"{row['ms']:14.4f}" for row in rows))
            print(f"{'first load, s':32}" + "".join(f"{report['loading']['compile']:14.2f}" for report in reports))


if __name__ == "__main__":
    main()
