"""One self-contained HTML page about one verdict: what to do first, then the evidence.

Style, script and pictures are inside the file, and a content policy in it forbids the browser every request. Without
scripts only the pointer's values are missing. All text, which may be the user's or a model's, is escaped, and what is
invisible in it is spelt out.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from spectral_surgery.errors import InputError
from spectral_surgery.report import drawing, facts, methods, modules
from spectral_surgery.report.facts import Unit, Verdict
from spectral_surgery.report.modules import GateMap
from spectral_surgery.report.picture import picture

MARK = "<!-- made by spectral-surgery refine -->"
"""First line of a report; only a file that begins with it is ever replaced."""
WIDE, NARROW = (1000, 520), (350, 400)
"""Sizes of the trade-off picture in pixels."""
LONGEST = 1500
"""Characters of a text that are shown."""
FIRST = 4
"""Examples of a sort that are open at once."""

ROWS = [
    ("measuring", "measuring rows, task"),
    ("keep_measuring", "measuring rows, other skills"),
    ("validation", "rows to choose on, task"),
    ("keep_validation", "rows to choose on, other skills"),
    ("test", "rows to confirm on, task"),
    ("keep_test", "rows to confirm on, other skills"),
    ("seen", "rows seen in training"),
    ("duplicates", "duplicates dropped"),
]


def render(verdict: Verdict, *, examples: bool = True) -> str:
    """Returns the page.

    Args:
        verdict: What refine wrote as verdict.json.
        examples: Whether prompts and answers are shown.

    Raises:
        InputError: If jinja2 or matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise InputError(
            f"The report needs {error.name}. Install it with: pip install 'spectral-surgery[report]'."
        ) from error
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_visible
    )
    environment.filters["most"] = lambda text, most=LONGEST: facts.shortened(str(text), most)
    environment.filters["duration"] = facts.duration
    here, inspect = files(__package__), files("spectral_surgery.page")
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        mark=MARK,
        style="\n".join((folder / "page.css").read_text(encoding="utf-8") for folder in (inspect, here)),
        script=(here / "page.js").read_text(encoding="utf-8"),
        verdict=verdict,
        **_context(verdict, examples),
    )


def _visible(value: Any) -> Any:
    """What the template is about to show; what it calls safe is a class of its own and stays."""
    return facts.visible(value) if type(value) is str else value


def _context(verdict: Verdict, examples: bool) -> dict[str, Any]:
    drawn = picture(verdict)
    gates = modules.gate_map(verdict)
    units = {key: facts.unit(verdict, key) for key in ("task", "skills")}
    return {
        "outcome": facts.outcome(verdict),
        "sentence": facts.sentence(verdict),
        "units": units,
        "lower": list(dict.fromkeys(unit.name for unit in units.values() if unit.lower_is_better)),
        "tiles": _tiles(verdict, units),
        "equivalent": facts.equivalent(verdict),
        "refined": verdict["outcome"] == facts.REFINED,
        "options": facts.flat(verdict["options"]),
        "environment": facts.flat(verdict["environment"]),
        "wide": drawing.tradeoff(drawn, *WIDE) if drawn else None,
        "narrow": drawing.tradeoff(drawn, *NARROW) if drawn else None,
        "curve_rows": drawn.curve_rows if drawn and drawn.curve else None,
        "others": bool(drawn and drawn.others),
        "standings": facts.standings(verdict),
        "checks": facts.checks(verdict),
        "few_header": facts.few_rows(verdict)[0],
        "few_rows": facts.few_rows(verdict)[1],
        "exact": facts.exact(verdict),
        "exact_unit": facts.EXACT,
        "exact_gains": facts.exact_gains(verdict),
        "categories": _categories(verdict, units["skills"]),
        "gates": gates,
        "gate_rows": _gate_rows(gates) if gates else [],
        "scale": _gradient([i / 20 for i in range(21)]),
        "spectra": [drawing.fan(one) for one in modules.spectra(verdict)],
        "examples": _examples(verdict) if examples else None,
        "rows": facts.fields(verdict["rows"], ROWS),
        "first_row": verdict["rows"]["first"] if examples else None,
        "measuring": methods.measuring(verdict),
        "methods": methods.paragraph(verdict),
        "seconds": sum(verdict["times"].values()),
    }


def _tiles(verdict: Verdict, units: Mapping[str, Unit]) -> list[dict[str, Any]]:
    """The two figures that matter: from what to what, and the paired gain."""
    refined = verdict["outcome"] == facts.REFINED
    by_role = {one.role: one for one in facts.standings(verdict)}
    before, after = (by_role.get(role) for role in (("yours", "refined") if refined else ("base", "yours")))
    if not (before and after):
        return []
    gains: Mapping[str, Any] = (after.gain if refined else verdict["question_zero"]) or {}
    share = facts.recovered(verdict)
    told = f"about {100 * share:.0f} % of what your adapter had forgotten" if share is not None else ""
    return [
        {
            "title": title,
            "unit": units[key],
            "names": ("yours", "refined") if refined else ("base", "yours"),
            "numbers": [units[key].number(score["mean"]) for one in (before, after) if (score := one.score(key))],
            "gain": units[key].gain(gains.get(key)),
            "over": "" if refined else "over the base ",
            "note": told if key == "skills" else "",
        }
        for key, title in (("task", "Task"), ("skills", "Other skills"))
    ]


def _examples(verdict: Verdict) -> dict[str, Any] | None:
    """Some of what was fixed and of what was broken first, the rest after."""
    sorts = facts.examples(verdict)
    first = [*sorts["fixed"][:FIRST], *sorts["broken"][:FIRST]] or sorts["same"][:FIRST]
    rest = [one for sort in sorts.values() for one in sort if not any(one is other for other in first)]
    counts = {sort: len(found) for sort, found in sorts.items()}
    return {"first": first, "rest": rest, "counts": counts} if first else None


def _categories(verdict: Verdict, unit: Unit) -> list[dict[str, Any]]:
    keys = {"base": "base", "yours": "unedited", "refined": "refined"}
    known = [one[key] for one in verdict["categories"] for key in keys.values() if one[key] is not None]
    if not known:
        return []
    span = (max(known), min(known)) if unit.lower_is_better else (min(known), max(known))
    found = []
    for one in verdict["categories"]:
        values = {role: one[key] for role, key in keys.items()}
        shown = {role: "-" if value is None else unit.number(value) for role, value in values.items()}
        name = facts.visible(str(one["name"]))
        tip = "\n".join([f"{name}, {one['n']} rows", *(f"{role}: {value}" for role, value in shown.items())])
        found.append({"name": name, "n": one["n"], **shown, "at": _shares(values, span), "tip": tip})
    return found


def _shares(values: Mapping[str, float | None], span: tuple[float, float]) -> dict[str, float]:
    """Where each value lies between worst and best, in percent."""
    wide = (span[1] - span[0]) or 1.0
    return {role: 100 * (value - span[0]) / wide for role, value in values.items() if value is not None}


def _gate_rows(gates: GateMap) -> list[tuple[str, list[tuple[str, str] | None]]]:
    return [
        (name, [_cell(gates, module) if (module := gates.cells.get((i, kind))) else None for kind in gates.kinds])
        for i, name in enumerate(gates.rows)
    ]


def _cell(gates: GateMap, module: Mapping[str, Any]) -> tuple[str, str]:
    """Colours and tip of one module."""
    values = module["gates"]
    told = ", ".join(f"{gate:.2f}" for gate in values[:16]) + (", …" if len(values) > 16 else "")
    tip = f"{facts.visible(module['module'])}\ngates {min(values):.2f} to {max(values):.2f}\n{told}"
    return _gradient([gates.share(gate) for gate in modules.stripes(values)]), tip


def _gradient(shares: list[float]) -> str:
    """Returns stripes of colour as a CSS background, equal widths."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    inks = [to_hex(colormaps["cividis"](min(1.0, max(0.0, share)))) for share in shares]
    stops = [f"{ink} {100 * i / len(inks):.3g}% {100 * (i + 1) / len(inks):.3g}%" for i, ink in enumerate(inks)]
    return f"linear-gradient(90deg,{','.join(stops)})"
