"""What every test starts from: one thread, one seed, property tests that are the same on every run of the CI."""

import importlib.util
import os

# Before torch loads the OpenMP runtime, which reads it once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton loads, which then runs its kernels by interpretation, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("onchip", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("onchip")
torch.set_num_threads(1)  # one worker, one core


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("onchip._native") is None:
        # A machine without a compiler still gets a meaningful run; test_package.py says that the kernels are missing.
        config.addinivalue_line("filterwarnings", "ignore:.*runs on its slow reference")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
