"""The mended import of torchvision, seen from a fresh process: whatever was imported before cannot help it."""

import subprocess
import sys
from pathlib import Path

import torch

from diffusion_cli.vision import make_grid, mend_torchvision

REPO = Path(__file__).parents[1]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPO).stdout


def test_torchvision_and_diffusers_can_be_imported():
    said = run(
        "from diffusion_cli.vision import mend_torchvision; mend_torchvision(); import torchvision, sys;"
        "from torchvision.transforms import v2; print(v2.RandomHorizontalFlip.__name__)"
    )
    assert said == "RandomHorizontalFlip\n"


def test_the_module_itself_does_not_import_torchvision():
    assert run("import sys, diffusion_cli.vision; print('torchvision' in sys.modules)") == "False\n"


def test_mending_twice_gives_the_same_answer():
    assert mend_torchvision() == mend_torchvision()
    assert hasattr(torch.ops.torchvision, "nms")


def test_a_grid_is_filled_row_by_row():
    pictures = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    grid = make_grid(pictures, columns=2, padding=0)
    assert grid.shape == (3, 8, 8)
    assert (grid[:, :4, 4:] == 1).all() and (grid[:, 4:, :4] == 2).all()
