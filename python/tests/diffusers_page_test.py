"""Every program on the page of `framestride.diffusers`, run in its order with a tiny pipeline."""

import re
from pathlib import Path

import diffusers
from diffusers_models import build, tiny_wan

import framestride.diffusers

PAGE = Path(framestride.diffusers.__file__).with_name("README.md")


def test_the_programs_run(monkeypatch, tmp_path):
    # Programs write files.
    monkeypatch.chdir(tmp_path)
    diffusers.utils.logging.set_verbosity_error()
    pipe = tiny_wan(build("Wan")[0])
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda name, torch_dtype: pipe)
    original = pipe.transformer.blocks[0].attn1.processor
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(programs) == 13
    names = {}
    for number, program in enumerate(programs):
        exec(compile(program, f"program {number} of {PAGE}", "exec"), names)
        if number == 0:
            assert names["video"].isfinite().all()
            # What the page says of Wan: 0.3 of the steps are dense. The list has what the next step gets.
            assert pipe.densities == ["dense"] * 2 + ["0.25"] * 8
        if "framestride.study" in program:
            steps = names["study"].numbers["steps"]
            assert [step["index"] for step in steps] == list(range(8))
            assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
            assert framestride.DensitySchedule.load("schedule.json") == names["study"].schedule()
        if '"e4m3"' in program:
            assert pipe("A fox").frames[0].isfinite().all()
            assert pipe.transformer.blocks[0].attn1.processor.compute == "e4m3"
        if "warmup, found" in program:
            pipe("A fox")
            last = names["found"].steps[-1].density[0]
            # 0.2 of 10 steps are dense. After the last step the densities are those of the last one.
            assert pipe.densities[0] == "dense" and float(pipe.densities[-1].replace("dense", "1")) == last
        if "def share" in program:
            # One process cannot run it: diffusers_parallel_test.py does the same in two and in three.
            assert callable(names["share"])
        if "restore(pipe)" in program:
            assert pipe.transformer.blocks[0].attn1.processor is original
