"""The model card of a refined adapter: where it comes from, the measured effect, its limits.

It is made from what may be published (:func:`~spectral_surgery.report.publishing.publishable`) and from the source
card's front matter, so it holds neither local paths nor the user's text.
"""

from __future__ import annotations

from typing import Any

from spectral_surgery.report import facts, methods
from spectral_surgery.report.facts import Verdict
from spectral_surgery.report.publishing import hub_id, publishable

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Front matter of the source card that holds for an edit of it as well."""
TAG = "spectral-surgery"
TOOL = "Made with spectral-surgery; the method it builds on is:"


def render(verdict: Verdict, source: str | None = None) -> str:
    """Returns the card as Markdown with front matter.

    Args:
        verdict: What refine wrote as verdict.json; an adapter must have won.
        source: Text of the source adapter's README.md, if there is one.

    Raises:
        ValueError: If no adapter won.
    """
    public = publishable(verdict)
    if public["outcome"] != facts.REFINED:
        raise ValueError("Only a refined adapter has a card, and in this verdict none was written.")
    parts = [
        f"---\n{_front(public, source).to_yaml()}\n---",
        f"# {_title(public)}",
        public["sentence"],
        "## Measured effect",
        _effect(public),
        "## How it was made",
        methods.paragraph(public | {"adapter": {**public["adapter"], "base_model": _base(public)}}).split("\n\n")[0],
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(public)),
        "## References",
        f"{TOOL}\n\n" + "\n".join(f"- {work}" for work in methods.references(public)),
    ]
    return "\n\n".join(parts) + "\n"


def _front(public: Verdict, source: str | None) -> Any:
    from huggingface_hub import ModelCardData

    before = _source_front(source)
    tags = [tag for tag in before.get("tags") or [] if isinstance(tag, str)]
    base = before.get("base_model") if isinstance(before.get("base_model"), str) else None
    datasets = [name for name in before.get("datasets") or [] if isinstance(name, str) and hub_id(name)]
    return ModelCardData(
        **{key: before[key] for key in KEPT if before.get(key)},
        base_model=hub_id(base) or public["adapter"]["base_model"],
        datasets=datasets or None,
        library_name="peft",
        tags=list(dict.fromkeys([*tags, "lora", TAG])),
        base_model_relation="adapter",
    )


def _source_front(source: str | None) -> dict[str, Any]:
    """The source card's front matter; nothing where it cannot be read."""
    from huggingface_hub import ModelCard

    if not source or not source.lstrip().startswith("---"):
        return {}
    try:
        return ModelCard(source, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # the YAML parser has errors of its own
        return {}


def _title(public: Verdict) -> str:
    name = public["adapter"]["name"]
    return f"{name.partition('/')[2]}, refined" if name else "A refined LoRA adapter"


def _base(public: Verdict) -> str:
    return public["adapter"]["base_model"] or "its base model"


def _effect(public: Verdict) -> str:
    units = [facts.unit(public, key) for key in ("task", "skills")]
    exact = facts.exact(public)
    head = [f"task: {units[0].label}", f"other skills: {units[1].label}", *(f"{one.title}, %" for one in exact)]
    lines = ["| | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(head)]
    for one in facts.standings(public):
        label = {"yours": "before the edit", "refined": "**this adapter**"}.get(one.role, one.label)
        scores = [unit.score(one.score(key)) for unit, key in zip(units, ("task", "skills"), strict=True)]
        scores += [beside.score(one.candidate["name"]) for beside in exact]
        lines.append("| " + " | ".join([_cell(label), *scores]) + " |")
    rows = public["rows"]
    lower = [unit.name for unit in units if unit.lower_is_better]
    note = f" Lower is better: {' and '.join(dict.fromkeys(lower))}." if lower else ""
    told = " ".join(["", *(f"{one.title.capitalize()}: on {one.counted} test rows, no test." for one in exact)])
    return "\n".join(lines) + (
        f"\n\nMeans with 95 % intervals on {rows['test']} task rows and {rows['keep_test']} rows of other skills that "
        f"were used for nothing else.{note}{told}"
    )


def _cell(text: str) -> str:
    return facts.visible(text).replace("|", "\\|").replace("\n", " ")


def _limits(public: Verdict) -> list[str]:
    limits = [
        "The figures hold for rows like those it was measured on. Intervals are over rows; another training run "
        "of the same recipe may differ by more.",
        "Skills that no row asked for were not measured.",
    ]
    if public["rule"]["seen_rows_only"]:
        limits.append("All task rows had been seen in training: the accuracy on new rows was not tested.")
    if public["rows"]["guess"]:
        limits.append("Whether the task rows had been seen in training was guessed from losses.")
    for check in facts.checks(public):
        limits += [f"By another instrument, {check.name}, {check.rows} documents: gain {check.gains['refined']}."]
    limits += [claim["sentence"] for claim in public["claims"] if not claim["passed"]]
    if public["adapter"]["serving_note"]:
        limits.append(public["adapter"]["serving_note"])
    return [*limits, "Licence and limits of the base model and of the adapter it was made from hold as before."]
