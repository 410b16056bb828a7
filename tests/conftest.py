"""What every test runs under: no network, a cache of its own, one thread."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment before anything imports torch or a Hugging Face library.

    The libraries read these once, when they are imported, and subprocesses inherit them. One thread
    a process, because the tests run in several and a sum in another order is another number.
    """
    os.environ |= {
        "HF_HOME": str(config.rootpath / ".pytest_cache" / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
