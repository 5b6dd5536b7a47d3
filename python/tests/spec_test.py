"""`framestride.Spec`, and what is said where PyTorch or the library is missing. None of it needs PyTorch."""

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

import framestride
from framestride import Error, QkNorm, Rope, Schedule, Spec, Status, Width

MODELS = sorted((Path(__file__).parents[2] / "shapes/models").glob("*.toml"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_shipped_specs_are_read_and_written(path):
    spec = Spec.from_file(path)
    assert spec == Spec.shipped(path.stem) == Spec.from_toml(path.read_text()) == Spec.from_toml(spec.toml)
    assert spec.name == path.stem
    description = framestride.describe(spec, gpu="h100")
    assert description == framestride.describe(Spec.shipped(path.stem), gpu="h100")
    assert f"sequence   {spec.sequence} = {spec.frames} frames x {spec.tokens_per_frame} tokens" in description


def test_shipped_specs_have_names():
    assert sorted(Spec.shipped_names()) == [path.stem for path in MODELS]


@pytest.mark.parametrize("name", ["tiny_heads_sinks", "minimax_h3_14s_768x1344"])
def test_masks_are_drawn(name):
    png = framestride.plot(Spec.shipped(name))
    assert png.startswith(b"\x89PNG\r\n") and png.endswith(b"IEND\xaeB`\x82")
    assert png != framestride.plot(replace(Spec.shipped(name), spatial=0.9))


def test_8_bits_are_a_key():
    spec = Spec.shipped("tiny_e4m3")
    assert (spec.compute, spec.largest_error) == ("e4m3", 0.05) and spec != replace(spec, largest_error=None)
    assert spec != replace(spec, compute="dtype", largest_error=None)
    with pytest.raises(framestride.Error, match="precision.largest_error"):
        replace(spec, compute="dtype")
    with pytest.raises(framestride.Error, match="head_dim = 64"):
        replace(spec, head_dim=64, largest_error=None)
    with pytest.raises(framestride.Error, match="attention.compute"):
        replace(spec, compute="fp8")


def test_every_key_is_written():
    spec = Spec(
        name="every_key",
        frames=5,
        tokens_per_frame=12,
        grid=(3, 4),
        before=7,
        after=9,
        heads=3,
        head_dim=64,
        dtype="f16",
        batch=2,
        qk_norm=QkNorm("layer", "heads", 1e-3),
        rope=Rope("half", 48, before=True, after=True, per_head=True),
        spatial=Width(half_width=20),
        temporal=Width(half_width_frames=1.5),
        sink_frames=1,
        profile_rows=33,
        profile_seed=4,
        schedule=Schedule(10, 20, 2, 1),
    )
    assert Spec.from_toml(spec.toml) == spec
    assert (spec.sequence, spec.video_tokens, spec.rope_shape) == (76, 60, (76, 3, 24))
    assert spec.half_widths() == (20, 18)
    assert spec.schedule.is_dense(1, 5) and spec.schedule.is_dense(5, 0) and not spec.schedule.is_dense(2, 1)
    assert replace(spec, rope=None).rope_shape is None
    with pytest.raises(FrozenInstanceError):
        spec.frames = 3


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"frames": 0}, "video.frames"),
        ({"frames": 2.5}, "video.frames"),
        ({"frames": "5\n"}, "video.frames"),
        ({"head_dim": 96}, "attention.head_dim"),
        ({"dtype": "f32"}, "attention.dtype"),
        ({"spatial": 0}, "masks.spatial.density"),
        ({"spatial": float("nan")}, "masks.spatial.density"),
        ({"temporal": Width()}, "masks.temporal"),
        ({"temporal": Width(density=0.5, half_width=3)}, "masks.temporal"),
        ({"grid": (3, 5)}, "video.grid"),
        ({"name": 'a"b\\'}, "name"),
        ({"rope": Rope("half", 20)}, "rope.channels"),
        ({"before": -1}, "before.tokens"),
        ({"qk_norm": QkNorm("rms", "all")}, "qk_norm.over"),
        ({"qk_norm": "rms"}, "qk_norm: found 'rms'"),
        ({"rope": "half"}, "rope: found 'half'"),
        ({"schedule": 0.3}, "schedule: found 0.3"),
        ({"spatial": None}, "masks.spatial"),
        ({"spatial": "0.5"}, "masks.spatial.density"),
        ({"spatial": (0.5, 0.5)}, "masks.spatial.density"),
        ({"frames": None}, "video.frames"),
        ({"frames": [5]}, "video.frames"),
        ({"frames": {5: 1}}, "frames: found {5: 1}"),
        ({"heads": object}, "heads: found <class 'object'>"),
        ({"grid": 60}, "video.grid"),
        ({"name": 5}, "name"),
    ],
    ids=str,
)
def test_mistakes_are_named(change, key):
    plain = {"frames": 5, "tokens_per_frame": 12, "heads": 2, "head_dim": 64, "spatial": 0.5, "temporal": 0.5}
    with pytest.raises(Error) as error:
        Spec(**plain | change)
    assert error.value.status == Status.INVALID_SPEC
    assert key in str(error.value) and "allowed" in str(error.value) and "mend" in str(error.value)


def test_numbers_may_have_other_types():
    spec = Spec(frames=5, tokens_per_frame=12, heads=2, head_dim=64, spatial=0.5, temporal=0.5)
    assert replace(spec, spatial=Fraction(1, 2), temporal=Decimal("0.5")) == spec


def test_specs_are_equal_that_say_the_same():
    spec = Spec(
        frames=5, tokens_per_frame=12, heads=2, head_dim=64, spatial=0.5, temporal=0.5, rope=Rope("half"),
        qk_norm=QkNorm("rms"),
    )
    read = Spec.from_toml(spec.toml)
    assert read == spec and hash(read) == hash(spec) and read.spatial == Width(density=0.5)
    assert replace(spec, profile_rows=60, rope=Rope("half", 64), temporal=Width(density=0.5)) == spec
    for change in ({"heads": 3}, {"spatial": 0.6}, {"rope": Rope("half", 32)}, {"name": "other"}, {"profile_seed": 1}):
        assert replace(spec, **change) != spec
    assert spec != spec.toml


def test_densities_become_half_widths():
    spec = Spec(frames=8, tokens_per_frame=100, heads=2, head_dim=64, spatial=0.5, temporal=0.25)
    assert spec.half_widths() == spec.half_widths((0.5, 0.25))
    assert spec.half_widths(1.0) == (800, 800)
    for density in (0, 1.1, 1e-5, float("nan")):
        with pytest.raises(Error, match="^density ") as error:
            spec.half_widths(density)
        # No line of a text that nobody wrote.
        assert "-->" not in str(error.value) and error.value.status == Status.INVALID_SPEC


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_pytorch_the_call_says_so():
    said = run("""
import sys
sys.modules["torch"] = None
import framestride
spec = framestride.Spec.shipped("tiny_plain")
framestride.load(spec, "cpu")
try:
    framestride.attention(None, None, None, spec)
except framestride.Error as error:
    print(error, error.status.name)
""")
    assert "torch: found no PyTorch" in said and "pip install torch" in said and "UNSUPPORTED" in said


@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_without_diffusers_importing_its_part_says_so(missing):
    said = run(f"""
import sys
sys.modules["{missing}"] = None
import framestride
for use in (lambda: __import__("framestride.diffusers"), lambda: framestride.study(None)):
    try:
        use()
    except ImportError as error:
        print(error)
""")
    wanted = "torch" if missing == "torch" else "pip install torch diffusers"
    lines = said.splitlines()
    assert len(lines) == 2 and all("framestride.diffusers needs PyTorch and diffusers (" in line for line in lines)
    assert all(wanted in line and line.endswith("pip install torch diffusers") for line in lines)


def test_without_the_library_the_call_says_so():
    said = run(
        """
import framestride
try:
    framestride.Spec.shipped("tiny_plain")
except framestride.Error as error:
    print(error, error.status.name)
""",
        FRAMESTRIDE_LIBRARY="/nowhere/libframestride.so",
    )
    assert "/nowhere/libframestride.so: found no library" in said and "UNSUPPORTED" in said
