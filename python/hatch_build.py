"""Compiles libframestride.so into the wheel. It needs Rust; zig, the linker, comes from PyPI."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The wheel's tag promises this glibc, so zig links against its symbols and no newer ones.
GLIBC = "2.28"
TARGET = "x86_64-unknown-linux-gnu"


class LibraryHook(BuildHookInterface):
    """Adds the library to the wheel, which every Python 3 of the platform can load."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        checkout = Path(self.root).parent
        folder = checkout / "target" / "wheel"
        build = ["cargo", "zigbuild", "--locked", "--release", "--package", "framestride-capi"]
        build += ["--target", f"{TARGET}.{GLIBC}", "--target-dir", str(folder)]
        environment = os.environ | {
            "CARGO_PROFILE_RELEASE_STRIP": "true",
            "CARGO_ZIGBUILD_PYTHON_PATH": sys.executable,
        }
        subprocess.run(build, cwd=checkout, env=environment, check=True)
        library = folder / TARGET / "release" / "libframestride.so"
        build_data["force_include"][str(library)] = "framestride/libframestride.so"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_{GLIBC.replace('.', '_')}_x86_64"
