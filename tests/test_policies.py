"""Gates of every policy: published vectors, another route, and properties that all of them share."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_surgery import policies
from spectral_surgery.constraints import Constraint, edit_size
from spectral_surgery.errors import PolicyError
from spectral_surgery.measurement import Measurement, ModuleMeasurement
from spectral_surgery.policies import POLICIES, Policy, gates, parse, spell

S = np.array([8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625])
G = np.array([0.3, -0.1, 0.7, -0.05, 0, 0.2, -0.9, 0.02])
GRADIENT_GUIDED = [name for name, entry in POLICIES.items() if entry.needs == "sensitivity"]


def module(S: np.ndarray, g: np.ndarray, ties: list[int] | None = None) -> ModuleMeasurement:
    """A module with sensitivities ``g``, of one example or (examples, r)."""
    g = np.atleast_2d(g)
    groups = np.arange(len(S)) if ties is None else np.array(ties)
    return ModuleMeasurement(S.astype(np.float64), groups, g * S, np.ones(g.shape))


def measurement(*modules: ModuleMeasurement, **named: ModuleMeasurement) -> Measurement:
    named |= {f"layer.{i}": each for i, each in enumerate(modules)}
    count = len(next(iter(named.values())).gate_gradient)
    return Measurement(named, tuple(map(str, range(count))), np.zeros(count))


def gates_of(policy: str | Policy, found: ModuleMeasurement, energy: Any = None, seed: int = 0) -> np.ndarray:
    policy = parse(policy) if isinstance(policy, str) else policy
    constraint = Constraint(energy=energy) if energy else None
    return gates(policy, measurement(found), constraint, seed=seed)["layer.0"]


def random_module(r: int, seed: int = 0, examples: int = 5) -> ModuleMeasurement:
    rng = np.random.default_rng(seed)
    return module(np.sort(rng.uniform(0.1, 3, r))[::-1], rng.normal(size=(examples, r)))


VECTORS = [
    ("abs_select", "none", [8, 4, 2.5, 1, 0.4, 0.25, 0.15625, 0.05]),
    ("abs_select", "nuclear", [7.795186, 3.897593, 2.435996, 0.974398, 0.389759, 0.243600, 0.152250, 0.048720]),
    ("abs_select", "frobenius", [7.900297, 3.950149, 2.468843, 0.987537, 0.395015, 0.246884, 0.154303, 0.049377]),
    ("smooth_abs", "none", [8.741198, 3.877731, 2.451719, 0.940904, 0.457603, 0.257883, 0.155233, 0.057819]),
    (
        "smooth_abs:align_middle=false",
        "none",
        [8.917236, 3.974281, 2.460956, 0.963343, 0.467673, 0.264107, 0.155434, 0.059139],
    ),
    ("smooth_abs", "nuclear", [8.223854, 3.648229, 2.306615, 0.885217, 0.430520, 0.242620, 0.146046, 0.054397]),
    ("double_smooth", "none", [8.157640, 3.841328, 2.269318, 0.946428, 0.466539, 0.247365, 0.147200, 0.058647]),
    ("z_score", "none", [7.921781, 3.519968, 2.415015, 0.846382, 0.412036, 0.238312, 0.155982, 0.051976]),
    ("robust_z", "none", [9.702464, 3.946006, 2.5, 0.938894, 0.429503, 0.260120, 0.15625, 0.055640]),
    ("grad_direction", "none", [0.965513, 4.292112, 0.014396, 1.035871, 0.5, 0.061055, 0.235727, 0.054282]),
    ("grad_direction", "nuclear", [2.149456, 9.555239, 0.032050, 2.306089, 1.113116, 0.135922, 0.524783, 0.120845]),
    (
        "grad_direction:asymmetric=false",
        "none",
        [6.475254, 4.292112, 1.221104, 1.035871, 0.5, 0.217129, 0.235727, 0.061625],
    ),
    (
        "grad_direction:positive_power=2",
        "none",
        [0.855394, 4.292112, 0.000010, 1.035871, 0.5, 0.092559, 0.235727, 0.061882],
    ),
]


@pytest.mark.parametrize(("policy", "energy", "expected"), VECTORS)
@pytest.mark.parametrize("aggregate", ["mean_abs", "abs_mean"])
def test_singular_values_after_a_policy_are_those_that_the_papers_code_prints(
    policy: str, energy: str, expected: list[float], aggregate: str
) -> None:
    """Printed to six decimals by the authors' program in float32 (peft-sft-lab at 4826acf), defaults, one batch."""
    chosen = parse(policy)
    if hasattr(chosen, "aggregate"):
        chosen = dataclasses.replace(chosen, aggregate=aggregate)
    np.testing.assert_allclose(S * gates_of(chosen, module(S, G), energy), expected, rtol=2e-6, atol=6e-7)


@pytest.mark.parametrize(
    ("r", "core", "noise"),
    [
        *[(2, 1, 0), (3, 1, 1), (4, 1, 1), (8, 2, 2), (16, 3, 3)],
        *[(32, 6, 6), (64, 13, 13), (128, 26, 26), (256, 51, 51)],
    ],
)
@pytest.mark.parametrize("policy", ["abs_select", "random_index"])
def test_a_fifth_is_amplified_and_a_fifth_suppressed_rounding_half_to_even(
    policy: str, r: int, core: int, noise: int
) -> None:
    values = np.linspace(2, 1, r)
    levels = gates_of(policy, module(values, np.arange(1, r + 1)), "none").tolist()
    assert (levels.count(1.25), levels.count(0.8), levels.count(1.0)) == (core, noise, r - core - noise)
    if policy == "abs_select":
        assert levels == sorted(levels)


def test_a_lone_component_is_amplified_by_random_index_and_left_alone_by_rank() -> None:
    lone = module(np.ones(1), np.ones(1))
    assert gates_of("random_index", lone, "none").tolist() == [1.25]
    assert gates_of("abs_select", lone, "none").tolist() == [1]


@pytest.mark.parametrize("r", [1, 2, 3, 16])
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_finite_gates_that_keep_the_nuclear_norm_at_every_rank(name: str, r: int) -> None:
    found = random_module(r)
    alpha = gates_of(name, found, "nuclear")
    assert alpha.shape == (r,)
    assert np.isfinite(alpha).all()
    assert (alpha >= 0).all()
    assert (alpha * found.S).sum() == pytest.approx(found.S.sum(), rel=1e-12)


@pytest.mark.parametrize("name", [name for name, entry in POLICIES.items() if entry.energy == "nuclear"])
def test_policies_of_the_paper_keep_the_nuclear_norm_unless_told_otherwise(name: str) -> None:
    found = random_module(16)
    alpha = gates_of(name, found)
    assert edit_size(found.S, alpha) > 0.05
    assert (alpha * found.S).sum() == pytest.approx(found.S.sum(), rel=1e-12)


@pytest.mark.parametrize("value", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("name", GRADIENT_GUIDED)
def test_equal_sensitivities_give_no_edit_under_the_nuclear_norm(name: str, value: float) -> None:
    np.testing.assert_allclose(gates_of(name, module(S, np.full(8, value)), "nuclear"), 1, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", GRADIENT_GUIDED)
def test_the_unit_of_the_loss_does_not_matter(name: str, scale: float) -> None:
    np.testing.assert_allclose(gates_of(name, module(S, scale * G)), gates_of(name, module(S, G)), rtol=1e-9)


@pytest.mark.parametrize("r", [1, 2, 3, 7])
@pytest.mark.parametrize("name", POLICIES)
def test_dead_components_keep_their_gate_and_the_others_are_edited_as_if_alone(name: str, r: int) -> None:
    alone = random_module(r)
    dead = ModuleMeasurement(
        S=np.append(alone.S, [1e-12, 0, 0]),
        ties=np.append(alone.ties, [r, r + 1, r + 1]),
        gate_gradient=np.pad(alone.gate_gradient, ((0, 0), (0, 3))),
        output_energy=np.pad(alone.output_energy, ((0, 0), (0, 3))),
    )
    alpha = gates_of(name, dead)
    assert alpha[r:].tolist() == [1, 1, 1]
    np.testing.assert_allclose(alpha[:r], gates_of(name, alone), rtol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_an_untrained_module_is_not_edited(name: str) -> None:
    assert gates_of(name, module(np.zeros(4), np.zeros((3, 4)), [0, 0, 0, 0])).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", POLICIES)
def test_tied_components_share_a_gate(name: str) -> None:
    rng = np.random.default_rng(4)
    values = np.array([3, 2.0002, 2.0001, 2, 1, 0.5, 0.2, 0.2])
    found = module(values, rng.normal(size=(6, 8)), ties=[0, 1, 1, 1, 2, 3, 4, 4])
    for seed in range(4):
        alpha = gates_of(name, found, seed=seed)
        assert alpha[1] == alpha[2] == alpha[3]
        assert alpha[6] == alpha[7]


def test_members_of_a_tied_group_count_by_their_common_sensitivity() -> None:
    values = np.array([2.0, 1, 1])
    found = module(values, np.array([[0.5, 9.0, -9.0]]), ties=[0, 1, 1])
    assert gates_of("abs_select", found, "none")[0] == 1.25


@pytest.mark.parametrize("like", ["grad_direction", "abs_select", "smooth_abs", "flat", "scale"])
@pytest.mark.parametrize("ties", [None, [0, 1, 1, 2, 3, 3, 3, 4]])
def test_random_has_the_edit_size_of_the_policy_it_is_like(like: str, ties: list[int] | None) -> None:
    rng = np.random.default_rng(7)
    values = np.array([3, 2, 2, 1.5, 1, 1, 1, 0.1]) if ties else S
    found = module(values, rng.normal(size=(5, 8)), ties)
    size = edit_size(values, gates_of(like, found))
    for seed in range(5):
        alpha = gates_of(policies.Random(like=like), found, seed=seed)
        assert edit_size(values, alpha) == pytest.approx(size, rel=1e-9)


def test_random_deals_out_the_gates_of_the_policy_it_is_like() -> None:
    found = module(np.ones(8), G)
    like = gates_of("abs_select", found)
    alpha = gates_of("random:like=abs_select", found)
    assert not np.array_equal(alpha, like)
    np.testing.assert_allclose(np.sort(alpha), np.sort(like), rtol=1e-9)


@pytest.mark.parametrize("name", ["random", "random_index"])
def test_random_choices_depend_on_seed_and_module_path_and_not_on_module_order(name: str) -> None:
    parts = {path: random_module(16, seed=9) for path in ("a", "b", "c")}
    policy = parse(name)
    forward = gates(policy, measurement(**parts), seed=3)
    backward = gates(policy, measurement(**dict(reversed(parts.items()))), seed=3)
    alone = gates(policy, measurement(b=parts["b"]), seed=3)
    for path in parts:
        np.testing.assert_array_equal(forward[path], backward[path])
    np.testing.assert_array_equal(forward["b"], alone["b"])
    assert not np.array_equal(forward["a"], forward["b"])
    assert not np.array_equal(forward["a"], gates(policy, measurement(**parts), seed=4)["a"])


@pytest.mark.parametrize("asymmetric", [True, False])
def test_grad_direction_lowers_the_loss_to_first_order(asymmetric: bool) -> None:
    alpha = gates_of(policies.GradDirection(asymmetric=asymmetric), module(S, G), "none")
    assert (alpha[G > 0] < 1).all()
    assert (alpha[G < 0] > 1).all()
    assert (S * G * (alpha - 1)).sum() < 0


@pytest.mark.parametrize("name", ["abs_select", "smooth_abs", "double_smooth", "z_score", "robust_z"])
def test_the_papers_magnitude_counts_examples_that_cancel_and_the_codes_does_not(name: str) -> None:
    found = module(np.array([2.0, 1.0, 0.5]), np.array([[1.0, 0.1, 0.5], [-1.0, 0.1, 0.5]]))
    paper = gates_of(f"{name}:aggregate=mean_abs", found, "none")
    code = gates_of(f"{name}:aggregate=abs_mean", found, "none")
    assert paper.argmax() == 0
    assert code.argmin() == 0


def test_smooth_abs_steps_hard_where_its_quantiles_coincide() -> None:
    alpha = gates_of("smooth_abs", module(S, np.array([5, 1, 1, 1, 1, 1, 1, 1])), "none")
    np.testing.assert_allclose(alpha, [1.25, 1, 1, 1, 1, 1, 1, 1], rtol=1e-8)


@pytest.mark.parametrize("name", ["smooth_abs", "double_smooth"])
def test_smooth_policies_give_the_middle_where_nothing_differs(name: str) -> None:
    np.testing.assert_array_equal(gates_of(f"{name}:middle=0.9", module(S, np.ones(8)), "none"), np.full(8, 0.9))


def newton_schulz_by_matrices(S: np.ndarray, fast: int, stable: int) -> np.ndarray:
    """Singular values after Newton-Schulz steps on a whole matrix, at the old nuclear norm."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(12, len(S), dtype=torch.float64))[0] for _ in range(2))
    X = U * torch.tensor(S) @ V.T
    X = X / X.norm()
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * fast + [(2.0, -1.5, 0.5)] * stable:
        gram = X @ X.T
        X = a * X + b * gram @ X + c * gram @ gram @ X
    values = torch.diag(U.T @ X @ V).numpy()
    return values * S.sum() / values.sum()


@pytest.mark.parametrize(("fast", "stable"), [(4, 1), (8, 2), (1, 0), (0, 1)])
def test_newton_schulz_equals_the_iteration_on_the_whole_matrix(fast: int, stable: int) -> None:
    alpha = gates_of(policies.NewtonSchulz(fast_steps=fast, stable_steps=stable), module(S, G))
    np.testing.assert_allclose(S * alpha, newton_schulz_by_matrices(S, fast, stable), rtol=1e-9)


def test_flat_scale_and_identity_do_what_their_names_say() -> None:
    found = module(S, G)
    np.testing.assert_allclose(S * gates_of("flat", found), S.mean(), rtol=1e-12)
    np.testing.assert_allclose(S * gates_of("flat:strength=0.5,mix=0.25", found), (0.75 * S + 0.25 * S.mean()) / 2)
    assert gates_of("scale:strength=0.3", found).tolist() == [0.3] * 8
    assert gates_of("identity", found).tolist() == [1.0] * 8


def values_of(kind: Any) -> st.SearchStrategy:
    """Values that most fields of this type take."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    strategies = {
        bool: st.booleans(),
        int: st.integers(0, 9),
        float: st.floats(1e-9, 1),
        str: st.sampled_from(["flat", "smooth_abs:align_middle=false", "abs_select:amplify=2.0,min_core=3"]),
    }
    return strategies[kind]


def fields_of(name: str) -> st.SearchStrategy:
    """A policy class with values for all of its fields."""
    kind = POLICIES[name].policy
    hints = get_type_hints(kind)
    values = {field.name: values_of(hints[field.name]) for field in dataclasses.fields(kind)}
    return st.tuples(st.just(kind), st.fixed_dictionaries(values))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(list(POLICIES)).flatmap(fields_of))
def test_what_spell_writes_parse_reads(drawn: tuple[type, dict[str, Any]]) -> None:
    kind, values = drawn
    policy = kind(**values)
    assert parse(spell(policy)) == policy


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_at_its_defaults_is_spelled_by_its_name(name: str) -> None:
    assert spell(parse(name)) == name
    assert parse(f" {name.replace('_', '-')} ") == parse(name)
    assert parse(f"{name}:{POLICIES[name].defaults}") == parse(name)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("smooth", "Unknown policy 'smooth'. Choose one of: identity, scale, flat"),
        ("abs_select:amp=2", r"Policy abs_select has no field 'amp'\. Write field=value .* core_fraction=0.2"),
        ("abs_select:amplify", "Policy abs_select has no field 'amplify'. Write field=value"),
        ("identity:x=1", "Policy identity has no field 'x'. Write field=value with one of: none"),
        ("abs_select:min_core=1.5", "min_core=1.5 is not a whole number"),
        ("abs_select:amplify=big", "amplify=big is not a number"),
        ("smooth_abs:align_middle=yes", "align_middle=yes is not true or false"),
        ("grad_direction:normalise=l1", "normalise=l1 is not one of mean_abs, l2, none"),
        ("abs_select:core_fraction=1.2", r"AbsSelect: core_fraction is 1\.2, expected .* and at most 1\."),
        ("smooth_abs:temperature=0", "SmoothAbs: temperature is 0.0, expected .* at least 1e-09"),
        ("scale:strength=-1", "Scale: strength is -1.0, expected .* at least 0"),
        ("abs_select:amplify=inf", "AbsSelect: amplify is inf, expected a finite number"),
        ("z_score:high=nan", "ZScore: high is nan, expected a finite number"),
        ("newton_schulz:fast_steps=-1", "NewtonSchulz: fast_steps is -1, expected .* at least 0"),
        ("random:like=random", "random cannot be like itself"),
        ("random:like=abs_select:amplify=2,core=1", "Policy abs_select has no field 'core'"),
        ("abs_select:amplify=big,core=1", r"2 things are wrong:\n.*is not a number\.\n.*no field 'core'"),
        ("abs_select:amplify=-1,suppress=-1", r"2 things are wrong:\n.*amplify is -1.0.*\n.*suppress is -1.0"),
    ],
)
def test_a_wrong_spelling_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        parse(text)


@pytest.mark.parametrize("name", GRADIENT_GUIDED)
def test_a_policy_that_reads_sensitivities_refuses_spectra_alone(name: str) -> None:
    with pytest.raises(PolicyError, match=f"Policy {name} needs sensitivities, and only spectra are known"):
        gates_of(name, module(S, np.zeros((0, 8))))


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in GRADIENT_GUIDED])
def test_the_other_policies_need_no_examples(name: str) -> None:
    assert gates_of(name, module(S, np.zeros((0, 8)))).shape == (8,)


def test_a_policy_of_an_unregistered_class_is_refused_by_name() -> None:
    class Mine:
        def gate(self, module: ModuleMeasurement, rng: np.random.Generator) -> np.ndarray:
            return module.S

    with pytest.raises(PolicyError, match="Mine is no registered policy"):
        gates_of(Mine(), module(S, G))


def test_help_and_table_say_what_every_policy_does() -> None:
    lines, table = policies.help_text().splitlines(), policies.markdown_table().splitlines()
    assert len(lines) == len(table) - 2 == len(POLICIES)
    for line, cells, (name, entry) in zip(lines, table[2:], POLICIES.items(), strict=True):
        assert line.split(maxsplit=1) == [name, entry.summary]
        assert cells.startswith(f"| `{name}` | {entry.summary} | {entry.source} | {entry.needs} | {entry.energy} |")
        assert entry.summary.endswith(".")
        for field in dataclasses.fields(entry.policy):
            assert f"`{field.name}=" in cells
