"""`framestride.attention` on the emulator, beside an f64 reference."""

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import reference
import torch
from torch.library import opcheck

import framestride
import framestride._op  # It registers the operators, which a first call does otherwise.
from framestride import Error, Rope, Spec, Status, Text, Width, arrays

TINY = ["tiny_plain", "tiny_text_last", "tiny_text_rope", "tiny_heads_sinks", "tiny_layer_half"]


@pytest.mark.parametrize("apart", [False, True], ids=["joined", "apart"])
@pytest.mark.parametrize("name", TINY)
def test_outputs_are_those_of_the_reference(name, apart):
    spec = Spec.shipped(name)
    qkv, options = reference.inputs(spec, apart=apart)
    found = framestride.attention(*qkv, spec, return_lse=True, **options)
    reference.check(found, reference.attention(*qkv, spec, **options), spec)
    assert found[0].is_contiguous() and found[0].dtype == qkv[0].dtype


@pytest.mark.parametrize(
    "change",
    [
        {"density": 0.6},
        {"density": (0.7, 0.9)},
        {"half_widths": (20, 61)},
        {"scale": 0.3},
        {"head_types": "dense"},
        {"q_norm": None, "k_norm": None},
    ],
    ids=str,
)
def test_what_a_call_may_change_is_what_the_reference_changes(change):
    spec = Spec.shipped("tiny_text_last")
    qkv, options = reference.inputs(spec, batch=3)
    options.update(change)
    found = framestride.attention(*qkv, spec, return_lse=True, **options)
    reference.check(found, reference.attention(*qkv, spec, **options), spec, options.get("scale"))


@pytest.mark.parametrize("name", TINY)
def test_profiling_is_the_same_alone_within_a_call_and_given_back(name):
    spec = Spec.shipped(name)
    qkv, options = reference.inputs(spec)
    del options["head_types"]
    out, lse, profile = framestride.attention(*qkv, spec, return_lse=True, return_profile=True, **options)
    alone = framestride.profile(*qkv, spec, **options)
    assert all(map(torch.equal, profile[:2], alone[:2])) and profile[2:] == alone[2:] == (None, None)
    assert torch.equal(profile.head_types, profile.errors.argmin(-1) + 1)
    given = framestride.attention(*qkv, spec, head_types=profile.head_types, **options)
    assert torch.equal(out, given)
    assert torch.equal(out, framestride.attention(*qkv, spec, **options))
    reference.check((out, lse), reference.attention(*qkv, spec, head_types=profile.head_types, **options), spec)
    other = framestride.profile(*qkv, spec, seed=5, **options)
    assert not torch.equal(profile.errors, other.errors)


@pytest.mark.parametrize("library, name", [("numpy", "tiny_layer_half"), ("jax.numpy", "tiny_layer_half"), ("jax.numpy", "tiny_text_rope")])
def test_arrays_of_other_libraries(library, name):
    library, spec = pytest.importorskip(library), Spec.shipped(name)
    for apart in (False, True):
        qkv, options = reference.inputs(spec, apart=apart)
        del options["head_types"]
        expected = framestride.attention(*qkv, spec, return_lse=True, return_profile=True, **options)
        # NumPy has no from_dlpack of its own kind for tensors that are views.
        share = lambda tensor: library.from_dlpack(tensor.contiguous())
        given = [arrays._each(share, value) for value in (tuple(qkv), options)]
        out, lse, profile = framestride.attention(*given[0], spec=spec, return_lse=True, return_profile=True, **given[1])
        for found, tensor in zip((out, lse, *profile[:2]), (*expected[:2], *expected[2][:2]), strict=True):
            assert type(found) is type(given[0][0])
            assert torch.equal(torch.from_dlpack(found), tensor)
        alone = framestride.profile(*given[0], spec, **given[1])
        assert torch.equal(torch.from_dlpack(alone.errors), expected[2].errors)


def test_arrays_that_cannot_be_shared_are_refused():
    numpy, spec = pytest.importorskip("numpy"), Spec.shipped("tiny_layer_half")
    (q, k, v), options = reference.inputs(spec)
    with pytest.raises(Error, match="q: found list\n = allowed: a tensor of PyTorch"):
        framestride.attention(q.tolist(), k, v, spec, **options)
    with pytest.raises(Error, match="arrays: found ndarray of <U1.*\n = allowed: what DLPack shares"):
        framestride.attention(numpy.zeros((1, 4, 2, 64), "U1"), k, v, spec, **options)
    with pytest.raises(Error, match="q: found .* float64"):
        framestride.attention(q.double().numpy(), k.numpy(), v.numpy(), spec, **options)
    jax = pytest.importorskip("jax")
    with pytest.raises(Error, match="arrays: found .*Tracer of float16"):
        jax.jit(lambda q: framestride.attention(q, q, q, spec))(jax.numpy.zeros(tuple(q.shape), "float16"))


def test_8_bits_are_near_16():
    spec = replace(Spec.shipped("tiny_e4m3"), largest_error=None)
    qkv, options = reference.inputs(spec)
    found = framestride.attention(*qkv, spec, **options).double()
    expected = framestride.attention(*qkv, replace(spec, compute="dtype"), **options).double()
    # Rounding Q, K, V and the weights costs .053 where scores are those of normal Q and K.
    assert 0.005 < (found - expected).norm() / expected.norm() < 0.15


def test_8_bits_are_had_where_there_are_kernels():
    eight = replace(Spec.shipped("tiny_e4m3"), largest_error=None)
    spec = replace(eight, compute="dtype")
    reasons = []
    assert framestride.in_8_bits(spec, "cpu", reasons.append) == eight and not reasons
    small = Spec.shipped("tiny_text_last")
    assert small.head_dim == 64 and framestride.in_8_bits(small, "cpu", reasons.append) is small
    assert len(reasons) == 1 and "with head_dim = 64" in reasons[0]
    with pytest.raises(Error, match="device: found"):
        framestride.in_8_bits(spec, "tpu")


def test_heads_beyond_the_largest_error_are_in_16_bits():
    spec = replace(Spec.shipped("tiny_e4m3"), largest_error=0.04)
    (q, k, v), options = reference.inputs(spec)
    del options["head_types"]
    # Without queries, all weights of a head are equal. Then only the rounding of V makes an error.
    q[:, :, 1] = 0
    out, profile = framestride.attention(q, k, v, spec, return_profile=True, **options)
    bits, errors = profile.precisions, profile.precision_errors
    assert torch.equal(bits, torch.where(errors <= 0.04, 8, 16).int())
    assert (bits[:, 1] == 8).all() and (bits[:, ::2] == 16).all()
    options["head_types"] = profile.head_types
    eight, sixteen = (
        framestride.attention(q, k, v, replace(spec, compute=compute, largest_error=None), **options)
        for compute in ("e4m3", "dtype")
    )
    assert torch.equal(out, torch.where((bits == 8)[:, None, :, None], eight, sixteen))
    assert torch.equal(out, framestride.attention(q, k, v, spec, precisions=bits, **options))
    assert torch.equal(sixteen, framestride.attention(q, k, v, spec, **options))
    del options["head_types"]
    given, profile = framestride.attention(q, k, v, spec, precisions=bits, return_profile=True, **options)
    assert torch.equal(out, given) and profile.precisions is None and profile.precision_errors is None
    with pytest.raises(framestride.Error, match="precisions"):
        framestride.attention(q, k, v, replace(spec, largest_error=None), precisions=bits, **options)
    with pytest.raises(framestride.Error, match="precisions"):
        framestride.attention(q, k, v, spec, precisions=bits[:1], **options)


@pytest.mark.parametrize("kind", ["one token", "large text", "constant video", "one large row"])
def test_8_bits_of_values_that_are_unlike_each_other(kind):
    frames, tokens, text = (1, 1, 64) if kind == "one token" else (9, 64, 32)
    shape = {"frames": frames, "tokens_per_frame": tokens, "after": text, "heads": 1, "head_dim": 128}
    spec = Spec(**shape, spatial=1.0 if kind == "one token" else 0.3, temporal=1.0, compute="e4m3")
    q, k, v = (torch.randn(1, spec.sequence, 1, 128, dtype=torch.bfloat16) for _ in range(3))
    if kind == "large text":
        v[:, -text:] *= 100
    if kind == "constant video":
        v[:, :-text] = 1
    if kind == "one large row":
        # It is no sample of V's mean, and most rows do not see it.
        v[:, 8] *= 20
    types = torch.ones(1, 1, dtype=torch.int32)
    found = framestride.attention(q, k, v, spec, head_types=types).double()
    expected = framestride.attention(q, k, v, replace(spec, compute="dtype"), head_types=types).double()
    # Each row by itself: those that do not see the large one must not feel it.
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.1 and error.max() < 0.3


def test_dense_attention_is_that_of_pytorch():
    spec = Spec(frames=3, tokens_per_frame=50, heads=2, head_dim=64, spatial=0.5, temporal=0.5, dtype="f16")
    q, k, v = (torch.randn(1, 150, 2, 64, dtype=torch.float16) for _ in range(3))
    out = framestride.attention(q, k, v, spec, head_types="dense")
    heads_first = (tensor.transpose(1, 2).double() for tensor in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert (out.double() - expected).abs().max() < 1e-3


def test_any_strides_are_read_in_place():
    spec = Spec.shipped("tiny_text_last")
    (q, k, v), options = reference.inputs(spec)
    expected = framestride.attention(q, k, v, spec, **options)

    def heads_first(tensor):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    packed = torch.stack([q, k, v], dim=3)
    longer = torch.cat([q, q], dim=1)[:, : spec.sequence]
    odd = torch.empty(2, spec.sequence, 2, 65, dtype=q.dtype)[..., 1:].copy_(k)
    assert torch.equal(expected, framestride.attention(heads_first(q), heads_first(k), heads_first(v), spec, **options))
    assert torch.equal(expected, framestride.attention(*packed.unbind(3), spec, **options))
    assert torch.equal(expected, framestride.attention(longer, odd, v, spec, **options))
    shared = options | {"rope": tuple(table[:1] for table in options["rope"])}
    with pytest.raises(Error, match="cos"):
        framestride.attention(q, k, v, spec, **shared)
    shared["rope"] = tuple(table[0] for table in options["rope"])
    expected = framestride.attention(q, k, v, spec, **shared)
    shared["rope"] = tuple(table.expand(2, -1, -1) for table in shared["rope"])
    assert torch.equal(expected, framestride.attention(q, k, v, spec, **shared))
    one_item = {name: options[name] for name in ("q_norm", "k_norm")} | {"rope": tuple(t[0] for t in options["rope"])}
    loose = q[:1].as_strided(q[:1].shape, (7, *q.stride()[1:]))
    one = framestride.attention(loose, k[:1], v[:1], spec, head_types="dense", **one_item)
    assert torch.equal(one, framestride.attention(q[:1], k[:1], v[:1], spec, head_types="dense", **one_item))


def test_other_types_of_weights_tables_and_lengths_are_converted():
    spec = Spec.shipped("tiny_text_last")
    qkv, options = reference.inputs(spec)
    half = {name: options[name].bfloat16() for name in ("q_norm", "k_norm")}
    half["rope"] = tuple(table.bfloat16() for table in options["rope"])
    half["after"] = Text(lengths=options["after"].lengths.long())
    exact = {name: half[name].float() for name in ("q_norm", "k_norm")}
    exact["rope"] = tuple(table.float().repeat(1, 1, 2)[..., :32] for table in half["rope"])
    exact["after"] = Text(lengths=options["after"].lengths)
    types = options["head_types"]
    out = framestride.attention(*qkv, spec, head_types=types, **exact)
    assert torch.equal(out, framestride.attention(*qkv, spec, head_types=types.long(), **half))


def test_tables_and_weights_of_any_strides_and_alignment():
    spec = Spec.shipped("tiny_text_last")
    qkv, options = reference.inputs(spec)
    options = {name: options[name] for name in ("q_norm", "k_norm", "after", "head_types")}
    batch, shape = qkv[0].shape[0], spec.rope_shape
    cos, sin = torch.randn(batch, *shape), torch.randn(1, *shape)
    out = framestride.attention(*qkv, spec, rope=(cos, sin.repeat(batch, 1, 1)), **options)
    # The sines of all items are one table, with strides of their own.
    assert torch.equal(out, framestride.attention(*qkv, spec, rope=(cos, sin.expand(batch, -1, -1)), **options))

    def moved(tensor):
        return torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)

    options["q_norm"] = moved(options["q_norm"])
    assert torch.equal(out, framestride.attention(*qkv, spec, rope=(moved(cos), sin.repeat(batch, 1, 1)), **options))


def test_more_or_fewer_heads_than_the_spec_has():
    spec = Spec.shipped("tiny_plain")
    qkv = [torch.randn(1, spec.sequence, 3, 128, dtype=torch.bfloat16) for _ in range(3)]
    types = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    all_heads = framestride.attention(*qkv, spec, head_types=types)
    for head in range(3):
        one = [tensor[:, :, head : head + 1] for tensor in qkv]
        assert torch.equal(
            all_heads[:, :, head : head + 1], framestride.attention(*one, spec, head_types=types[:, head : head + 1])
        )


def flat(spec, batch=2):
    """The leading arguments of the operators."""
    (q, k, v), options = reference.inputs(spec, batch)
    norms = [options["q_norm"]], [options["k_norm"]]
    nothing = [], None, [], []
    after = [], options["after"].lengths, [options["after"].q_norm], [options["after"].k_norm]
    return (q, k, v, spec.toml, *norms, list(options["rope"]), *nothing, *after, [0.6, 0.7], [], 0.2, 3)


@pytest.mark.parametrize("given", [False, True], ids=["profiled", "given"])
def test_operators_are_what_pytorch_wants(given):
    inputs = flat(Spec.shipped("tiny_text_last"))
    types = torch.ones(2, 2, dtype=torch.int32) if given else None
    opcheck(torch.ops.framestride.attention.default, (*inputs, types, None, not given, True, not given))
    opcheck(torch.ops.framestride.profile.default, inputs)


def layer(q, k, v, toml, rope, lengths):
    """What a model's processor does: its spec is made where it is called."""
    spec = replace(Spec.from_toml(toml), before=0) if toml else Spec.shipped("tiny_text_last")
    made = Spec(
        frames=spec.frames,
        tokens_per_frame=(q.shape[1] - spec.after) // spec.frames,
        heads=q.shape[2],
        head_dim=q.shape[3],
        spatial=spec.spatial,
        temporal=Width(density=0.5),
        after=spec.after,
        rope=Rope("interleaved"),
    )
    text = Text(lengths=lengths)
    half_widths = made.half_widths(0.6)
    out, lse, profile = framestride.attention(
        q * 2, k, v, made, rope=rope, after=text, half_widths=half_widths, return_lse=True, return_profile=True
    )
    return out.flatten(2) + 1, lse, profile.errors


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break(backend):
    spec = Spec.shipped("tiny_text_last")
    (q, k, v), options = reference.inputs(spec)
    toml = replace(spec, qk_norm=None).toml
    arguments = q, k.transpose(1, 2).contiguous().transpose(1, 2), v, toml, options["rope"], options["after"].lengths
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert all(map(torch.equal, compiled(*arguments), layer(*arguments)))


def test_operators_get_strings_of_one_line():
    # Inductor writes them into comments on a GPU.
    strings = []

    def backend(graph, _):
        nodes = [node for node in graph.graph.nodes if "framestride" in str(node.target)]
        strings.extend(argument for node in nodes for argument in node.args if isinstance(argument, str))
        return graph.forward

    torch._dynamo.reset()
    q = torch.randn(1, 80, 2, 64, dtype=torch.bfloat16)
    torch.compile(of_any_shape, fullgraph=True, backend=backend)(q, 0.5)
    assert len(strings) == 1 and len(strings[0].splitlines()) == 1, strings


def of_any_shape(q, density):
    spec = Spec(
        frames=q.shape[1] // 20,
        tokens_per_frame=20,
        heads=q.shape[2],
        head_dim=64,
        spatial=0.5,
        temporal=0.5,
        rope=Rope("half"),
    )
    table = torch.ones(spec.rope_shape)
    return framestride.attention(q, q, q, spec, rope=(table, table), density=density) * 2


def test_compiled_for_several_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(of_any_shape, fullgraph=True, backend="aot_eager")
    for batch, frames, density in [(1, 4, 0.5), (1, 5, 0.6), (2, 6, 0.7)]:
        q = torch.randn(batch, frames * 20, 2, 64, dtype=torch.bfloat16)
        assert torch.equal(compiled(q, density), of_any_shape(q, density))
    for wrong, said in [(q.float(), "q: found"), (q.requires_grad_(), "gradients: found")]:
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=said):
            compiled(wrong, density)


SPEC = Spec.shipped("tiny_text_last")
Q = torch.zeros(2, SPEC.sequence, 2, 64, dtype=torch.bfloat16)
TABLE = torch.zeros(SPEC.rope_shape)
ROPE = {"rope": (TABLE, TABLE)}


@pytest.mark.parametrize(
    ("subject", "change"),
    [
        ("q: found", {"q": Q[0]}),
        ("q: found", {"q": Q[:, 1:]}),
        ("q: found", {"q": Q[..., :32]}),
        ("q: found", {"q": Q.half()}),
        ("q: found", {"q": Q.transpose(1, 3).contiguous().transpose(1, 3)}),
        ("k: found", {"k": Q[:1]}),
        ("v: found", {"v": Q.float()}),
        ("v: found a tensor on meta", {"v": Q.to("meta")}),
        ("q_norm: found", {"q_norm": torch.ones(65)}),
        ("q_norm.bias: found", {"q_norm": (torch.ones(64), torch.ones(64))}),
        ("k_norm: found", {"k_norm": torch.ones(64, device="meta")}),
        ("rope: found None", {"rope": None}),
        ("cos: found", {"rope": (TABLE[:50], TABLE)}),
        ("sin: found", {"rope": (TABLE, TABLE[:, :31])}),
        ("sin: found", {"rope": (TABLE, TABLE.expand(3, -1, -1))}),
        ("sin: found", {"rope": (TABLE.repeat(2, 1, 1), TABLE)}),
        ("rope: found Tensor", {"rope": TABLE.repeat(2, 1, 1)}),
        ("rope: found complex", {"rope": (TABLE.to(torch.complex64), TABLE)}),
        ("before: found", {"before": Text(q=Q[:, :1], k=Q[:, :1], v=Q[:, :1])}),
        ("before: found", {"before": Text(lengths=torch.ones(2, dtype=torch.int32))}),
        ("after: found Tensor", {"after": Q}),
        ("after.lengths: found list", {"after": Text(lengths=[1, 2])}),
        ("spec: found str", {"spec": "tiny_plain"}),
        ("after: found 1 of", {"after": Text(q=Q[:, :24])}),
        ("after.lengths: found", {"after": Text(lengths=torch.ones(3))}),
        ("after.lengths: found", {"after": Text(lengths=torch.ones(3, dtype=torch.int32))}),
        ("precisions: found [2, 3] float32", {"precisions": torch.ones(2, 3)}),
        ("after.q_norm: found", {"after": Text(q_norm=torch.ones(3))}),
        ("head_types: found", {"head_types": "sparse"}),
        ("head_types: found", {"head_types": torch.zeros(2, 3)}),
        ("density: found", {"density": 0.3, "half_widths": (3, 4)}),
        ("density", {"density": 1.5}),
        ("density", {"density": 1e-9}),
        ("density: found", {"density": "0.5"}),
        ("half_widths: found", {"half_widths": 5}),
        ("half_widths: found", {"half_widths": (0, 4)}),
        ("half_widths: found", {"half_widths": (1, 116)}),
        ("scale: found 0", {"scale": 0.0}),
        ("scale: found 1e-60", {"scale": 1e-60}),
        ("scale: found", {"scale": float("nan")}),
        ("scale: found", {"scale": -1.0}),
        ("seed: found", {"seed": -1}),
        ("seed: found", {"seed": 1 << 63}),
        ("seed: found", {"seed": 1.5}),
        ("return_profile: found", {"return_profile": True, "head_types": "dense"}),
        ("gradients: found", {"q": Q.clone().requires_grad_()}),
        ("gradients: found", {"q_norm": torch.ones(64, requires_grad=True)}),
    ],
)
def test_misuse_is_refused(subject, change):
    arguments = {"q": Q, "k": Q, "v": Q, "spec": SPEC, "head_types": "dense"} | ROPE | change
    with pytest.raises(Error) as error:
        framestride.attention(**arguments)
    assert subject in str(error.value)
    assert "allowed: " in str(error.value) and "mend: " in str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value.status, Status)


@pytest.mark.parametrize("transform", [
    lambda f: torch.func.grad(f)(Q), lambda f: torch.func.vjp(f, Q),
    lambda f: torch.func.jvp(f, (Q,), (Q,)),
], ids=["grad", "vjp", "jvp"])
@pytest.mark.parametrize("call", [framestride.attention, framestride.profile])
def test_transforms_get_no_gradients(transform, call):
    with pytest.raises(Error, match="gradients: found"):
        transform(lambda q: call(q, Q, Q, SPEC, **ROPE))


def test_gradients_are_no_matter_where_autograd_is_off():
    q = Q.clone().requires_grad_()
    with torch.no_grad():
        framestride.attention(q, q, q, SPEC, **ROPE)
    with torch.inference_mode():
        framestride.attention(q, q, q, SPEC, **ROPE)


def test_modules_are_loaded_once():
    first, second = framestride.load(SPEC, "cpu"), framestride.load(Spec.from_toml(SPEC.toml), "cpu")
    assert first.handle == second.handle and first.device == "cpu" and first.load_seconds > 0
    for device in ("cpu:1", "tpu", "cuda:x"):
        with pytest.raises(Error, match="device: found"):
            framestride.load(SPEC, device)
    if not torch.cuda.is_available():
        with pytest.raises(Error) as error:
            framestride.load(SPEC, "cuda:0")
        assert error.value.status == Status.NO_GPU


def test_errors_can_be_sent_to_other_processes():
    with pytest.raises(Error) as error:
        Spec.shipped("tiny")
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), copy.status) == (str(error.value), Status.INVALID_SPEC)
    assert pickle.loads(pickle.dumps(SPEC)) == SPEC


def test_nothing_is_imported_before_it_is_needed():
    program = "import sys, framestride; framestride.Spec.shipped('tiny_plain'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
