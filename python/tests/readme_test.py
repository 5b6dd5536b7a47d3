"""README.md, followed as a reader would: each program is run by itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def test_every_block_is_a_program_or_the_install_command() -> None:
    blocks = re.findall(r"^```(\w+)\n", PAGE, re.M)
    assert sorted(blocks) == ["console"] + ["python"] * len(PROGRAMS)
    assert len(PROGRAMS) >= 4


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_program_runs(program: str, tmp_path: Path) -> None:
    answer = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
