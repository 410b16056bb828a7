"""Planted structure is found and named; in random adapters nothing is found, at the stated rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import planted
import pytest
import torch

from spectral_surgery import alignment, geometry
from spectral_surgery.anatomy import Leading
from spectral_surgery.findings import Finding, Unhealthy, check, findings, relations
from spectral_surgery.inspecting import inspect
from spectral_surgery.inspection import Inspection
from spectral_surgery.measurement import Measurement, ModuleMeasurement

FIRST = planted.path(1, "o_proj")
Change = Callable[[planted.Factors], object]


def found_in(*changes: Change, **options: object) -> list[Finding]:
    (view,) = inspect([planted.readable(*changes, **options)])
    return findings(view)


def codes(found: list[Finding]) -> list[str]:
    return [finding.code for finding in found]


def test_in_random_adapters_nothing_is_found() -> None:
    false = [codes(found_in(seed=seed, layers=6)) for seed in range(12)]
    assert not any(false), false


def random_inspection(generator: torch.Generator) -> Inspection:
    """Geometry of an adapter whose directions are uniformly random: exact subspaces, no spectra."""

    def directions(dimension: int) -> np.ndarray:
        return torch.linalg.qr(torch.randn(dimension, 4, generator=generator))[0].numpy()

    leading = {
        planted.path(layer, kind): Leading(directions(out), directions(inside), separate=True, closed=True)
        for layer in range(5)
        for kind, (out, inside) in planted.SIZES.items()
    }
    modules: Any = {}
    matrices, curves = tuple(alignment.matrices(leading, 4)), tuple(alignment.synergy(leading, 4))
    return Inspection("random", "", None, 0, 0, (), modules, 4, matrices, curves)


@pytest.mark.slow
def test_the_stated_error_rate_is_the_one_that_random_adapters_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate of 1 % and of 20 %, over the same 200 random adapters.

    Bonferroni's bound is an upper one, so fewer false findings are right and more are not: over 7 at 1 % have a
    probability of 0.1 %, over 58 at 20 % too. At 20 % there must be some, or the limits would be so wide that the test
    could not fail; fewer than 10 would mean that the true rate is under a quarter of the stated one.
    """
    generator = torch.Generator().manual_seed(0)
    views = [random_inspection(generator) for _ in range(200)]
    rules = (relations.shared_directions, relations.synergies)
    counts = {}
    for rate in (0.01, 0.2):
        limit = partial(geometry.chance_limit, rate=rate)
        monkeypatch.setattr(relations, "chance_limit", limit)
        counts[rate] = sum(any(list(rule(view)) for rule in rules) for view in views)
    assert counts[0.01] <= 7, counts
    assert 10 <= counts[0.2] <= 58, counts


def share_a_direction(found: planted.Factors) -> None:
    direction = torch.nn.functional.normalize(torch.ones(96), dim=0)
    for layer in range(4):
        B, A = found[planted.path(layer, "down_proj")]
        found[planted.path(layer, "down_proj")] = (torch.cat([B[:, :-1], 30 * direction[:, None]], 1), A)


def align_o_with_down(found: planted.Factors) -> None:
    for layer in range(4):
        B = found[planted.path(layer, "down_proj")][0]
        found[planted.path(layer, "o_proj")] = (B.clone(), found[planted.path(layer, "o_proj")][1])


def spike(found: planted.Factors) -> None:
    B, A = found[FIRST]
    found[FIRST] = (B * torch.tensor([1e-3] * 5 + [1.0]), A)


def kill(found: planted.Factors) -> None:
    found[FIRST] = (torch.zeros_like(found[FIRST][0]), found[FIRST][1])


def kill_all(found: planted.Factors) -> None:
    for path, (B, A) in found.items():
        found[path] = (torch.zeros_like(B), A)


def strengthen(found: planted.Factors) -> None:
    found[FIRST] = (100 * found[FIRST][0], found[FIRST][1])


def duplicate(found: planted.Factors) -> None:
    B, A = found[FIRST]
    found[FIRST] = (B[:, [0, 0, 2, 3, 4, 5]], A[[0, 0, 2, 3, 4, 5]])


def cancel(found: planted.Factors) -> None:
    B, A = found[FIRST]
    B, A = B[:, [0, 0, 2, 3, 4, 5]].clone(), A[[0, 0, 2, 3, 4, 5]].clone()
    B[:, :2] *= 100
    A[1] *= -1
    found[FIRST] = (B, A)


def flatten(found: planted.Factors) -> None:
    B, A = found[FIRST]
    found[FIRST] = (torch.linalg.qr(B)[0] * B.norm() / 6**0.5, torch.linalg.qr(A.T)[0].T * A.norm() / 6**0.5)


def taper(found: planted.Factors) -> None:
    for path, (B, A) in found.items():
        found[path] = (B * torch.tensor([1.0, 0.9, 0.05, 0.05, 0.05, 0.05]), A)


@pytest.mark.parametrize(
    ("change", "code", "severity"),
    [
        (share_a_direction, "shared-direction", "note"),
        (align_o_with_down, "synergy", "note"),
        (spike, "spike", "warning"),
        (kill, "dead-module", "warning"),
        (kill_all, "zero-update", "error"),
        (strengthen, "outlier-module", "warning"),
        (duplicate, "duplicate-components", "warning"),
        (cancel, "cancellation", "warning"),
        (flatten, "tied-spectrum", "note"),
        (taper, "low-rank-in-use", "note"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value,
)
def test_planted_structure_is_found_and_named(change: Change, code: str, severity: str) -> None:
    found = {finding.code: finding for finding in found_in(change)}
    assert code in found
    assert found[code].severity == severity
    if change in (spike, kill, strengthen, duplicate, cancel, flatten):
        assert found[code].modules == (FIRST,)


def test_the_shared_direction_is_found_where_it_was_planted() -> None:
    found = {finding.code: finding for finding in found_in(share_a_direction)}
    assert "down_proj output (residual stream)" in found["shared-direction"].what
    assert "|cos| up to 0.9" in found["shared-direction"].evidence


def test_the_planted_pair_of_kinds_is_named() -> None:
    found = {finding.code: finding for finding in found_in(align_o_with_down)}
    assert "o_proj output with down_proj output (residual stream)" in found["synergy"].what


def test_unused_rank_is_told_from_weak_components() -> None:
    def drop(found: planted.Factors) -> None:
        B, A = found[FIRST]
        found[FIRST] = (B * torch.tensor([1.0, 1, 1, 1, 0, 0]), A)

    found = {finding.code: finding for finding in found_in(drop)}
    assert found["unused-rank"].evidence == f"{FIRST} uses 4 of 6."
    assert "unused-rank" not in codes(found_in(taper))


def test_a_rescaled_copy_is_found_and_another_adapter_is_not() -> None:
    def rescale(found: planted.Factors) -> None:
        for path, (B, A) in found.items():
            found[path] = (0.5 * B, A)

    first, copy, other = planted.readable(), planted.readable(rescale, name="copy"), planted.readable(seed=9, name="o")
    views = inspect([first, copy, other])
    same = [finding for finding in findings(views[0]) if finding.code == "same-update"]
    assert [finding.what for finding in same] == ["The update is that of copy, up to strength."]
    assert "strength ratio 2 to 2" in same[0].evidence
    assert "related-adapters" not in codes(findings(views[2]))


def test_adapters_that_share_one_kind_s_directions_are_related() -> None:
    def borrow(found: planted.Factors) -> None:
        donor = planted.factors(seed=0)
        for layer in range(4):
            path = planted.path(layer, "o_proj")
            found[path] = (donor[path][0], found[path][1])

    views = inspect([planted.readable(), planted.readable(borrow, seed=5, name="other")])
    related = next(finding for finding in findings(views[0]) if finding.code == "related-adapters")
    assert "o_proj output: mean overlap" in related.evidence


def measurement(means: np.ndarray, examples: int = 64, seed: int = 0) -> Measurement:
    """Sensitivities of one module with these means and unit noise."""
    noise = np.random.default_rng(seed).standard_normal((examples, len(means)))
    module = ModuleMeasurement(np.ones(len(means)), np.arange(len(means)), means + noise, np.zeros_like(noise))
    digest = planted.adapter().digest
    return Measurement(
        {FIRST: module}, tuple(map(str, range(examples))), np.zeros(examples), {"adapter_sha256": digest}
    )


def test_helpful_and_harmful_components_are_counted_and_noise_is_not() -> None:
    measured = measurement(np.array([2.0, -2.0, -2.0, 0.0, 0.0, 0.0]))
    (view,) = inspect([planted.readable()], sensitivities=[measured])
    np.testing.assert_array_equal(view.responses[FIRST].sign, [1, -1, -1, 0, 0, 0])
    found = {finding.code: finding for finding in findings(view)}
    assert found["component-signs"].what == "1 of 6 components are significantly harmful, 2 helpful."


def test_components_without_effect_are_named_at_the_stated_rate() -> None:
    """At 5 % a family, 40 or more of 400 have a probability under 0.01 %."""
    views = (
        inspect([planted.readable()], sensitivities=[measurement(np.zeros(6), 16, seed)], geometry=False)[0]
        for seed in range(60)
    )
    assert sum(bool(view.responses[FIRST].sign.any()) for view in views) <= 10


def test_a_large_update_and_intruders_are_found_beside_a_base() -> None:
    (view,) = inspect([planted.readable()])
    base: Any = SimpleNamespace(relative_norm=0.3, intruders=1, undecided=0)
    found = {finding.code: finding for finding in findings(replace(view, base={FIRST: base}))}
    assert "0.3 of ||W||" in found["large-update"].evidence
    assert found["intruder"].what == "New to the base weight: 1 leading direction of W + delta."


def test_findings_come_most_serious_first_and_fail_at_the_named_severity() -> None:
    found = found_in(lambda f: (share_a_direction(f), spike(f)))
    assert [finding.severity for finding in found] == ["warning"] + ["note"] * (len(found) - 1)
    check(found, "error")
    with pytest.raises(Unhealthy, match="1 finding at or above warning: spike") as raised:
        check(found, "warning")
    assert raised.value.exit_status == 3
