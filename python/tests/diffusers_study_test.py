"""`framestride.study` of tiny pipelines whose heads were planted, so that the right masks are known."""

import dataclasses
import itertools
import weakref
from types import SimpleNamespace

import diffusers
import pytest
import reference
import torch
from diffusers_models import BUILDERS, Loop, TinyWan, build, compare, planted_wan, tiny_wan

import framestride
from framestride import DensitySchedule, Error, Study
from framestride.diffusers import Step, apply

diffusers.utils.logging.set_verbosity_error()

# By layer and head. The last layer has a head that neither mask suits.
HEADS = [["temporal", "spatial", "spatial"], ["temporal", "temporal", "spatial"], ["spatial", "neither", "temporal"]]
LAYERS = len(HEADS)
# The first frame is a sink: below 0.2 there is no density.
DENSITIES = (0.1, 0.35, 0.5, 0.8)
STEPS = (0, 2)
WAN = "WanTransformer3DModel"


@pytest.fixture(scope="module")
def pipe() -> TinyWan:
    return tiny_wan(planted_wan(HEADS))


@pytest.fixture(scope="module")
def studied(pipe) -> Study:
    return framestride.study(pipe, "a fox", num_inference_steps=5, steps=STEPS, densities=DENSITIES, error=0.1)


def layers_of(study: Study):
    """Step, layer and the numbers of it, where it was called."""
    for step in study.numbers["steps"]:
        for number, layer in enumerate(step["layers"]):
            if layer is not None:
                yield step["index"], number, layer


def layer_error(layer: dict, density: int) -> float:
    best = sum(min(errors) for errors in layer["errors"][density])
    return (best / sum(layer["size"])) ** 0.5


def test_it_finds_the_masks_that_were_planted(studied):
    lines = [line.split() for line in studied.table(heads=True).splitlines()]
    rows = {tuple(map(int, (line[0], *line[2:4]))): line[4] for line in lines if line and line[0].isdecimal()}
    assert list(rows) == [(step, layer, head) for step in STEPS for layer in range(LAYERS) for head in range(3)]
    for (step, layer, head), better in rows.items():
        if HEADS[layer][head] != "neither":
            assert better == HEADS[layer][head], (step, layer, head)
    for _, number, layer in layers_of(studied):
        assert layer["errors"][0] == [[None, None]] * 3
        for density in (1, 2):
            for kind, size, (spatial, temporal) in zip(HEADS[number], layer["size"], layer["errors"][density]):
                if kind == "neither":
                    assert min(spatial, temporal) > 0.1 * size
                else:
                    right, wrong = (spatial, temporal) if kind == "spatial" else (temporal, spatial)
                    assert right < 0.5 * wrong


@torch.no_grad()
def test_the_errors_are_those_of_the_layers_outputs(pipe):
    """Against f64 attention over all rows: those that were sampled are some of them."""
    calls, kept = [], framestride.attention
    framestride.attention = lambda *inputs, **options: calls.append((inputs, options)) or kept(*inputs, **options)
    try:
        study = framestride.study(pipe, "a fox", num_inference_steps=5, steps=[0], densities=[0.5])
    finally:
        framestride.attention = kept
    # Guidance calls the model twice.
    assert len(calls) == 2 * LAYERS
    for _, number, layer in layers_of(study):
        errors, sizes = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for (q, k, v), options in calls[number::LAYERS]:
            options |= {"q": q, "k": k, "v": v, "density": 0.5}
            kinds = [torch.full((1, 3), kind, dtype=torch.int32) for kind in range(3)]
            dense, *masked = (reference.attention(**options | {"head_types": kind})[0] for kind in kinds)
            sizes += dense.square().mean((0, 1, 3)) / 2
            for mask, out in enumerate(masked):
                errors[:, mask] += (out - dense).square().mean((0, 1, 3)) / 2
        assert torch.tensor(layer["size"]).double() == pytest.approx(sizes, rel=0.02)
        assert torch.tensor(layer["errors"][0]).double().flatten() == pytest.approx(errors.flatten(), rel=0.5)


def test_a_schedule_has_the_least_density_within_the_error(studied):
    for error in (0.02, 0.1, 0.3, 0.7):
        schedule = studied.schedule(error)
        assert schedule.models == ((WAN, LAYERS),) and schedule.error == error
        assert [step.index for step in schedule.steps] == list(STEPS)
        for (_, number, layer), step in zip(layers_of(studied), [step for step in schedule.steps for _ in range(LAYERS)]):
            within = [density for at, density in enumerate(DENSITIES) if at and layer_error(layer, at) <= error]
            assert step.density[number] == min(within, default=1.0)
    # The head that neither mask suits keeps its layer dense, and no other one.
    for step in studied.schedule().steps:
        assert step.density[2] == 1.0 and max(step.density[:2]) <= 0.8
    assert studied.schedule() == studied.schedule(0.1)


def test_a_sparse_layer_is_within_the_error(pipe, studied):
    """What a schedule allows is how far the output of attention then lies from the dense one."""
    outputs, kept = [], framestride.attention

    def both(*inputs, **options):
        out, dense = kept(*inputs, **options), kept(*inputs, **options | {"half_widths": None, "head_types": "dense"})
        outputs.append(((out - dense).float().norm() / dense.float().norm()).item())
        return out

    apply(pipe, schedule=studied.schedule(0.2))
    framestride.attention = both
    try:
        pipe("a fox", num_inference_steps=5)
    finally:
        framestride.attention = kept
        framestride.diffusers.restore(pipe)
    errors = torch.tensor(outputs).view(5, 2, LAYERS)
    assert errors[:, :, 2].max() == 0 < errors[0, :, :2].min() and errors.max() < 0.3


def test_8_bits_are_studied_and_scheduled(pipe):
    study = framestride.study(pipe, "a fox", num_inference_steps=5, steps=[2], densities=DENSITIES, error=0.2, compute="e4m3")
    (step,) = study.numbers["steps"]
    for layer in step["layers"]:
        assert layer["eight_bits"][0] == [None] * 3
        *masked, dense = torch.tensor(layer["eight_bits"][1:])
        masks = torch.tensor(layer["errors"][1:]).amin(dim=2)
        assert (0 < dense).all() and (dense < 0.01 * torch.tensor(layer["size"])).all()
        # Mask and rounding add up, and the mask's error is one of sampled rows.
        for errors, mask in zip(masked, masks, strict=True):
            assert (errors > 0.4 * (mask + dense)).all() and (errors < 2.5 * (mask + dense)).all()
    for error in (0.2, 0.1, 0.05):
        (scheduled,) = study.schedule(error).steps
        chosen = zip(scheduled.density, scheduled.compute, scheduled.heads_in_16_bits or [()] * LAYERS, strict=True)
        assert list(chosen) == [fastest(layer, error) for layer in step["layers"]]
    schedule = study.schedule()
    (scheduled,) = schedule.steps
    assert scheduled.compute == ("e4m3",) * 3
    assert "e4m3" in study.table() and "8 bits:" in study.table(heads=True)
    handle = apply(pipe, schedule=schedule)
    handle.step(2, 5, step["noise"])
    assert [(layer.density, layer.compute) for layer in handle.layers] == [
        ("dense" if density == 1 else repr(density), "e4m3") for density in scheduled.density
    ]
    handle.restore()
    # The last layer is dense with an error that two of its heads exceed.
    rounding = sorted(layer["eight_bits"][-1])
    mixed = study.schedule(((rounding[0] + 0.5 * rounding[1]) / sum(layer["size"])) ** 0.5)
    assert mixed.steps[0].density[2] == 1.0 and len(mixed.steps[0].heads_in_16_bits[2]) == 2
    handle = apply(pipe, schedule=mixed)
    handle.step(2, 5, step["noise"])
    assert handle.layers[2].in_16_bits == mixed.steps[0].heads_in_16_bits[2]
    handle.restore()
    with pytest.raises(ValueError, match="Leave one of them out"):
        apply(pipe, schedule=mixed, largest_error=0.1)
    # An error that rounding exceeds leaves all in 16 bits.
    assert set(study.schedule(0.001).steps[0].compute) == {"dtype"}


def fastest(layer: dict, allowed: float) -> tuple[float, str, tuple[int, ...]]:
    """Density, compute and heads in 16 bits of all choices within the error that take the least time."""
    choices = []
    for at, density in reversed(list(enumerate((*DENSITIES[1:], 1.0), start=1))):
        masks = [0.0] * 3 if density == 1.0 else [min(errors) for errors in layer["errors"][at]]
        within = []
        for in_16 in itertools.product([False, True], repeat=3):
            error = sum(masks[head] if in_16[head] else layer["eight_bits"][at][head] for head in range(3))
            if (error / sum(layer["size"])) ** 0.5 <= allowed:
                within.append((sum(in_16), error, tuple(head for head in range(3) if in_16[head])))
        if not within:
            break
        count, _, heads = min(within)
        choices.append((density * (1 - 0.3 * (3 - count) / 3), density, "dtype" if count == 3 else "e4m3", heads))
    _, density, compute, heads = min(choices)
    return density, compute, heads if compute == "e4m3" else ()


def test_8_bits_that_cannot_be_had_are_said_once(recwarn):
    model, inputs = build("CogVideoX")
    study = framestride.study(Loop(model, inputs), 2, densities=[0.7], error=0.5, compute="e4m3")
    assert all("eight_bits" not in layer for _, _, layer in layers_of(study))
    assert all(step.compute is None for step in study.schedule().steps)
    (message,) = [str(warning.message) for warning in recwarn if "in 16 bits alone" in str(warning.message)]
    assert "head_dim = 64" in message


def densities(handle) -> list[float]:
    return [1.0 if layer.density == "dense" else float(layer.density) for layer in handle.layers]


def test_apply_takes_a_schedule_and_its_file(pipe, studied, tmp_path):
    schedule, path = studied.schedule(), tmp_path / "schedule.json"
    schedule.save(path)
    assert DensitySchedule.load(path) == schedule
    for given in (schedule, path, str(path)):
        handle = apply(pipe, schedule=given)
        found = []
        pipe.scheduler.set_timesteps(5)
        for index in range(5):
            handle.step(index, 5, pipe.scheduler.timesteps[index].item() / 1000)
            found.append(densities(handle))
        # Step 1 lies between two that were studied, and those after the last are as the last.
        first, last = (list(step.density) for step in schedule.steps)
        assert found == [first, list(map(max, first, last)), last, last, last]
        handle.restore()


def test_another_model_is_refused(pipe, studied, tmp_path):
    schedule = studied.schedule()
    other = tiny_wan(planted_wan(HEADS[:2]))
    before = [block.attn1.processor for block in other.transformer.blocks]
    for target, found in ((other, rf"{WAN} \(2 layers\)"), (build("HunyuanVideo")[0], "HunyuanVideoTransformer3DModel")):
        with pytest.raises(Error, match=rf"found a schedule of {WAN} \(3 layers\)\n = allowed: one of {found}") as error:
            apply(target, schedule=schedule)
        assert "mend: Study this model" in str(error.value)
    assert [block.attn1.processor for block in other.transformer.blocks] == before
    with pytest.raises(FileNotFoundError):
        apply(pipe, schedule=tmp_path / "none.json")


def test_a_head_that_a_layer_has_not_is_refused_before_any_step(pipe, studied, tmp_path):
    first, *others = studied.schedule().steps
    compute = ("e4m3",) * LAYERS
    last = dataclasses.replace(others[-1], compute=compute, heads_in_16_bits=((99,), *[()] * (LAYERS - 1)))
    steps = [dataclasses.replace(step, compute=compute) for step in (first, *others[:-1])]
    wrong = dataclasses.replace(studied.schedule(), steps=(*steps, last))

    def fails(step, layer):
        raise RuntimeError("no density")

    for schedule, error in ((wrong, "the heads of layer 0 in 16 bits are"), (fails, "no density")):
        with pytest.raises((ValueError, RuntimeError), match=error):
            apply(pipe, schedule=schedule)
        assert not {"step", "set_timesteps", "set_begin_index"} & vars(pipe.scheduler).keys()
    pipe("a fox", num_inference_steps=1)


def test_the_pipeline_is_left_as_it_was_and_stops_in_time(pipe):
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(0))
    freed, pipe.maybe_free_model_hooks = [], lambda: freed.append(0)
    try:
        framestride.study(pipe, "a fox", num_inference_steps=5, steps=[1], densities=[0.5])
    finally:
        hook.remove()
        del pipe.maybe_free_model_hooks
    # Two steps with two calls each.
    assert len(calls) == 4 and freed == [0]
    assert [block.attn1.processor for block in pipe.transformer.blocks] == before
    assert not {"step", "set_timesteps", "set_begin_index"} & set(vars(pipe.scheduler))


def test_it_keeps_no_tensors_and_launches_a_profile_for_each_density(pipe, monkeypatch):
    seen, dense, profiled = [], [], []
    profile, attention = framestride.profile, framestride.attention

    def counted(q, k, v, spec, **options):
        profiled.append(options["half_widths"])
        return profile(q, k, v, spec, **options)

    def watched(q, k, v, **options):
        # The layer before is forgotten by now.
        assert all(kept() is None for kept in seen)
        out = attention(q, k, v, **options)
        dense.append(options["head_types"])
        seen.extend(map(weakref.ref, (q, v, out)))
        return out

    monkeypatch.setattr(framestride, "profile", counted)
    monkeypatch.setattr(framestride, "attention", watched)
    framestride.study(pipe, "a fox", num_inference_steps=5, steps=[1], densities=[0.5, 0.35])
    assert dense == ["dense"] * 4 * LAYERS
    assert len(profiled) == 2 * 2 * LAYERS and len(set(profiled)) == 2


@pytest.mark.parametrize("name", BUILDERS)
def test_models_of_all_families(name, monkeypatch):
    model, inputs = build(name)
    outputs, attention = [], framestride.attention

    def kept(*tensors, spec, **options):
        out = attention(*tensors, spec=spec, **options)
        outputs.append(out[:, spec.before : spec.before + spec.video_tokens].float())
        return out

    monkeypatch.setattr(framestride, "attention", kept)
    study = framestride.study(Loop(model, inputs), 2, steps=[0], densities=[0.7, 1.0], error=0.5)
    assert len(outputs) == study.numbers["models"][0]["layers"]
    # The layers of Wan-VACE that control others are called before those, and stand behind them.
    layers = sorted((layer for _, _, layer in layers_of(study)), key=lambda layer: layer["size"][0])
    outputs.sort(key=lambda out: out[:, :, 0].square().mean().item())
    for layer, out in zip(layers, outputs, strict=True):
        assert layer["size"] == pytest.approx(out.square().mean((0, 1, 3)).tolist(), rel=1e-3)
        assert all(0 < error < size for errors, size in zip(layer["errors"][0], layer["size"]) for error in errors)
        assert all(error < 1e-4 * size for errors, size in zip(layer["errors"][1], layer["size"]) for error in errors)


def test_every_step_is_studied_unless_some_are_named(pipe):
    study = framestride.study(pipe, "a fox", num_inference_steps=2, densities=[0.5])
    assert [(step["index"], step["count"]) for step in study.numbers["steps"]] == [(0, 2), (1, 2)]


def test_a_compiled_model_runs_uncompiled_meanwhile(studied):
    pipe = tiny_wan(planted_wan(HEADS))
    pipe.transformer.compile(backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    compiled = framestride.study(pipe, "a fox", num_inference_steps=5, steps=STEPS, densities=DENSITIES, error=0.1)
    assert compiled.schedule() == studied.schedule()


def test_two_transformers_have_layers_of_their_own():
    """As Wan 2.2: one transformer for the steps with much noise, another one for those with little."""
    parts = {"transformer_2": planted_wan([["temporal"] * 3]), "boundary_ratio": 0.9}
    pipe = tiny_wan(planted_wan([["spatial"] * 3] * 2), **parts)
    study = framestride.study(pipe, "a fox", num_inference_steps=4, steps=[0, 3], densities=[0.5], error=0.6)
    found = study.schedule()
    assert found.models == ((WAN, 2), (WAN, 1))
    assert [[density is not None for density in step.density] for step in found.steps] == [[1, 1, 0], [0, 0, 1]]
    for index, number, layer in layers_of(study):
        spatial, temporal = map(sum, zip(*layer["errors"][0]))
        assert (spatial < temporal) == (number < 2) == (index == 0)
    # Before its first step that was studied, a layer is dense.
    assert [found(Step(1, 4, 0.95), layer) for layer in range(3)] == [0.5, 0.5, 1.0]


def test_a_bar_shows_the_progress_unless_it_is_disabled(pipe, capfd):
    framestride.study(pipe, "a fox", num_inference_steps=1, densities=[0.5])
    assert capfd.readouterr() == ("", "")
    shown = tiny_wan(pipe.transformer)
    shown.set_progress_bar_config(disable=False)
    framestride.study(shown, "a fox", num_inference_steps=1, densities=[0.5])
    assert f"study: 100%|██████████| {LAYERS}/{LAYERS}" in capfd.readouterr().err


def test_pictures_and_files(studied, tmp_path):
    assert studied.plot().startswith(b"\x89PNG\r\n") and studied.plot() != studied.plot(error=0.3)
    studied.save(tmp_path / "study.json")
    assert Study.load(tmp_path / "study.json") == studied
    assert repr(studied) == f"Study({WAN} (3 layers), steps [0, 2], densities [0.1, 0.35, 0.5, 0.8])"


@pytest.mark.parametrize("wrong, found", [
    ({"steps": [5]}, "steps: found 5\n = allowed: 0 to 4"),
    ({"steps": []}, "steps: found"),
    ({"steps": [-1]}, "steps: found"),
    ({"densities": [0.5, 1.5]}, "densities: found"),
    ({"densities": []}, "densities: found"),
    ({"error": 1.0}, "error: found 1.0"),
    ({"compute": "fp8"}, "compute: found 'fp8'"),
])
def test_arguments_that_are_none(pipe, wrong, found):
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    with pytest.raises(Error) as error:
        framestride.study(pipe, "a fox", **{"num_inference_steps": 5, "densities": [0.5]} | wrong)
    assert str(error.value).startswith(found) and "mend: " in str(error.value)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == before


def test_what_is_no_pipeline_is_refused(pipe, recwarn):
    with pytest.raises(Error, match="a pipeline of diffusers, with a scheduler"):
        framestride.study(pipe.transformer, "a fox")
    # A pipeline that calls nothing.
    Idle = type("Idle", (SimpleNamespace,), {"__call__": lambda self: None})
    with pytest.raises(ValueError, match="has no transformer"):
        framestride.study(Idle(components={}, scheduler=pipe.scheduler))
    with pytest.raises(Error, match="no call of a layer whose attention framestride computes"):
        framestride.study(Idle(components={"transformer": pipe.transformer}, scheduler=pipe.scheduler))
    config = {"num_attention_heads": 1, "attention_head_dim": 24, "num_layers": 1, "cross_attention_dim": 24}
    allegro = diffusers.AllegroTransformer3DModel(in_channels=4, out_channels=4, caption_channels=8, **config)
    with pytest.raises(Error, match="of whose transformers none becomes sparse"):
        framestride.study(Idle(components={"transformer": allegro}, scheduler=pipe.scheduler))


def test_the_video_and_its_rows_are_said(studied):
    assert studied.numbers["video"] == [compare.FRAMES, compare.HEIGHT, compare.WIDTH]
    assert studied.numbers["sampled_rows"] == 64
    assert "video of 5 x 5 x 6 patches; 64 sampled rows" in studied.table()
