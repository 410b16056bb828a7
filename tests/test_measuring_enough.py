"""How many examples it takes: doubling looks, an error rate over all of them, and the same numbers as in one go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from spectral_surgery import enough
from spectral_surgery.cli import main
from spectral_surgery.enough import Needs, decided, joined, looks, until_sure
from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.measuring import measure
from spectral_surgery.sensitivity_file import load_measurement

SPREAD = np.array([4.0, 3.5, 3.0, *[1.0] * 4, 0.2, 0.15, 0.1])


def drawn(first: int, end: int, size: np.ndarray, mean: np.ndarray | float = 0.0, seed: int = 0) -> Measurement:
    """Gaussian derivatives of five modules, example by example the same however they are drawn."""
    rows = np.stack([np.random.default_rng([seed, i]).standard_normal((5, len(size))) for i in range(first, end)])
    modules = {
        f"layers.{i}.o_proj": ModuleMeasurement(
            np.ones(len(size)), np.arange(len(size)), rows[:, i] * size + mean, np.ones((end - first, len(size)))
        )
        for i in range(5)
    }
    return Measurement(modules, tuple(map(str, range(first, end))), np.zeros(end - first))


def test_looks_double_up_to_all_examples() -> None:
    assert looks(1024) == [32, 64, 128, 256, 512, 1024]
    assert looks(100) == [32, 64, 100]
    assert looks(20) == [20]


def test_a_clear_ranking_takes_few_examples_and_none_takes_all() -> None:
    clear, found = until_sure(lambda a, b: drawn(a, b, SPREAD), 512)
    assert clear.examples < 512
    assert found[-1].decided >= enough.ENOUGH
    alike, found = until_sure(lambda a, b: drawn(a, b, np.ones(10)), 512)
    assert alike.examples == 512
    assert found[-1].decided < 0.1


def test_signs_are_decided_where_means_stand_out() -> None:
    strong, _ = until_sure(lambda a, b: drawn(a, b, np.ones(10), mean=SPREAD), 512, "signs")
    assert strong.examples < 512
    assert until_sure(lambda a, b: drawn(a, b, np.ones(10)), 256, "signs")[0].examples == 256


@pytest.mark.parametrize("needs", ["ranking", "signs"])
def test_without_any_difference_something_is_decided_at_any_look_no_more_often_than_said(needs: Needs) -> None:
    counts, wrong = looks(128), 0
    for seed in range(100):
        whole = drawn(0, 128, np.ones(10), seed=seed)
        parts = [_first(whole, count) for count in counts]
        wrong += any(decided(part, needs, 0.1 / len(counts)) > 0 for part in parts)
    assert wrong <= 18  # 10 expected at most; 18 or fewer with probability 0.995


def _first(whole: Measurement, count: int) -> Measurement:
    modules = {
        path: ModuleMeasurement(m.S, m.ties, m.gate_gradient[:count], m.output_energy[:count])
        for path, m in whole.modules.items()
    }
    return Measurement(modules, whole.digests[:count], whole.losses[:count])


def test_measurements_join_in_order() -> None:
    both = joined(drawn(0, 3, SPREAD), drawn(3, 8, SPREAD))
    whole = drawn(0, 8, SPREAD)
    assert both.digests == whole.digests
    for path, module in whole.modules.items():
        np.testing.assert_array_equal(both.modules[path].gate_gradient, module.gate_gradient)


def test_the_command_measures_in_looks_what_it_measures_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(enough, "FIRST", 4)
    world, output = tiny.world(tmp_path), tmp_path / "out.safetensors"
    arguments = ["measure", str(world.adapter), "--data", str(world.data), "--output", str(output)]
    assert main([*arguments, "--device", "cpu", "--examples", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "after 4" in printed
    found, whole = load_measurement(output), measure(str(world.adapter), str(world.data))
    assert found.digests == whole.digests[: found.examples]
    assert found.about["examples"] == "auto"
    for path, module in found.modules.items():
        np.testing.assert_allclose(
            module.gate_gradient, whole.modules[path].gate_gradient[: found.examples], rtol=1e-4, atol=1e-7
        )
