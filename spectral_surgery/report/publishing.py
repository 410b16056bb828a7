"""What of a verdict may be made public: figures and fixed words, without paths and without the user's text.

Fields are named one by one, so that a field that is added to the verdict stays private until it is added here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spectral_surgery.report.facts import Verdict, flat

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PATHS = re.compile(
    r"(?<![\w.])(?:~|\.{1,2}|[A-Za-z]:)?[\\/](?:[\w.@+-]+[\\/])*[\w.@+-]+"  # absolute, home, ./ and ../
    r"|[\w.@+-]+(?:[\\/][\w.@+-]+){2,}"  # three parts or more
)
VERSION = re.compile(r"[\w.+ -]{1,60}")
LEAST = 12
"""Characters from which on an example's text is looked for in sentences."""

Redact = Callable[[Any], Any]


def hub_id(name: str | None) -> str | None:
    """Returns the name if it is a Hub id and not a folder here, else None."""
    return name if name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def publishable(verdict: Verdict) -> dict[str, Any]:
    """Returns the verdict without paths, file names, the user's text and answers to it."""
    redact = _redactor(verdict)
    adapter, rows = verdict["adapter"], verdict["rows"]
    same = ("schema", "created", "version", "outcome", "rule", "chain", "question_zero", "error_rate", "generations",
            "gates", "edit", "times")  # fmt: skip
    return {
        **{key: verdict[key] for key in same},
        "sentence": redact(verdict["sentence"]),
        "adapter": {
            **{key: adapter[key] for key in ("digest", "modules", "components", "rank")},
            "name": hub_id(adapter["name"]),
            "base_model": hub_id(adapter["base_model"]),
            "serving_note": redact(adapter["serving_note"]),
        },
        "measures": {
            key: {**measure, "name": redact(measure["name"]), "unit": redact(measure["unit"])}
            for key, measure in verdict["measures"].items()
        },
        "rows": {
            **_numbers(rows),
            "guess": bool(rows["guess"]),
            "keep_source": "auto" if rows["keep_source"] == "auto" else None,
        },
        "candidates": [
            {**one, **{key: redact(one[key]) for key in ("name", "what", "equivalent", "stage")}}
            for one in verdict["candidates"]
        ],
        "exact": {side: _exact(found, redact) for side, found in verdict["exact"].items()},
        "checks": [{**check, "name": redact(check["name"])} for check in verdict["checks"]],
        "few_rows": verdict["few_rows"],
        "chain": [{**link, "name": redact(link["name"])} for link in verdict["chain"]],
        "claims": [{key: redact(value) for key, value in claim.items()} for claim in verdict["claims"]],
        "random": verdict["random"] and {key: redact(value) for key, value in verdict["random"].items()},
        "categories": _categories(verdict),
        "environment": {
            key: value for key, value in flat(verdict["environment"]).items() if VERSION.fullmatch(str(value))
        },
        "options": _numbers(flat(verdict["options"])),
    }


def _exact(found: Mapping[str, Any] | None, redact: Redact) -> dict[str, Any] | None:
    if found is None:
        return None
    return {**found, "scores": [{**one, "name": redact(one["name"])} for one in found["scores"]]}


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is None or isinstance(value, int | float)}


def _categories(verdict: Verdict) -> list[dict[str, Any]]:
    """Names of categories are the user's own words unless the kept prompts are ours."""
    ours = verdict["rows"]["keep_source"] == "auto"
    return [
        {**one, "name": one["name"] if ours else f"category {i + 1}"} for i, one in enumerate(verdict["categories"])
    ]


def _redactor(verdict: Verdict) -> Redact:
    """Returns a function that replaces what is private in a text."""
    private = _private(verdict)
    names = sorted(private, key=len, reverse=True)
    known = re.compile("|".join(rf"(?<![\w/\\.-]){re.escape(name)}(?![\w/\\-])" for name in names)) if names else None

    def redact(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        shown = known.sub(lambda found: private[found[0]], text) if known else text
        return PATHS.sub("[path]", shown)

    return redact


def _private(verdict: Verdict) -> dict[str, str]:
    """What must not be seen, and what stands in its place."""
    adapter, rows = verdict["adapter"], verdict["rows"]
    found = {"your adapter": adapter["name"], "the base model": adapter["base_model"]}
    private = {name: words for words, name in found.items() if name and not hub_id(name)}
    for key, words in (("source", "the task's rows"), ("keep_source", "the rows of other skills")):
        if rows[key] and rows[key] != "auto":
            private[rows[key]] = words
    earlier = [c["name"] for c in verdict["candidates"] if c["family"] == "checkpoint"]
    private |= {name: f"checkpoint {i + 1}" for i, name in enumerate(earlier)}
    private |= {check["name"]: f"own benchmark {i + 1}" for i, check in enumerate(_own_checks(verdict))}
    texts = [one[key] for one in verdict["examples"] for key in ("prompt", "answer", "base", "unedited", "refined")]
    private |= {text: "[text]" for text in [*texts, rows["first"]] if text and len(text) >= LEAST}
    return private


def _own_checks(verdict: Verdict) -> list[Mapping[str, Any]]:
    """Returns the scores of benchmarks that are the user's own files: those that no named task begins the name of."""
    entries = (verdict["options"].get("options", {}).get("check_suite") or "").split(",")
    named = tuple(entry.strip() for entry in entries if entry.strip() and not Path(entry).suffix)
    return [check for check in verdict["checks"] if not (named and check["name"].startswith(named))]
