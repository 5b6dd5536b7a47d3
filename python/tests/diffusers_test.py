"""`framestride.diffusers` in whole models: tiny ones of the real classes, in bfloat16, on the emulator."""

import contextlib
import copy
import io
import warnings
from types import SimpleNamespace

import diffusers
import diffusers_models
import pytest
import torch
import torch._dynamo.testing
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers_models import BUILDERS, build, cast, run

import framestride
from framestride.diffusers import Warmup, apply, reach, restore

diffusers.utils.logging.set_verbosity_error()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def processors(model: torch.nn.Module) -> list[object]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


@contextlib.contextmanager
def silence():
    """Nothing is printed, and nothing is warned of."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.filterwarnings("error", message="framestride")
        yield
    assert printed.getvalue() == ""


@pytest.mark.parametrize("name", BUILDERS)
def test_a_dense_model_gives_what_it_gave(name):
    model, inputs = build(name)
    exact = run(*cast(model, inputs, torch.float32))
    before, backend = processors(model), _AttentionBackendRegistry.get_active_backend()
    theirs = run(model, inputs)
    with silence():
        handle = apply(model, density=1.0)
        ours = run(model, inputs)
        handle.restore()
    # Both are the exact output but for 16-bit rounding, of which neither has more.
    assert distance(ours, exact) <= 1.25 * distance(theirs, exact) <= 0.02
    assert handle.layers
    assert processors(model) == before
    assert _AttentionBackendRegistry.get_active_backend() == backend
    assert torch.equal(run(model, inputs), theirs)


@pytest.mark.parametrize("name", BUILDERS)
def test_cross_attention_and_refiners_are_left_alone(name):
    model, inputs = build(name)
    paths = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    handle = apply(model)
    taken = [path for path, module in model.named_modules() if getattr(module, "processor", None) in handle.layers]
    rest = {path for path in paths if path not in taken}
    assert all(model.get_submodule(path).processor is paths[path] for path in rest)
    others = ("attn2", "refiner", "cross", "audio", "text_transformer")
    assert all(any(part in path for part in others) for path in rest)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "HunyuanVideo-1.5"])
def test_a_compiled_model_gives_what_it_gives(name):
    model, inputs = build(name)
    handle = apply(model, density=0.5)
    eager = run(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with silence():
        sparse = run(compiled, inputs)
        # The step is no part of the graph: there is one for dense calls, and one for sparse ones.
        handle.density = 1.0
        handle.step(0, 50)
        dense = run(compiled, inputs)
    assert torch.equal(sparse, eager)
    assert torch.equal(dense, run(model, inputs))
    assert not torch.equal(sparse, dense)


@pytest.mark.parametrize("name", ["HunyuanVideo-1.5", "Wan", "LTX-2"])
def test_blocks_can_be_compiled_alone(name):
    # HunyuanVideo-1.5 itself looks at a tensor, so no more of it can be compiled.
    model, inputs = build(name)
    apply(model, density=0.5)
    eager = run(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert torch.equal(run(model, inputs), eager)


@pytest.mark.parametrize("name", ["HunyuanVideo", "Wan"])
def test_inductor_compiles_it(name):
    model, inputs = build(name)
    exact = run(*cast(model, inputs, torch.float32))
    theirs = run(model, inputs)
    apply(model, density=1.0)
    torch._dynamo.reset()
    assert distance(run(torch.compile(model, fullgraph=True), inputs), exact) <= 1.25 * distance(theirs, exact)


def test_many_steps_compile_two_graphs():
    model, inputs = build("Wan")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    apply(model, density=0.5, schedule=Warmup(steps=0.3), scheduler=scheduler)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    scheduler.set_timesteps(10)
    for time in scheduler.timesteps:
        output = run(compiled, inputs)
        scheduler.step(output, time, inputs["hidden_states"])
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["HunyuanVideo-1.5", "Wan"])
def test_a_model_may_be_compiled_and_run_before(name):
    model, inputs = build(name)
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    theirs = run(model, inputs)
    with silence():
        apply(model, density=0.5)
        compiled = run(model, inputs)
    restore(model)
    assert torch.equal(run(model, inputs), theirs)
    plain, _ = build(name)
    apply(plain, density=0.5)
    assert torch.equal(run(plain, inputs), compiled)
    assert not torch.equal(compiled, theirs)


def densities(handle) -> list[str]:
    return [layer.density for layer in handle.layers]


def steps_of(handle, scheduler, count: int, **options) -> list[list[str]]:
    """The densities of each step of a denoising."""
    scheduler.set_timesteps(count, **options)
    sample, found = torch.zeros(1, 4, 1, 2, 2), []
    for time in scheduler.timesteps:
        found.append(densities(handle))
        scheduler.step(sample, time, sample)
    return found


def test_the_first_share_of_the_steps_is_dense():
    model, _ = build("Wan-VACE")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    handle = apply(model, scheduler=scheduler)
    # Wan: 0.3 of the steps. Again for the next video, whatever its steps.
    assert steps_of(handle, scheduler, 10) == [["dense"] * 2] * 3 + [["0.25"] * 2] * 7
    assert steps_of(handle, scheduler, 4) == [["dense"] * 2] + [["0.25"] * 2] * 3
    assert densities(handle) == ["0.25"] * 2
    handle.restore()
    assert not {"step", "set_timesteps", "set_begin_index"} & set(vars(scheduler))


def test_few_steps_are_dense_by_noise():
    model, _ = build("Wan")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    handle = apply(model, schedule=Warmup(noise=0.9), scheduler=scheduler)
    noise = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    noise.set_timesteps(4)
    expected = [["dense"] if sigma >= 0.9 else ["0.25"] for sigma in noise.sigmas[:-1].tolist()]
    assert ["dense"] in expected and ["0.25"] in expected
    assert steps_of(handle, scheduler, 4) == expected


@pytest.mark.parametrize("scheduler", [
    diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    diffusers.CogVideoXDDIMScheduler(), diffusers.CogVideoXDPMScheduler(), diffusers.MiniMaxH3Scheduler(),
], ids=lambda scheduler: type(scheduler).__name__)
def test_schedulers_tell_their_steps(scheduler):
    seen = []
    model, _ = build("Wan")
    apply(model, schedule=lambda step, layer: seen.append(step) or None, scheduler=scheduler)
    seen.clear()
    sample, old = torch.zeros(1, 4, 1, 2, 2), None
    scheduler.set_timesteps(8)
    for number, time in enumerate(scheduler.timesteps):
        if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
            back = scheduler.timesteps[number - 1] if number else None
            sample, old = scheduler.step(sample, old, time, back, sample, return_dict=False)
        else:
            scheduler.step(sample, time, sample)
    count = len(scheduler.timesteps)
    assert [step.index for step in seen] == list(range(count + 1))
    assert {step.count for step in seen} == {count}
    noise = [step.noise for step in seen]
    assert noise[:-1] == sorted(set(noise), reverse=True) and 1 >= noise[0] > 0.8 and noise[-1] >= 0


def test_a_copied_scheduler_tells_nothing():
    # Pipelines with sound step a copy beside the scheduler of the video.
    model, _ = build("Wan")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    handle = apply(model, scheduler=scheduler)
    sound = copy.deepcopy(scheduler)
    scheduler.set_timesteps(10)
    sound.set_timesteps(10)
    sample = torch.zeros(1, 4, 1, 2, 2)
    for time in sound.timesteps:
        sound.step(sample, time, sample)
    assert sound.step_index == 10 and scheduler.step_index is None
    assert densities(handle) == ["dense"]


def test_a_function_gives_densities_by_step_and_layer():
    model, _ = build("Wan-VACE")
    handle = apply(model, density=0.5, schedule=lambda step, layer: [1.0, None, 0.3][step.index] if layer else None)
    found = []
    for index in range(3):
        handle.step(index, 3)
        found.append(densities(handle))
    assert found == [["0.5", "dense"], ["0.5", "0.5"], ["0.5", "0.3"]]


@pytest.fixture
def computes(monkeypatch) -> list[str]:
    """What tensor cores multiplied in each layer that was called."""
    called, attention = [], framestride.attention

    def watched(*rows, spec, **options):
        called.append(spec.compute)
        return attention(*rows, spec=spec, **options)

    monkeypatch.setattr(framestride, "attention", watched)
    return called


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "Kandinsky 5 Pro", "MiniMax-H3"])
def test_8_bits_are_near_16(name, computes):
    model, inputs = build(name)
    for density in (1.0, 0.5):
        wide = apply(model, density=density)
        expected = run(model, inputs)
        computes.clear()
        with silence():
            apply(model, density=density, compute="e4m3")
            found = run(model, inputs)
        assert computes == ["e4m3"] * len(wide.layers)
        assert 0 < distance(found, expected) < 0.02
    restore(model)


def test_where_8_bits_cannot_be_had_there_are_16(recwarn, computes):
    model, inputs = build("CogVideoX")
    apply(model, density=0.5)
    expected = run(model, inputs)
    apply(model, density=0.5, compute="e4m3")
    for _ in range(2):
        assert torch.equal(run(model, inputs), expected)
    assert set(computes) == {"dtype"}
    (message,) = said(recwarn)
    assert "CogVideoXTransformer3DModel in 16 bits" in message and "head_dim = 64" in message
    apply(flux(), compute="e4m3")
    assert "FluxTransformer2DModel in 16 bits" in said(recwarn)[1]


def test_a_function_gives_8_bits_by_step_and_layer(computes):
    model, inputs = build("Wan-VACE")
    choices = [[None, (None, "e4m3")], [0.5, (1.0, "dtype")], [(0.5, None), (0.6, "e4m3")]]
    for compute in ("dtype", "e4m3"):
        handle = apply(model, density=0.5, compute=compute, schedule=lambda step, layer: choices[step.index][layer])
        found = []
        for index in range(3):
            handle.step(index, 3)
            found.append([(layer.density, layer.compute) for layer in handle.layers])
        assert found == [
            [("0.5", compute), ("0.5", "e4m3")], [("0.5", compute), ("dense", "dtype")], [("0.5", compute), ("0.6", "e4m3")],
        ]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = {compute: [] for compute in (None, "dtype", "e4m3")}
    for compute, found in outputs.items():
        apply(model, density=0.5, schedule=lambda step, layer: (None, compute))
        found += [run(model, inputs), run(compiled, inputs)]
        assert torch.equal(*found)
    assert torch.equal(outputs[None][0], outputs["dtype"][0]) and not torch.equal(outputs[None][0], outputs["e4m3"][0])


def test_heads_beyond_the_largest_error_stay_in_16_bits(monkeypatch):
    model, inputs = build("HunyuanVideo")
    called, attention = [], framestride.attention

    def watched(*rows, **options):
        out = attention(*rows, **options)
        called.append((options, out[1] if options.get("return_profile") else None))
        return out

    def outputs_of(model, **options) -> list[torch.Tensor]:
        """Of a dense step and two sparse ones, each with two calls, as guidance does it."""
        handle = apply(model, schedule=lambda step, layer: 1.0 if step.index == 0 else 0.5, **options)
        called.clear()
        return [(handle.step(call // 2, 3), run(model, inputs))[1] for call in range(6)]

    monkeypatch.setattr(framestride, "attention", watched)
    narrow = outputs_of(model, compute="e4m3")
    half, outputs = len(called) // 6, {}
    # All heads, none, and some of them exceed it.
    for bound in (1e-6, 1.0, None):
        bound = bound or errors.median().item()
        outputs[bound] = outputs_of(model, compute="e4m3", largest_error=bound)
        dense, judged, given = (called[2 * half * index : 2 * half * (index + 1)] for index in range(3))
        assert not any("precisions" in options or found for options, found in dense)
        bits = [found.precisions.amax(dim=0) for _, found in judged]
        errors = torch.cat([found.precision_errors.flatten() for _, found in judged])
        for layer, (options, found) in enumerate(given):
            expected = torch.maximum(bits[layer % half], bits[layer % half + half])
            assert found is None and torch.equal(options["precisions"], expected.expand(options["precisions"].shape))
    assert set(torch.cat(bits).tolist()) == {8, 16}
    wide = outputs_of(model)
    assert all(map(torch.equal, outputs[1e-6], wide))
    assert all(map(torch.equal, outputs[1.0], wide[:2] + narrow[2:]))
    torch._dynamo.reset()
    monkeypatch.setattr(framestride, "attention", attention)
    compiled = torch.compile(model, backend=overwriting(), fullgraph=True)
    assert all(map(torch.equal, outputs_of(compiled, compute="e4m3", largest_error=bound), outputs[bound]))


def test_a_schedule_names_heads_that_stay_in_16_bits(monkeypatch):
    model, inputs = build("Wan-VACE")
    heads = {0: (0,), 1: ()}
    schedule = lambda step, layer: (None, "e4m3", [0, 1][: step.index] if layer else heads[layer])
    given, attention = [], framestride.attention

    def watched(*rows, spec, **options):
        bits = options.get("precisions")
        # The next step writes others there.
        given.append((spec.compute, None if bits is None else bits[0].tolist()))
        return attention(*rows, spec=spec, **options)

    def outputs_of(model) -> list[torch.Tensor]:
        handle = apply(model, density=0.5, schedule=schedule)
        # A step may be told again before its second call.
        return [(handle.step(call // 2, 3), run(model, inputs))[1] for call in range(6)]

    monkeypatch.setattr(framestride, "attention", watched)
    outputs = outputs_of(model)
    assert {compute for compute, _ in given} == {"e4m3"}
    layers = len(given) // 6
    found = [[bits for _, bits in given[at * layers :][:layers]] for at in range(6)]
    first, second = [16, 8], [None, [16, 8], [16, 16]]
    # VACE calls its control layers first, which are the last ones.
    assert found == [[second[call // 2], first] for call in range(6)]
    # A head in 16 bits is what it is where all are.
    monkeypatch.setattr(framestride, "attention", attention)
    apply(model, density=0.5, schedule=lambda step, layer: (None, "dtype") if layer else (None, "e4m3", (0,)))
    assert torch.equal(run(model, inputs), outputs[4])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=overwriting(), fullgraph=True)
    assert all(map(torch.equal, outputs_of(compiled), outputs))


@pytest.mark.parametrize("heads", [[2], [-1], [True], 0, "0", [0.0]])
def test_heads_that_a_layer_has_not_are_refused(heads):
    model, _ = build("Wan")
    with pytest.raises(ValueError, match=r"heads of layer 0 in 16 bits are .* They are a list of numbers from 0 to 1"):
        apply(model, schedule=lambda step, layer: (None, "e4m3", heads))
    assert not hasattr(model, "_framestride")


def test_a_largest_error_stands_beside_no_schedule_of_heads():
    with pytest.raises(ValueError, match="by itself which heads stay in 16 bits. Leave one of them out"):
        apply(build("Wan")[0], largest_error=0.1, schedule=lambda step, layer: (None, "e4m3", [0]))


def overwriting():
    """A backend that does with the outputs of earlier calls what CUDA graphs do: the next call writes over them."""
    earlier: list[torch.Tensor] = []

    def backend(graph, inputs):
        def replay(*inputs):
            for tensor in earlier:
                tensor.zero_()
            outputs = graph(*inputs)
            earlier[:] = [tensor for tensor in outputs if isinstance(tensor, torch.Tensor)]
            return outputs

        return replay

    return backend


@pytest.mark.parametrize("error", [0, 1.5, float("nan"), "0.1"])
def test_a_largest_error_is_a_part(error):
    with pytest.raises(ValueError, match="largest_error is"):
        apply(build("Wan")[0], compute="e4m3", largest_error=error)


def test_what_no_tensor_core_multiplies_is_refused():
    model, _ = build("Wan")
    before = processors(model)
    for wrong in ({"compute": "fp8"}, {"schedule": lambda step, layer: (None, "fp8")}):
        with pytest.raises(ValueError, match="compute is 'fp8'. It is one of 'dtype', 'e4m3'"):
            apply(model, **wrong)
    assert processors(model) == before


def test_guidance_may_be_a_batch_or_two_calls():
    model, inputs = build("Wan")
    apply(model, density=0.5)
    batch = run(model, inputs)
    single = [run(model, {key: value[i : i + 1] for key, value in inputs.items()}) for i in range(2)]
    assert distance(torch.cat(single), batch) < 0.01


def test_any_resolution_works():
    model, inputs = build("Wan")
    apply(model, density=0.5)
    latents = inputs["hidden_states"]
    for sizes in ((3, 6, 8), (6, 4, 10), tuple(latents.shape[2:])):
        assert run(model, inputs | {"hidden_states": torch.randn(2, 4, *sizes, dtype=latents.dtype)}).isfinite().all()


def test_lora_layers_are_called():
    from peft import LoraConfig

    model, inputs = build("Wan")
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    exact = run(*cast(model, inputs, torch.float32))
    theirs = run(model, inputs)
    apply(model, density=1.0)
    assert distance(run(model, inputs), exact) <= 1.25 * distance(theirs, exact)
    model.disable_adapters()
    assert distance(run(model, inputs), exact) > 2 * distance(theirs, exact)


@pytest.mark.parametrize("name", ["Wan", "CogVideoX", "LTX-Video", "MiniMax-H3"])
def test_projections_may_be_fused(name):
    model, inputs = build(name)
    exact = run(*cast(model, inputs, torch.float32))
    theirs = run(model, inputs)
    with torch.no_grad():
        model.fuse_qkv_projections()
    apply(model, density=1.0)
    assert distance(run(model, inputs), exact) <= 1.25 * distance(theirs, exact)


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="weights go from the CPU to the CPU here")
@pytest.mark.parametrize("name", ["HunyuanVideo", "Wan"])
@pytest.mark.parametrize("first", ["apply", "offload"])
def test_weights_may_be_elsewhere(name, first):
    import accelerate

    model, inputs = build(name)
    apply(model, density=0.5)
    expected = run(model, inputs)
    restore(model)
    if first == "apply":
        apply(model, density=0.5)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if first == "offload":
        apply(model, density=0.5)
    # Each module gets its weights only while it is called, and has none before and after.
    assert next(model.parameters()).device.type == "meta"
    assert distance(run(model, inputs), expected) < 0.01


def test_groups_of_weights_may_be_elsewhere():
    model, inputs = build("Wan")
    apply(model, density=0.5)
    expected = run(model, inputs)
    model.enable_group_offload(
        onload_device=torch.get_default_device(), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert distance(run(model, inputs), expected) < 0.01


def test_a_step_cache_may_skip_blocks():
    model, inputs = build("HunyuanVideo")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    with model.cache_context("cond"):
        theirs = [run(model, inputs) for _ in range(3)]
    model._reset_stateful_cache()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    handle = apply(model, density=0.5, schedule=Warmup(steps=0.4), scheduler=scheduler)
    scheduler.set_timesteps(3)
    with model.cache_context("cond"):
        ours = []
        for time in scheduler.timesteps:
            ours.append(run(model, inputs))
            scheduler.step(ours[-1], time, inputs["hidden_states"])
    assert distance(ours[0], theirs[0]) < 0.01
    assert densities(handle) == ["0.5"] * 2


def test_applying_again_exchanges_what_was_applied():
    model, inputs = build("Wan")
    before = processors(model)
    apply(model, density=0.5)
    handle = apply(model, density=0.7)
    assert densities(handle) == ["0.7"]
    restore(model)
    assert processors(model) == before
    restore(model)


def test_backends_are_handed_to_the_models_own_processors():
    model, _ = build("Wan")
    active = _AttentionBackendRegistry._active_backend
    handle = apply(model)
    try:
        model.set_attention_backend("_native_math")
        assert handle.layers[0]._attention_backend == "_native_math"
        handle.restore()
        assert {processor._attention_backend for processor in processors(model)} == {"_native_math"}
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


def said(recorded) -> list[str]:
    return [str(warning.message) for warning in recorded if "framestride" in str(warning.message)]


def test_what_is_not_known_stays_as_it_was(recwarn):
    model, inputs = build("LTX-Video")
    theirs = run(model, inputs)
    apply(model, density=0.5)
    # Without these, the model places the rows by coordinates, and nothing says how many frames there are.
    unsaid = {name: value for name, value in inputs.items() if name not in diffusers_models.VIDEO}
    assert torch.equal(run(model, unsaid), theirs)
    assert torch.equal(run(model, unsaid), theirs)
    (message,) = said(recwarn)
    assert "how many frames" in message


def test_a_density_that_text_alone_exceeds_is_said(recwarn):
    model, inputs = build("HunyuanVideo")
    theirs = run(model, inputs)
    apply(model, density=0.1)
    assert torch.equal(run(model, inputs), theirs)
    assert len(said(recwarn)) == 1


def test_sparse_attention_of_the_model_itself_is_left_to_it(recwarn):
    model, inputs = build("Kandinsky 5 Lite")
    handle = apply(model, density=0.5)
    called = []
    processor = handle.layers[0]
    processor.original = lambda attn, hidden_states, **arguments: called.append(arguments) or hidden_states
    run(model, inputs | {"sparse_params": {"to_fractal": False, "P": 0.9, "sta_mask": torch.ones(1)}})
    assert called[0]["sparse_params"] is not None
    assert len(said(recwarn)) == 1


def test_float32_is_refused():
    model, _ = build("Wan", torch.float32)
    before = processors(model)
    with pytest.raises(ValueError, match="float32.*torch_dtype=torch.bfloat16"):
        apply(model)
    assert processors(model) == before


def test_a_pipeline_is_taken_whole_or_not_at_all():
    right, wrong = build("Wan")[0], build("Wan", torch.float32)[0]
    pipe = SimpleNamespace(components={"transformer": right, "transformer_2": wrong, "vae": None})
    before = processors(right)
    with pytest.raises(ValueError, match="float32"):
        apply(pipe)
    assert processors(right) == before
    pipe.components["transformer_2"] = build("Wan")[0]
    assert len(apply(pipe).layers) == 2
    restore(pipe)
    assert processors(right) == before


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan"), "0.5"])
def test_a_density_is_a_part(density):
    model, _ = build("Wan")
    with pytest.raises(ValueError, match="density"):
        apply(model, density=density)


@pytest.mark.parametrize("wrong", [{"steps": 30}, {"steps": -0.1}, {"noise": 1.5}, {"layers": 0.5}])
def test_a_warmup_is_in_shares(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        Warmup(**wrong)


def test_a_schedule_that_fails_leaves_the_model_alone():
    model, _ = build("Wan")
    before = [module.processor for module in model.modules() if hasattr(module, "processor")]
    for wrong in (0.3, b"schedule.json"):
        with pytest.raises(ValueError, match="schedule is .* It is a Warmup, a function"):
            apply(model, schedule=wrong)
    for wrong in ((), (0.5,), "0.5", [0.5, "e4m3"], (0.5, "e4m3", (), ())):
        with pytest.raises(ValueError, match=r"the schedule says .* of layer 0. It says a density or None"):
            apply(model, schedule=lambda step, layer, wrong=wrong: wrong)
    assert [module.processor for module in model.modules() if hasattr(module, "processor")] == before
    handle = apply(model)
    for index, count in [(50, 50), (-1, 50), (0, 0)]:
        with pytest.raises(ValueError, match="Steps count from 0"):
            handle.step(index, count)


def test_gradients_are_refused():
    model, inputs = build("Wan")
    apply(model, density=0.5)
    with pytest.raises(framestride.Error, match="gradients"):
        model(**inputs)


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
    ).to(torch.bfloat16).eval()


def test_other_models_get_dense_attention():
    torch.manual_seed(0)
    model = flux()
    noise = lambda *shape: torch.randn(*shape).to(torch.bfloat16)
    inputs = dict(
        hidden_states=noise(1, 12, 4), encoder_hidden_states=noise(1, 6, 32), pooled_projections=noise(1, 32),
        timestep=torch.ones(1), img_ids=torch.zeros(12, 3), txt_ids=torch.zeros(6, 3),
    )
    exact = run(*cast(model, inputs, torch.float32))
    theirs = run(model, inputs)
    active = _AttentionBackendRegistry.get_active_backend()
    assert reach(model) == "dense"
    handle = apply(model)
    calls = []
    kept = framestride.attention
    framestride.attention = lambda *arguments, **options: calls.append(options) or kept(*arguments, **options)
    try:
        ours = run(model, inputs)
    finally:
        framestride.attention = kept
    assert len(calls) == 2 and all(options["head_types"] == "dense" for options in calls)
    assert distance(ours, exact) <= 1.25 * distance(theirs, exact)
    assert _AttentionBackendRegistry.get_active_backend() == active
    handle.restore()
    assert {processor._attention_backend for processor in processors(model)} == {None}
    # It is a backend as any other, by its name.
    try:
        model.set_attention_backend("framestride")
        assert torch.equal(run(model, inputs), ours)
    finally:
        _AttentionBackendRegistry.set_active_backend(active[0])


def test_models_out_of_reach_are_said(recwarn):
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, caption_channels=8,
    )
    before = processors(model)
    assert reach(model) == "none"
    apply(model)
    assert processors(model) == before
    (message,) = [str(warning.message) for warning in recwarn if "out of reach" in str(warning.message)]
    assert "AllegroTransformer3DModel" in message
