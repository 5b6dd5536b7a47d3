"""The node, on the emulator or a GPU, in the forms in which ComfyUI calls its attention.

ComfyUI is in no package registry, so its part is played here: a model that can be cloned, the executor
of a wrapper, and an attention function that gives way to an override.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import framestride

DEVICE = os.environ.get("FRAMESTRIDE_TEST_DEVICE", "cpu")
# Other tests of this process compile models, which cannot be traced while there is a default device.
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
FOLDER = Path(__file__).parents[1]
HEADS, DIM = 2, 64
# Latents of 4 frames, in patches of 1 x 2 x 2.
FRAMES, HEIGHT, WIDTH = 4, 6, 8
LATENT = torch.zeros(1, 16, FRAMES, 2 * HEIGHT, 2 * WIDTH - 1)
VIDEO = FRAMES * HEIGHT * WIDTH
TEXT = 20


def node_package():
    """The folder, imported as ComfyUI imports it: by its path."""
    spec = importlib.util.spec_from_file_location(
        "framestride_comfyui", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


package = node_package()
node_attention = sys.modules["framestride_comfyui.attention"]
node = package.NODE_CLASS_MAPPINGS["FramestrideSparseAttention"]()


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch):
    monkeypatch.setattr(node_attention, "DEVICES", (DEVICE,))


class Patcher:
    """A MODEL, whose noise goes from 1 to 0 with the sampling."""

    def __init__(self, options=None):
        self.model_options = {"transformer_options": options or {}}
        self.wrappers = []

    def clone(self):
        clone = Patcher(dict(self.model_options["transformer_options"]))
        clone.wrappers = list(self.wrappers)
        return clone

    def get_model_object(self, name):
        assert name == "model_sampling"
        return SimpleNamespace(percent_to_sigma=lambda share: 1.0 - share)

    def add_wrapper_with_key(self, kind, key, wrapper):
        assert kind == "diffusion_model"
        self.wrappers.append(wrapper)


class Model:
    """A diffusion model of one layer: `layer` gets the transformer options."""

    patch_size = (1, 2, 2)

    def __init__(self, layer):
        self.layer = layer

    def _forward(self, x, timestep, context, ref_latent=None, transformer_options={}, **kwargs):
        return self.layer(transformer_options)

    def run(self, patcher, sigma=0.5, latent=LATENT, ref_latent=None, **options):
        options = patcher.model_options["transformer_options"] | {"sigmas": torch.tensor([sigma])} | options
        call = self._forward
        for wrapper in patcher.wrappers:
            call = Executor(call, self._forward, self, wrapper)
        return call(latent, torch.tensor([sigma]), None, ref_latent, options)


class Executor:
    def __init__(self, inner, original, model, wrapper):
        self.inner, self.original, self.class_obj, self.wrapper = inner, original, model, wrapper

    def __call__(self, *args, **kwargs):
        return self.wrapper(Inner(self), *args, **kwargs)


class Inner:
    def __init__(self, outer):
        self.original, self.class_obj, self.inner = outer.original, outer.class_obj, outer.inner

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class WanModel(Model):
    pass


class HunyuanVideo(Model):
    patch_size = [1, 2, 2]
    double_blocks = [SimpleNamespace()]


class OlderHunyuanVideo(HunyuanVideo):
    double_blocks = [SimpleNamespace(flipped_img_txt=True)]


class CogVideoXTransformer3DModel(Model):
    patch_size = 2
    patch_size_t = None


def exact(q, k, v, mask=None):
    """Attention of [B, H, S, D] in f64, with an additive mask or one that is True where a key is seen."""
    scores = q.double() @ k.double().transpose(2, 3) * q.shape[3] ** -0.5
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 3 else mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(dim=3) @ v.double()


class Attention:
    """ComfyUI's attention function, which gives way to an override."""

    def __init__(self):
        self.calls = []

    def plain(
        self, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kw
    ):
        assert kw.pop("_inside_attn_wrapper") and kw.pop("transformer_options")
        self.calls.append(kw)
        if not skip_reshape:
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = exact(q, k, v, mask).to(q.dtype)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def __call__(self, *args, transformer_options, **kwargs):
        kwargs |= {"transformer_options": transformer_options, "_inside_attn_wrapper": True}
        override = transformer_options.get("optimized_attention_override")
        return self.plain(*args, **kwargs) if override is None else override(self.plain, *args, **kwargs)


def rows(count, batch=1, dtype=torch.bfloat16, dim=DIM):
    torch.manual_seed(0)
    return [torch.randn(batch, HEADS, count, dim).to(dtype) for _ in range(3)]


def flat(x):
    return x.transpose(1, 2).flatten(2)


def padding(keys, valid, start, shape):
    """An additive mask that hides keys from `start + valid` to the end of the text."""
    mask = torch.zeros(keys)
    mask[start + valid : start + TEXT] = torch.finfo(torch.bfloat16).min
    return mask.view(shape)


def layout(before):
    """The packed sequence of MiniMax-H3, as its `minimax_h3_layout` has it."""
    parts = [(0, before - 6, "text"), (before - 6, before, "audio"), (before, before + VIDEO, "video")]
    return SimpleNamespace(segments=parts)


# Each form: the model, rows before and after the video, the call, and the transformer options.
FORMS = {
    "Wan, flat, heads by name": (
        WanModel, 0, 0,
        lambda call, q, k, v, o: call(flat(q), flat(k), flat(v), heads=HEADS, transformer_options=o), {},
    ),
    "LTX, flat, mask as fifth": (
        WanModel, 0, 0,
        lambda call, q, k, v, o: call(
            flat(q), flat(k), flat(v), HEADS, torch.zeros(1, 1, VIDEO), attn_precision=None, transformer_options=o
        ), {},
    ),
    "HunyuanVideo, heads apart, mask [1, 1, S]": (
        HunyuanVideo, TEXT, 0,
        lambda call, q, k, v, o: call(
            q, k, v, HEADS, skip_reshape=True, mask=padding(VIDEO + TEXT, 13, 0, (1, 1, -1)), transformer_options=o
        ), {},
    ),
    "older HunyuanVideo, mask [1, 1, S]": (
        OlderHunyuanVideo, 0, TEXT,
        lambda call, q, k, v, o: call(
            q, k, v, HEADS, skip_reshape=True, mask=padding(VIDEO + TEXT, 13, VIDEO, (1, 1, -1)), transformer_options=o
        ), {},
    ),
    "older HunyuanVideo, no mask": (
        OlderHunyuanVideo, 0, TEXT,
        lambda call, q, k, v, o: call(q, k, v, HEADS, skip_reshape=True, mask=None, transformer_options=o), {},
    ),
    "CogVideoX, flat, mask [1, 1, 1, K]": (
        CogVideoXTransformer3DModel, TEXT, 0,
        lambda call, q, k, v, o: call(
            flat(q), flat(k), flat(v), HEADS, padding(VIDEO + TEXT, 13, 0, (1, 1, 1, -1)), transformer_options=o
        ), {},
    ),
    "MiniMax-H3, by its layout": (
        Model, TEXT, 0,
        lambda call, q, k, v, o: call(q, k, v, HEADS, mask=None, skip_reshape=True, transformer_options=o),
        {"minimax_h3_layout": layout(TEXT)},
    ),
    "heads apart in the output": (
        WanModel, 0, 0,
        lambda call, q, k, v, o: flat(
            call(q, k, v, HEADS, skip_reshape=True, skip_output_reshape=True, low_precision_attention=False,
                 transformer_options=o)
        ), {},
    ),
}  # fmt: skip


def valid_rows(form):
    """Rows that are video or valid text. Others are read by nobody."""
    keep = torch.ones(VIDEO + TEXT, dtype=torch.bool)
    if "mask [1" in form:
        start = 0 if FORMS[form][1] else VIDEO
        keep[start + 13 : start + TEXT] = False
    return keep


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dense_heads_give_what_comfyui_computes(form, dtype):
    model, before, after, call, options = FORMS[form]
    qkv = rows(before + VIDEO + after, dtype=dtype)
    theirs, ours = Attention(), Attention()
    # H3's latents come in a list with those of sound.
    latent = [LATENT, torch.zeros(1, 1)] if options else LATENT
    expected = model(lambda o: call(theirs, *qkv, o)).run(Patcher(), latent=latent, **options)
    patcher = node.apply(Patcher(), 1.0, 0.2, 1.0)[0]
    out = model(lambda o: call(ours, *qkv, o)).run(patcher, latent=latent, **options)
    assert len(theirs.calls) == 1 and not ours.calls
    assert out.shape == expected.shape and out.dtype == dtype
    keep = valid_rows(form)[: out.shape[1]]
    assert (out - expected)[:, keep].double().norm() < 0.006 * expected[:, keep].double().norm()


@pytest.mark.parametrize("form", FORMS)
def test_sparse_heads_see_a_band_the_text_and_the_first_frame(form):
    model, before, after, call, options = FORMS[form]
    qkv = rows(before + VIDEO + after)
    sinks = int(model in (WanModel, CogVideoXTransformer3DModel))
    latent = [LATENT, torch.zeros(1, 1)] if options else LATENT
    ours = Attention()
    patcher = node.apply(Patcher(), 0.6, 0.2, 1.0)[0]
    out = model(lambda o: call(ours, *qkv, o)).run(patcher, latent=latent, **options)
    assert not ours.calls
    spec = framestride.Spec(
        frames=FRAMES, tokens_per_frame=HEIGHT * WIDTH, before=before, after=after, heads=HEADS, head_dim=DIM,
        spatial=0.6, temporal=0.6, sink_frames=sinks,
    )  # fmt: skip
    index = torch.arange(VIDEO)
    frame, place = index // (HEIGHT * WIDTH), index % (HEIGHT * WIDTH)
    keep = valid_rows(form)[: out.shape[1]]
    heads = out.unflatten(2, (HEADS, -1)).transpose(1, 2)[:, :, keep]
    errors = []
    for position, half_width in zip((index, place * FRAMES + frame), spec.half_widths()):
        seen = torch.ones(out.shape[1], out.shape[1], dtype=torch.bool)
        video = slice(before, before + VIDEO)
        seen[video, video] = ((position[:, None] - position).abs() < half_width) | (frame < sinks)
        expected = exact(*qkv, (seen & keep)[None, None])[:, :, keep]
        errors.append((heads - expected).norm(dim=(2, 3)) / expected.norm(dim=(2, 3)))
    # Each head has one of the two masks, and the other one is far from it.
    errors = torch.stack(errors)
    assert (errors.amin(0) < 0.006).all() and (errors.amax(0) > 0.05).all()


def test_a_longer_video_and_8_bits(caplog):
    """Against PyTorch's own attention: 30 thousand rows on a GPU, some on the emulator."""
    latent = torch.zeros(1, 16, 21, 60, 104) if DEVICE == "cuda" else LATENT
    tokens = latent[0, 0, :, ::2, ::2].numel()
    errors = {}
    for dim in (DIM, 128):
        q, k, v = rows(tokens + TEXT, dim=dim)
        valid = padding(tokens + TEXT, 13, 0, (1, 1, -1))
        expected = flat(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid[None].to(q.dtype)))
        for compute in ("dtype", "e4m3"):
            ours, patcher = Attention(), node.apply(Patcher(), 1.0, 0.0, 1.0, compute)[0]
            call = lambda o: ours(q, k, v, HEADS, valid, skip_reshape=True, transformer_options=o)
            out = HunyuanVideo(call).run(patcher, latent=latent)
            assert not ours.calls
            error = (out - expected)[:, TEXT:].norm() / expected[:, TEXT:].norm()
            errors[dim, compute] = error.item()
    # Both round their output to 16 bits, and PyTorch the weights of attention as well.
    assert max(errors[DIM, "dtype"], errors[128, "dtype"]) < 0.012
    assert errors[DIM, "e4m3"] == errors[DIM, "dtype"] and 0.012 < errors[128, "e4m3"] < 0.1
    (record,) = caplog.records
    assert "HunyuanVideo in 16 bits" in record.message and "head_dim = 64" in record.message


def test_items_of_a_batch_have_lengths_of_their_own():
    qkv = rows(VIDEO + TEXT, batch=2)
    mask = torch.cat([padding(VIDEO + TEXT, valid, VIDEO, (1, 1, 1, -1)) for valid in (0, 20)])
    ours = Attention()
    layer = lambda o: ours(*qkv, HEADS, mask=mask, skip_reshape=True, transformer_options=o)
    out = OlderHunyuanVideo(layer).run(node.apply(Patcher(), 1.0, 0.0, 1.0)[0])
    expected = flat(exact(*qkv, mask))
    assert not ours.calls
    assert (out - expected)[:, :VIDEO].norm() < 0.006 * expected.norm()


def test_layers_of_one_forward_read_their_mask_once(monkeypatch):
    read = []

    def text_lengths(mask, *arguments):
        read.append(mask)
        return original(mask, *arguments)

    original = node_attention.text_lengths
    monkeypatch.setattr(node_attention, "text_lengths", text_lengths)
    ours, qkv, masks = Attention(), rows(VIDEO + TEXT), [padding(VIDEO + TEXT, 13, VIDEO, (1, 1, -1)) for _ in range(2)]
    layer = lambda o: [ours(*qkv, HEADS, mask, skip_reshape=True, transformer_options=o) for mask in (*masks, *masks)]
    patcher = node.apply(Patcher(), 1.0, 0.0, 1.0)[0]
    for forwards in (1, 2):
        OlderHunyuanVideo(layer).run(patcher)
        assert len(read) == 2 * forwards
    assert not ours.calls


@pytest.mark.parametrize(
    "sigma, sparse", [(1.0, False), (0.76, False), (0.75, True), (0.25, True), (0.24, False)], ids=str
)
def test_it_is_sparse_from_start_to_end(sigma, sparse):
    ours, qkv = Attention(), rows(VIDEO)
    layer = lambda o: ours(*map(flat, qkv), heads=HEADS, transformer_options=o)
    WanModel(layer).run(node.apply(Patcher(), 0.5, 0.25, 0.75)[0], sigma=sigma)
    assert len(ours.calls) == (not sparse)


def triangle(rows):
    return torch.full((rows, rows), -torch.inf).triu(1)


def hole(rows):
    mask = torch.zeros(1, 1, rows)
    mask[..., VIDEO + 3] = -torch.inf
    return mask


WITH_TEXT = VIDEO + TEXT
# What goes on to ComfyUI: the model, rows, arguments of the call and of the forward, what is said.
HANDED_ON = {
    "mask of each pair": (WanModel, VIDEO, {"mask": triangle(VIDEO)[None, None]}, {}, "a mask hides more"),
    "hole in the text": (OlderHunyuanVideo, WITH_TEXT, {"mask": hole(WITH_TEXT)}, {}, "a mask hides more"),
    "hidden video": (OlderHunyuanVideo, WITH_TEXT, {"mask": hole(WITH_TEXT).roll(-50)}, {}, "a mask hides more"),
    "bias": (OlderHunyuanVideo, WITH_TEXT, {"mask": torch.full((1, 1, WITH_TEXT), -0.5)}, {}, "a mask hides more"),
    "mask without heads": (WanModel, VIDEO, {"mask": torch.zeros(VIDEO, VIDEO)[None]}, {}, "a mask hides more"),
    "argument of a later version": (WanModel, VIDEO, {"window": torch.ones(2)}, {}, "not known: window"),
    "rows beside the video": (WanModel, VIDEO + 48, {}, {}, "240 rows, and not 4 x 6 x 8"),
    "text on the other side": (
        HunyuanVideo, WITH_TEXT, {"mask": padding(WITH_TEXT, 13, VIDEO, (1, 1, -1))}, {}, "a mask hides more"
    ),
    "reference image": (OlderHunyuanVideo, WITH_TEXT, {}, {"ref_latent": LATENT}, "212 rows, and not"),
    "layout of another size": (Model, WITH_TEXT, {}, {"minimax_h3_layout": layout(TEXT + 1)}, "212 rows, and not"),
    "layout of another video": (
        Model, WITH_TEXT, {}, {"minimax_h3_layout": layout(TEXT), "latent": LATENT[:, :, :, 2:]}, "and not 4 x 5 x 8"
    ),
    "refiner of the text": (OlderHunyuanVideo, TEXT, {}, {}, None),
    "image": (WanModel, VIDEO, {}, {"latent": LATENT[:, :, :1]}, None),
    "picture without frames": (WanModel, VIDEO, {}, {"latent": LATENT[:, :, 0]}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", HANDED_ON)
def test_what_is_not_known_goes_on_unchanged_and_is_said_once(case, caplog):
    model, count, arguments, run, said = HANDED_ON[case]
    ours, qkv = Attention(), rows(count)
    # The stand-in's own attention knows no later arguments, and gets them all the same.
    layer = lambda o: ours(*qkv, HEADS, skip_reshape=True, transformer_options=o, **arguments)
    patcher = node.apply(Patcher(), 0.5, 0.0, 1.0)[0]
    with caplog.at_level(logging.WARNING):
        outs = [model(layer).run(patcher, **run) for _ in range(2)]
    mask = arguments.get("mask")
    expected = flat(exact(*qkv, mask).bfloat16())
    assert all(torch.equal(out, expected) for out in outs)
    assert [set(call) for call in ours.calls] == [set(arguments) - {"mask"}] * 2
    assert [said in record.message for record in caplog.records] == ([True] if said else [])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"dtype": torch.float32}, "torch.float32"),
        ({"density": 0.05}, "density"),
        ({"devices": ("other",)}, f"on {DEVICE}"),
        ({"gradient": True}, "gradients"),
    ],
    ids=lambda change: str(*change) if isinstance(change, dict) else "",
)  # fmt: skip
def test_what_the_kernels_do_not_take_goes_on(change, said, caplog, monkeypatch):
    monkeypatch.setattr(node_attention, "DEVICES", change.get("devices", (DEVICE,)))
    ours, qkv = Attention(), rows(VIDEO, dtype=change.get("dtype", torch.bfloat16))
    qkv[0].requires_grad_(change.get("gradient", False))
    layer = lambda o: ours(*map(flat, qkv), heads=HEADS, transformer_options=o)
    patcher = node.apply(Patcher(), change.get("density", 0.5), 0.0, 1.0)[0]
    for _ in range(2):
        WanModel(layer).run(patcher)
    assert len(ours.calls) == 2
    assert [said in record.message for record in caplog.records] == [True]


def test_cross_attention_stays_as_it_was(caplog):
    ours, (q, _, _), (_, k, v) = Attention(), rows(VIDEO), rows(VIDEO + 8)
    layer = lambda o: ours(q, k, v, HEADS, skip_reshape=True, transformer_options=o)
    WanModel(layer).run(node.apply(Patcher(), 0.5, 0.0, 1.0)[0])
    assert len(ours.calls) == 1 and not caplog.records


def test_a_model_that_calls_no_wrapper_is_said(caplog):
    ours, qkv = Attention(), rows(VIDEO)
    patcher = node.apply(Patcher(), 0.5, 0.0, 1.0)[0]
    patcher.wrappers.clear()
    WanModel(lambda o: ours(*qkv, HEADS, skip_reshape=True, transformer_options=o)).run(patcher)
    assert len(ours.calls) == 1
    assert ["tells no wrapper" in record.message for record in caplog.records] == [True]


def test_the_node_leaves_its_input_alone_and_another_nodes_override_in_place():
    other = []

    def previous(func, *args, **kwargs):
        other.append(kwargs)
        return func(*args, **kwargs)

    patcher = Patcher({"optimized_attention_override": previous})
    sparse = node.apply(patcher, 0.5, 0.5, 1.0)[0]
    assert patcher.model_options["transformer_options"]["optimized_attention_override"] is previous
    assert not patcher.wrappers
    ours, qkv = Attention(), rows(VIDEO)
    model = WanModel(lambda o: ours(*qkv, HEADS, skip_reshape=True, transformer_options=o))
    model.run(sparse, sigma=0.4)
    assert not other and not ours.calls
    model.run(sparse, sigma=0.9)
    assert len(other) == len(ours.calls) == 1
    # A second node adds a part of the sampling with a density of its own.
    both = node.apply(sparse, 1.0, 0.0, 0.4)[0]
    for sigma in (0.9, 0.4):
        model.run(both, sigma=sigma)
    assert len(other) == len(ours.calls) == 1
