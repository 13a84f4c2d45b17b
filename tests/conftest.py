"""What every test shares: one thread, no network, examples that do not depend on how busy the machine is."""

import gc
import os
from pathlib import Path

# Before torch is imported, and inherited by the commands that tests start: results to the bit need a fixed number of
# threads, and several workers of pytest would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once, not after its retries

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
os.register_at_fork(after_in_child=gc.freeze)  # what other tests left to be collected may have threads, which a child has not

# deadline: a shared machine is slow now and then; derandomize: a red CI is red again when it is run again.
settings.register_profile("house", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("house")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the source tree."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets that lie beside the repository where they were laid; the test is skipped where they were not."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the Hugging Face hub, empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` on a machine without one skips, so that the same command can stand in a script."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
