"""What the installed wheel does where there is no PyTorch: python -I without_torch.py"""

import importlib.util
import re
from importlib import metadata
from pathlib import Path

import framestride

assert importlib.util.find_spec("torch") is None, "this is for an environment without PyTorch"
assert metadata.requires("framestride") is None, "the standard library is the only dependency"

# The package is the installed one, and its library needs no glibc newer than the tag promises.
package = Path(framestride.__file__).parent
assert metadata.distribution("framestride").locate_file("framestride").samefile(package), package
library = (package / "libframestride.so").read_bytes()
tag = metadata.distribution("framestride").read_text("WHEEL")
promised = tuple(map(int, re.search(r"^Tag: py3-none-manylinux_(\d+)_(\d+)_x86_64$", tag, re.M).groups()))
needed = max(tuple(map(int, version.split(b"."))) for version in re.findall(rb"\0GLIBC_([\d.]+)(?=\0)", library))
assert needed <= promised, f"glibc {needed} is needed, {promised} promised"
assert len(library) < 5e6, f"{len(library)} bytes"

# Specs and the emulator work.
spec = framestride.Spec(frames=4, tokens_per_frame=96, heads=2, head_dim=128, spatial=0.5, temporal=0.5)
assert framestride.Spec.from_toml(spec.toml).sequence == spec.sequence == 384
assert framestride.load(spec, "cpu").device == "cpu"
try:
    framestride.Spec(frames=0, tokens_per_frame=96, heads=2, head_dim=128, spatial=0.5, temporal=0.5)
except framestride.Error as error:
    assert error.status == framestride.Status.INVALID_SPEC and "frames = 0" in str(error), error
else:
    raise AssertionError("a spec without frames is refused")

# A call says what is missing.
try:
    framestride.attention(None, None, None, spec)
except framestride.Error as error:
    assert error.status == framestride.Status.UNSUPPORTED and "pip install torch" in str(error), error
else:
    raise AssertionError("attention needs PyTorch")
print(f"the wheel works without PyTorch, and needs glibc {'.'.join(map(str, needed))}")
