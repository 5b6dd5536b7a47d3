"""What only a GPU shows: `python3 python/tests/gpu.py`, with PyTorch for CUDA. It needs neither pytest nor a network.

Outputs are compared with the f64 reference and with PyTorch's own attention; then come other streams, CUDA graphs,
torch.compile, several GPUs and misuse. Where diffusers 0.42.1 is installed, `apply` is compiled and shared among GPUs too. Each
line is one check, and the exit status is 0 when all passed.
"""

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import reference
import torch
from torch.library import opcheck

import framestride
import framestride._op  # It registers the operators, which a first call does otherwise.
from framestride import Error, QkNorm, Rope, Spec, arrays

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def model(**changes) -> Spec:
    """A shape of several tiles, with all that a spec can have."""
    numbers = {
        "frames": 7,
        "tokens_per_frame": 390,
        "heads": 6,
        "head_dim": 128,
        "spatial": 0.3,
        "temporal": 0.3,
        "before": 40,
        "after": 77,
        "qk_norm": QkNorm("rms"),
        "rope": Rope("interleaved", 96, after=True),
    }
    return Spec(**numbers | changes)


@check
def the_reference():
    specs = [Spec.shipped(f"tiny_{name}") for name in ("plain", "text_last", "text_rope", "heads_sinks", "layer_half")]
    specs += [model(), model(dtype="f16", head_dim=64, rope=Rope("half", per_head=True), sink_frames=1)]
    for spec in specs:
        for apart in [False, True]:
            qkv, options = reference.inputs(spec, device="cuda", apart=apart)
            for change in [{}, {"head_types": "dense"}, {"density": 0.7}]:
                options |= change
                found = framestride.attention(*qkv, spec, return_lse=True, **options)
                reference.check(found, reference.attention(*qkv, spec, **options), spec)


@check
def dense_attention_of_pytorch():
    spec = Spec(frames=33, tokens_per_frame=3600, heads=2, head_dim=128, spatial=0.25, temporal=0.25)
    q, k, v = (torch.randn(1, spec.sequence, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = framestride.attention(q, k, v, spec, head_types="dense").double()
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2).double()
    error = ((out - expected).norm() / expected.norm()).item()
    assert error < 0.012, f"relative error {error:.5f}"


@check
def profiling():
    spec = model()
    qkv, options = reference.inputs(spec, device="cuda")
    del options["head_types"]
    out, profile = framestride.attention(*qkv, spec, return_profile=True, **options)
    assert all(map(torch.equal, profile[:2], framestride.profile(*qkv, spec, **options)[:2]))
    assert torch.equal(profile.head_types, profile.errors.argmin(-1).int() + 1)
    assert torch.equal(out, framestride.attention(*qkv, spec, head_types=profile.head_types, **options))


@check
def a_stream_of_ones_own():
    spec = model()
    qkv, options = reference.inputs(spec, device="cuda")
    expected = framestride.attention(*qkv, spec, **options)
    stream = torch.cuda.Stream()
    for _ in range(20):
        source = torch.zeros_like(qkv[0])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The copy is late. A call on another stream would read zeros.
            torch.cuda._sleep(20_000_000)
            source.copy_(qkv[0])
            out = framestride.attention(source, *qkv[1:], spec, **options)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(out, expected)


@check
def a_cuda_graph():
    spec = model(name="graph")
    (q, k, v), options = reference.inputs(spec, device="cuda")
    del options["head_types"]
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            framestride.attention(q, k, v, spec, **options)
    except Error as error:
        assert "while a CUDA graph is captured" in str(error), error
    else:
        raise AssertionError("kernels were loaded within a capture")
    torch.cuda.synchronize()
    module = framestride.load(spec)
    print(f"    loaded in {module.load_seconds:.2f} s, of which the compiler took {module.compile_seconds:.2f} s")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = framestride.attention(q, k, v, spec, return_lse=True, **options)
    for _ in range(5):
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
        options["after"].lengths.copy_(torch.randint(1, spec.after, (2,)))
        graph.replay()
        expected = framestride.attention(q, k, v, spec, return_lse=True, **options)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def c_compiler() -> str | None:
    """Triton compiles a launcher in C."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def layer(q, k, v, toml, options):
    spec = Spec.from_toml(toml)
    out, profile = framestride.attention(q + q, k, v, spec, return_profile=True, **options)
    return out.flatten(2) + 1, profile.errors


@check
def torch_compile():
    spec = model()
    ways = [{"backend": "aot_eager"}, {"backend": "cudagraphs"}]
    compiler = c_compiler()
    if compiler:
        ways += [{"mode": "default"}, {"mode": "reduce-overhead"}]
    for way in ways:
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, **way)
        for _ in range(4):
            qkv, options = reference.inputs(spec, device="cuda")
            del options["head_types"]
            torch.compiler.cudagraph_mark_step_begin()
            out, errors = compiled(*qkv, spec.toml, options)
            expected = layer(*qkv, spec.toml, options)
            assert torch.equal(out, expected[0]) and torch.equal(errors, expected[1]), way
    return None if compiler else "inductor, since Triton finds no C compiler here; aot_eager and cudagraphs are ok"


@check
def the_operators():
    spec = Spec.shipped("tiny_text_last")
    (q, k, v), options = reference.inputs(spec, device="cuda")
    text = options["after"]
    inputs = [q, k, v, spec.toml, [options["q_norm"]], [options["k_norm"]], list(options["rope"])]
    inputs += [[], None, [], [], [], text.lengths, [text.q_norm], [text.k_norm], [0.6, 0.7], [], None, None]
    opcheck(torch.ops.framestride.attention.default, (*inputs, None, None, True, True, True))
    opcheck(torch.ops.framestride.profile.default, tuple(inputs))


@check
def arrays_of_other_libraries():
    # JAX would take most of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    known = [name for name in ("cupy", "jax") if importlib.util.find_spec(name)]
    tried = []
    for name in known:
        library = importlib.import_module(name)
        if name == "jax":
            if library.default_backend() != "gpu":
                continue
            library = library.numpy
        spec = model(dtype="f16")
        qkv, options = reference.inputs(spec, device="cuda")
        del options["head_types"]
        expected = framestride.attention(*qkv, spec, return_lse=True, **options)
        share = lambda tensor, library=library: library.from_dlpack(tensor.contiguous())
        given, named = (arrays._each(share, value) for value in (tuple(qkv), options))
        found = framestride.attention(*given, spec, return_lse=True, **named)
        for array, tensor in zip(found, expected, strict=True):
            assert type(array) is type(given[0]) and torch.equal(torch.from_dlpack(array), tensor), name
        tried.append(name)
    return None if tried == ["cupy", "jax"] else f"all but {' and '.join(tried) or 'nothing'}, since there are no others for a GPU here"


@check
def memory_is_reused():
    spec = model()
    qkv, options = reference.inputs(spec, device="cuda")
    framestride.attention(*qkv, spec, **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(10):
        framestride.attention(*qkv, spec, **options)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    used = (torch.cuda.max_memory_allocated() - before) / (qkv[0].numel() * 2)
    assert used < 7, f"{used:.1f} times Q"


def moved(value, device: str):
    """What lies on another device, with all that is in it."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, framestride.Text):
        return framestride.Text(**{name: moved(part, device) for name, part in vars(value).items()})
    return tuple(moved(part, device) for part in value) if isinstance(value, tuple) else value


@check
def several_gpus():
    if torch.cuda.device_count() < 2:
        return "one GPU here"
    spec = model()
    qkv, options = reference.inputs(spec, device="cuda:0")
    expected = framestride.attention(*qkv, spec, **options)

    there = {name: moved(value, "cuda:1") for name, value in options.items()}
    # The current GPU is the first one, and stays so.
    out = framestride.attention(*moved(tuple(qkv), "cuda:1"), spec, **there)
    assert torch.cuda.current_device() == 0 and out.device.index == 1
    assert torch.equal(out.to("cuda:0"), expected)
    with torch.cuda.device(1):
        assert torch.equal(framestride.attention(*qkv, spec, **options), expected)
        assert framestride.load(spec).device == "cuda:1"
    try:
        framestride.attention(qkv[0], qkv[1].to("cuda:1"), qkv[2], spec, **options)
    except Error as error:
        assert "k: found a tensor on cuda:1" in str(error), error
    else:
        raise AssertionError("tensors of two GPUs were taken")
    return None


def no_bits() -> str | None:
    """Why no heads of a model of diffusers choose between 8 bits and 16 here."""
    if not importlib.util.find_spec("diffusers"):
        return "diffusers is not installed"
    return None if torch.cuda.get_device_capability()[0] == 9 else "8 bits are for a Hopper"


@check
def bits_of_heads_under_cuda_graphs():
    """What one step finds is kept outside the memory of graphs, which the next replay writes over."""
    if (reason := no_bits()) or not c_compiler():
        return reason or "Triton finds no C compiler here"
    from diffusers_models import build, run
    from torch._dynamo.utils import counters

    from framestride.diffusers import apply

    model, inputs = build("HunyuanVideo")
    model, inputs = model.cuda(), {name: moved(value, "cuda") for name, value in inputs.items()}
    videos = [inputs | {"hidden_states": inputs["hidden_states"] * scale} for scale in (1, 3)]

    def found(model, bound: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The outputs of two videos, of six steps with two calls each, and the bits of both."""
        options = {"compute": "e4m3", "largest_error": bound}
        handle = apply(model, schedule=lambda step, layer: 1.0 if step.index == 0 else 0.5, **options)
        outputs, bits = [], []
        for video in videos:
            for call in range(12):
                handle.step(call // 2, 6)
                outputs.append(run(model, video))
            bits += [layer.bits.clone() for layer in handle.layers]
        return outputs, bits

    errors, attention = [], framestride.attention

    def watched(*rows, **options):
        out = attention(*rows, **options)
        errors.extend([out[1].precision_errors] if options.get("return_profile") else [])
        return out

    framestride.attention = watched
    try:
        found(model, 1.0)
    finally:
        framestride.attention = attention
    bound = torch.cat([part.flatten() for part in errors]).median().item()
    ways = {}
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        counters.clear()
        ways[mode] = found(torch.compile(model, mode=mode, fullgraph=True), bound)
    assert counters["inductor"]["cudagraph_skips"] == 0
    for plain, of_graphs in zip(*ways.values(), strict=True):
        assert all(map(torch.equal, plain, of_graphs))
    bits = torch.cat(ways["reduce-overhead"][1])
    print(f"    bound {bound:.4f}: {(bits == 16).sum()} of {len(bits)} heads in 16 bits")
    assert set(bits.tolist()) == {8, 16}
    return None


@check
def bits_of_heads_on_several_gpus():
    """Each GPU finds those of its heads."""
    gpus = 4 if torch.cuda.device_count() > 3 else 2
    if (reason := no_bits()) or torch.cuda.device_count() < 2:
        return reason or "one GPU here"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_gpu, (1, folder), nprocs=1)
        torch.multiprocessing.spawn(one_gpu, (gpus, folder), nprocs=gpus)
        outputs, bits = torch.load(f"{folder}/0_of_1.pt")
        of_gpus = [torch.load(f"{folder}/{rank}_of_{gpus}.pt") for rank in range(gpus)]
    print(f"    on one GPU {[layer.tolist() for layer in bits]}")
    assert set(torch.cat(bits).tolist()) == {8, 16}
    own = 4 // gpus
    for layer, parts in zip(bits, zip(*(bits for _, bits in of_gpus), strict=True), strict=True):
        assert torch.equal(torch.cat([part[own * rank :][:own] for rank, part in enumerate(parts)]), layer)
    for shared, _ in of_gpus:
        for output, expected in zip(shared, outputs, strict=True):
            assert (output - expected).norm() / expected.norm() < 0.005
    return None


def one_gpu(rank: int, gpus: int, folder: str):
    """One of the GPUs that share the heads of a model. It leaves outputs and bits in a file."""
    import torch.distributed as dist
    from diffusers import ContextParallelConfig
    from diffusers_models import model_of, outputs_of, plant

    from framestride.diffusers import apply, cp_plan
    from framestride.diffusers.exchange import Gpus

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meeting_{gpus}", rank=rank, world_size=gpus)
    model, inputs = model_of("HunyuanVideo", 4)
    model, inputs = model.cuda(), {name: moved(value, "cuda") for name, value in inputs.items()}
    handle = apply(model, density=0.5, compute="e4m3", largest_error=0.02)
    if gpus > 1:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=gpus), cp_plan=cp_plan(model))
    plant(handle, model, Gpus(gpus, False, rank))
    outputs = [output.cpu() for output in outputs_of(handle, model, inputs)]
    torch.save((outputs, [layer.bits.cpu() for layer in handle.layers]), Path(folder) / f"{rank}_of_{gpus}.pt")
    dist.destroy_process_group()


@check
def misuse():
    spec = model()
    (q, k, v), options = reference.inputs(spec, device="cuda")
    wrong = [
        {"q": q.cpu()},
        {"k": k.cpu()},
        {"q_norm": options["q_norm"].cpu()},
        {"head_types": options["head_types"].cpu()},
        {"rope": tuple(table.cpu() for table in options["rope"])},
        {"v": v.transpose(1, 3).contiguous().transpose(1, 3)},
        {"q": q.clone().requires_grad_()},
    ]
    for change in wrong:
        try:
            framestride.attention(**{"q": q, "k": k, "v": v, "spec": spec} | options | change)
        except Error:
            continue
        raise AssertionError(f"{list(change)} was taken")
    framestride.attention(q, k, v, spec, **options)
    torch.cuda.synchronize()


@check
def time_on_the_cpu():
    """What a call costs beside its kernels."""
    spec = Spec.shipped("tiny_text_last")
    qkv, options = reference.inputs(spec, device="cuda")
    for name, arguments in (("whole", options), ("head types dense", options | {"head_types": "dense"})):
        for _ in range(20):
            framestride.attention(*qkv, spec, **arguments)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            framestride.attention(*qkv, spec, **arguments)
        seconds = (time.perf_counter() - start) / 200
        torch.cuda.synchronize()
        print(f"    {name}: {seconds * 1e6:.0f} us a call")


def main() -> int:
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    failed = 0
    for function in CHECKS:
        start = time.perf_counter()
        try:
            skipped = function()
            torch.cuda.synchronize()
            result = "ok" if skipped is None else f"left out: {skipped}"
        except Exception:
            traceback.print_exc()
            result, failed = "FAILED", failed + 1
        print(f"{function.__name__.replace('_', ' ')}: {result} ({time.perf_counter() - start:.1f} s)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
