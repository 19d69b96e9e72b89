"""torch without the parts that answering does not need: the same answers, and the parts are there for whoever wants them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen2 import LLM, SamplingParams
from qwen2.cli.lean import TESTED

LEAN = "import sys\nfrom qwen2.cli import lean\nlean.import_torch()\n"


def python(code: str) -> list[str]:
    """The lines that a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_pinned_torch_is_one_that_this_was_tested_with():
    pin = re.search(r"^torch==(.*)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M)
    assert pin is not None
    assert pin[1].startswith(TESTED), "run these tests with the new version, then add it to TESTED"


@pytest.mark.skipif(not torch.__version__.startswith(TESTED), reason="this torch is imported as ever")
def test_answers_are_the_same_and_need_none_of_it(tiny_folder):
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=12, repetition_penalty=1.2, top_p=0.9)
    expected = LLM(tiny_folder).generate("Rivers flow", params)[0].token_ids
    code = f"""
from qwen2 import LLM, SamplingParams
print(LLM({str(tiny_folder)!r}).generate("Rivers flow", {params!r})[0].token_ids)
print([name for name in lean.LATER if name in sys.modules])
"""
    assert python(LEAN + code) == [str(expected), "[]"]


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("import torch; print(float(torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(()))))", "-0.9189385175704956"),
        ("import torch.utils.data.dataloader as d; print(d.DataLoader is torch_of().utils.data.DataLoader)", "True"),
        ("from torch.utils.data import TensorDataset as T; print(T is torch_of().utils.data.TensorDataset)", "True"),
        ("import torch; print(torch.export.Dim('n').__name__)", "n"),
        ("import torch; print(torch.compile(torch.sin, backend='eager')(torch.zeros(1)))", "tensor([0.])"),
        ("import torch; torch._meta_registrations.aten; print(torch.Generator().manual_seed(3).initial_seed())", "3"),
        ("import torch; print((torch.empty(2, 3, device='meta') @ torch.empty(3, 4, device='meta')).shape)", "torch.Size([2, 4])"),
    ],
)
def test_what_was_left_out_comes_when_it_is_used(code, printed):
    assert python(f"{LEAN}torch_of = lambda: sys.modules['torch']\n{code}") == [printed]


@pytest.mark.skipif(not torch.__version__.startswith(TESTED), reason="this torch is imported as ever")
def test_the_command_imports_it_so(tiny_folder):
    code = f"""
import sys
from qwen2.cli.app import main
from qwen2.cli.lean import LATER
code = main(["run", {str(tiny_folder)!r}, "hi", "--max-tokens", "1"])
print("\\n", code, [name for name in LATER if name in sys.modules])
"""
    assert python(code)[-1].strip() == "0 []"


def test_an_unknown_torch_is_imported_as_ever():
    code = "import sys\nfrom qwen2.cli import lean\nlean.TESTED = ('0.0.',)\nlean.import_torch()\nimport torch"
    assert python(f"{code}\nprint([name for name in ('torch', *lean.LATER) if name not in sys.modules])") == ["[]"]


def test_a_torch_that_is_there_stays_as_it_is():
    code = "import sys, torch\nfrom qwen2.cli import lean\nbefore = dict(sys.modules)\nlean.import_torch()\nprint(before == sys.modules)"
    assert python(code) == ["True"]
