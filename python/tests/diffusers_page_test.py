"""Every program on the page of `framestride.diffusers`, run in its order with a tiny pipeline."""

import re
from pathlib import Path

import diffusers
import torch
from diffusers_models import build, compare

import framestride.diffusers

PAGE = Path(framestride.diffusers.__file__).with_name("README.md")


class TinyWan(diffusers.WanPipeline):
    """The real pipeline of Wan, without the models that read a prompt and paint frames."""

    def __call__(self, prompt: str, negative_prompt: str):
        self.densities = []
        noise = lambda: torch.randn(1, compare.TEXT, compare.EMBEDDING, dtype=torch.bfloat16)
        return super().__call__(
            prompt_embeds=noise(), negative_prompt_embeds=noise(), height=80, width=96, num_frames=17,
            num_inference_steps=10, output_type="latent", callback_on_step_end=self.keep,
        )

    def keep(self, pipe, index, time, tensors):
        self.densities.append(pipe.transformer.blocks[0].attn1.processor.density)
        return tensors

    def to(self, device):
        return self


def test_the_programs_run(monkeypatch):
    diffusers.utils.logging.set_verbosity_error()
    pipe = TinyWan(
        tokenizer=None, text_encoder=None, vae=None, transformer=build("Wan")[0],
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda name, torch_dtype: pipe)
    original = pipe.transformer.blocks[0].attn1.processor
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(programs) == 7
    names = {}
    for number, program in enumerate(programs):
        exec(compile(program, f"program {number} of {PAGE}", "exec"), names)
        if number == 0:
            assert names["video"].isfinite().all()
            # What the page says of Wan: 0.3 of the steps are dense. The list has what the next step gets.
            assert pipe.densities == ["dense"] * 2 + ["0.25"] * 8
        if "restore(pipe)" in program:
            assert pipe.transformer.blocks[0].attn1.processor is original
