"""Two processes measure what one measures, and one of them writes it."""

from __future__ import annotations

from pathlib import Path

import launched
import numpy as np
import pytest
import tiny

from spectral_surgery.cli import main
from spectral_surgery.sensitivity_file import load_measurement


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "packing"), [("12", "off"), ("auto", "on")])
def test_two_processes_measure_what_one_does(tmp_path: Path, examples: str, packing: str) -> None:
    world = tiny.world(tmp_path)
    options = ["--data", str(world.data), "--device", "cpu", "--examples", examples, "--token-budget", "40"]
    alone, both = tmp_path / "alone.safetensors", tmp_path / "both.safetensors"
    assert main(["measure", str(world.adapter), *options, "--output", str(alone)]) == 0
    options += ["--packing", packing]
    done = launched.command(["measure", str(world.adapter), *options, "--output", str(both)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Measured 12 rows") == 1
    one, two = load_measurement(alone), load_measurement(both)
    assert (one.about["processes"], two.about["processes"]) == ("1", "2")
    assert (one.about["packed"], two.about["packed"]) == ("no", "yes" if packing == "on" else "no")
    assert one.digests == two.digests
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-6)
    for path, module in one.modules.items():
        # Packed rows are summed in another order, which float32 shows where terms cancel.
        rounding = 1e-6 * np.abs(module.gate_gradient).max()
        np.testing.assert_allclose(two.modules[path].gate_gradient, module.gate_gradient, rtol=1e-5, atol=rounding)
