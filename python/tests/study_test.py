"""Studies and schedules as files, and which density a step has. None of it needs PyTorch."""

import json
import math
from types import SimpleNamespace

import pytest

from framestride import DensitySchedule, Error, Study

STUDY = {
    "framestride_study": 1,
    "models": [{"name": "high", "layers": 1}, {"name": "low", "layers": 1}],
    "video": [4, 5, 6],
    "sampled_rows": 64,
    "densities": [0.2, 0.5],
    "error": 0.1,
    "steps": [
        # A spatial head and a temporal one. At 0.2 the relative error is the root of (0.04 + 0.01) / 2.
        {"index": 0, "count": 8, "noise": 1.0, "layers": [
            {"size": [1.0, 1.0], "errors": [[[0.04, 0.4], [0.3, 0.01]], [[0.004, 0.1], [0.1, 0.001]]]}, None
        ]},
        {"index": 4, "count": 8, "noise": 0.5, "layers": [
            None, {"size": [1.0, 1.0], "errors": [[[0.4, 0.4], [0.3, 0.01]], [[0.04, 0.1], [0.1, 0.001]]]}
        ]},
    ],
}
SCHEDULE = {
    "framestride_schedule": 1,
    "models": [{"name": "high", "layers": 1}, {"name": "low", "layers": 2}],
    "error": 0.1,
    "steps": [
        {"index": 0, "count": 8, "noise": 1.0, "density": [1.0, None, None]},
        {"index": 2, "count": 8, "noise": 0.9, "density": [0.5, 0.2, None]},
        {"index": 6, "count": 8, "noise": 0.4, "density": [0.2, 0.5, None]},
    ],
}


IN_8_BITS = SCHEDULE["steps"][0] | {"compute": ["e4m3", "dtype", None]}


def study(**changes) -> Study:
    return Study(json.dumps(STUDY | changes))


def schedule(*without: str) -> DensitySchedule:
    steps = [step | dict.fromkeys(without) for step in SCHEDULE["steps"]]
    return DensitySchedule.from_json(json.dumps(SCHEDULE | {"steps": steps}))


def step(index: int, count: int, noise: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(index=index, count=count, noise=noise)


def test_a_study_gives_a_table_a_picture_and_a_schedule(tmp_path):
    found = study()
    assert [step.density for step in found.schedule().steps] == [(0.5, None), (None, 1.0)]
    assert [step.density for step in found.schedule(0.2).steps] == [(0.2, None), (None, 0.5)]
    assert (found.schedule().error, found.schedule(0.2).error) == (0.1, 0.2)
    lines = [line.split() for line in found.table().splitlines()]
    assert ["0", "1.000", "0", "0.1581", "0.0500", "0.5", "1", "1", "0", "(0.0632)"] in lines
    assert ["4", "0.500", "1", "0.4528", "0.1432", "dense", "1", "1", "0", "(0.2000)"] in lines
    assert "0.2000" in found.table(heads=True) and "allowed error 0.3" in found.table(error=0.3)
    assert found.plot().startswith(b"\x89PNG\r\n")
    found.save(tmp_path / "study.json")
    assert Study.load(tmp_path / "study.json") == found
    assert found.numbers == STUDY


@pytest.mark.parametrize("wrong, words", [
    ({"framestride_study": 2}, "a study of version 2"),
    ({"densities": [0.5, 0.2]}, "each larger than the one before"),
    ({"densities": [0.2]}, "layer 0 of step 0 with numbers of another shape"),
    ({"models": STUDY["models"][:1]}, "2 layers in step 0"),
    ({"other": 1}, "unknown field `other`"),
])
def test_a_study_that_is_none_is_refused(wrong, words):
    with pytest.raises(Error) as error:
        study(**wrong)
    assert words in str(error.value) and "mend: " in str(error.value)


@pytest.mark.parametrize("error", [0, 1, -0.1, float("nan")])
def test_an_error_is_a_part(error):
    for ask in (study().schedule, lambda error: study().table(error=error), lambda error: study().plot(error=error)):
        with pytest.raises(Error, match="above 0 and below 1"):
            ask(error)


def test_steps_are_compared_by_noise():
    # Layer 2 was in no step.
    found = schedule()
    of = lambda noise: [found(step(3, 50, noise), layer) for layer in range(3)]
    assert of(1.0) == [1.0, 1.0, 1.0]
    assert of(0.95) == [1.0, 1.0, 1.0]
    assert of(0.9) == [0.5, 0.2, 1.0]
    assert of(0.6) == [0.5, 0.5, 1.0]
    assert of(0.4) == [0.2, 0.5, 1.0]
    assert of(0.1) == [0.2, 0.5, 1.0]


def test_steps_are_compared_by_their_share_where_noise_is_not_known():
    for found, noise in ((schedule(), None), (schedule("noise"), 0.3)):
        of = lambda index, count: [found(step(index, count, noise), layer) for layer in range(3)]
        assert of(0, 4) == [1.0, 1.0, 1.0]
        assert of(1, 4) == [0.5, 0.2, 1.0]
        assert of(2, 4) == [0.5, 0.5, 1.0]
        assert of(3, 4) == [0.2, 0.5, 1.0]
        # No step is known.
        assert of(0, 0) == [1.0, 0.5, 1.0]


def test_8_bits_are_those_that_all_near_steps_have(tmp_path):
    computes = [["dtype", None, None], ["e4m3", "e4m3", None], ["e4m3", "dtype", None]]
    steps = [written | {"compute": compute} for written, compute in zip(SCHEDULE["steps"], computes)]
    found = DensitySchedule.from_json(json.dumps(SCHEDULE | {"steps": steps}))
    of = lambda *at: [found(step(*at), layer) for layer in range(3)]
    dense = (1.0, "dtype", ())
    assert of(3, 50, 0.95) == [dense] * 3
    assert of(3, 50, 0.9) == [(0.5, "e4m3", ()), (0.2, "e4m3", ()), dense]
    assert of(3, 50, 0.6) == [(0.5, "e4m3", ()), (0.5, "dtype", ()), dense]
    assert of(3, 50, 0.1) == [(0.2, "e4m3", ()), (0.5, "dtype", ()), dense]
    assert of(0, 0, None) == [dense, (0.5, "dtype", ()), dense]
    found.save(tmp_path / "schedule.json")
    assert DensitySchedule.load(tmp_path / "schedule.json") == found
    assert json.loads((tmp_path / "schedule.json").read_text())["steps"] == steps


def test_heads_stay_in_16_bits_that_any_near_step_keeps_there(tmp_path):
    of_steps = [None, [[3, 1], [], None], [[0, 3], None, None]]
    steps = [written | {"compute": ["e4m3"] * 3} for written in SCHEDULE["steps"]]
    steps = [written | ({} if heads is None else {"heads_in_16_bits": heads}) for written, heads in zip(steps, of_steps)]
    found = DensitySchedule.from_json(json.dumps(SCHEDULE | {"steps": steps}))
    of = lambda noise: [found(step(3, 50, noise), layer)[2] for layer in range(2)]
    assert [of(noise) for noise in (1.0, 0.95, 0.9, 0.6, 0.1)] == [
        [(), ()], [(1, 3), ()], [(1, 3), ()], [(0, 1, 3), ()], [(0, 3), ()],
    ]
    found.save(tmp_path / "schedule.json")
    assert DensitySchedule.load(tmp_path / "schedule.json") == found
    assert json.loads((tmp_path / "schedule.json").read_text())["steps"] == steps


def test_a_study_keeps_the_fewest_heads_in_16_bits():
    [first, second] = STUDY["steps"]
    # At 0.2, 8 bits add 0.01 to one head and 0.03 to the other one.
    eight_bits = [[0.05, 0.04], [0.006, 0.04], [0.002, 0.04]]
    layer = first["layers"][0] | {"eight_bits": eight_bits}
    found = study(steps=[first | {"layers": [layer, None]}, second])
    steps = [(step.density, step.compute, step.heads_in_16_bits) for step in found.schedule(0.175).steps]
    assert steps == [((0.2, None), ("e4m3", None), ((1,), None)), ((None, 0.5), (None, "dtype"), None)]
    assert "0.2 e4m3" in found.table(error=0.175) and "1 of 2" in found.table(error=0.175)
    assert found.plot() != study().plot()


def test_a_schedule_comes_back_from_its_file(tmp_path):
    path = tmp_path / "schedule.json"
    schedule().save(path)
    assert DensitySchedule.load(path) == schedule()
    text = path.read_text()
    assert json.loads(text) == SCHEDULE
    # One line is one step.
    assert text.count("\n") == 10


@pytest.mark.parametrize("wrong, words", [
    ({"framestride_schedule": 2}, "a schedule of version 2"),
    ({"models": []}, "no steps or no layers"),
    ({"steps": []}, "no steps or no layers"),
    ({"models": [{"name": "high"}]}, "KeyError: 'layers'"),
    ({"models": [{"name": "high", "layers": 3.7}]}, "3.7 layers of high"),
    ({"error": math.nan}, "error nan"),
    ({"error": "0.05"}, "error '0.05'"),
    ({"bits": 8}, "key bits"),
    ({"steps": [SCHEDULE["steps"][0] | {"bits": 8}]}, "bits"),
    ({"steps": [{"index": 0, "count": 8, "noise": 1.0, "density": [1.0]}]}, "1 values of density in step 0"),
    ({"steps": [SCHEDULE["steps"][0] | {"density": [1.0, 0.2, 0]}]}, "density 0 in step 0"),
    ({"steps": [SCHEDULE["steps"][0] | {"density": ["1", 0.2, 0.1]}]}, "density '1' in step 0"),
    ({"steps": [SCHEDULE["steps"][0] | {"density": None}]}, "None of density in step 0"),
    ({"steps": [SCHEDULE["steps"][0] | {"index": 8}]}, "step 8 of 8"),
    ({"steps": [SCHEDULE["steps"][0] | {"compute": ["e4m3"]}]}, "1 values of compute in step 0"),
    ({"steps": [SCHEDULE["steps"][0] | {"compute": ["e4m3", "fp8", None]}]}, "compute 'fp8' in step 0"),
    ({"steps": [SCHEDULE["steps"][0] | {"index": True}]}, "step True of 8"),
    ({"steps": [SCHEDULE["steps"][0] | {"density": [math.nan, 0.2, 0.1]}]}, "density nan in step 0"),
    ({"steps": [SCHEDULE["steps"][0] | {"compute": "e4m3"}]}, "'e4m3' of compute in step 0"),
    ({"steps": [SCHEDULE["steps"][0] | {"noise": "high"}]}, "noise 'high'"),
    ({"steps": [SCHEDULE["steps"][0] | {"noise": math.nan}]}, "noise nan"),
    ({"steps": ["first"]}, "TypeError"),
    ({"steps": [IN_8_BITS | {"heads_in_16_bits": [[0]]}]}, "1 values of heads_in_16_bits in step 0"),
    ({"steps": [IN_8_BITS | {"heads_in_16_bits": [[0], [-1], None]}]}, "heads (-1,) in step 0"),
    ({"steps": [IN_8_BITS | {"heads_in_16_bits": [[0], 1, None]}]}, "heads 1 in step 0"),
    ({"steps": [IN_8_BITS | {"heads_in_16_bits": [[], [0], None]}]}, "heads in 16 bits of layer 1 in step 0"),
    ({"steps": [SCHEDULE["steps"][0] | {"heads_in_16_bits": [[0], [], None]}]}, "heads in 16 bits of layer 0"),
])
def test_a_schedule_that_is_none_is_refused(wrong, words, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(SCHEDULE | wrong))
    with pytest.raises(Error) as error:
        DensitySchedule.load(path)
    said = str(error.value)
    assert said.startswith(f"{path}: found ") and words in said and "allowed: " in said and "mend: " in said


def test_a_file_of_another_encoding_is_refused(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(Error, match="found no text in UTF-8"):
        DensitySchedule.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[[", "3"])
def test_another_file_is_refused(text):
    with pytest.raises(Error, match="schedule: found no "):
        DensitySchedule.from_json(text)


def test_another_model_is_refused():
    schedule().check((("high", 1), ("low", 2)))
    for models in ((("high", 1),), (("low", 2), ("high", 1)), (("high", 1), ("low", 3)), ()):
        with pytest.raises(Error, match=r"found a schedule of high \(1 layers\), low \(2 layers\)"):
            schedule().check(models)
