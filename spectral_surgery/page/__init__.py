"""Self-contained HTML pages, about adapters and about two models' weights: hover for values, choose, compare.

Style, script and data are inside the file, and a content policy in it forbids the browser every request, so it can be
mailed, archived or opened from a build server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from spectral_surgery import __version__
from spectral_surgery.comparing_weights import WeightComparison, to_json
from spectral_surgery.errors import InputError, OutputError
from spectral_surgery.findings import findings
from spectral_surgery.inspecting import plain
from spectral_surgery.inspection import Inspection
from spectral_surgery.terminal import headline

MARK = "<!-- made by spectral-surgery inspect -->"
"""First line of a page; only a file that begins with it is ever replaced."""
DIGITS = 4
"""Significant digits on the page."""


def render(inspections: Sequence[Inspection]) -> str:
    """Returns the page about adapters.

    Raises:
        InputError: If jinja2 is not installed.
    """
    title = f"{', '.join(inspection.name for inspection in inspections)}: inside the adapter"
    return _page("page", title, [_data(inspection) for inspection in inspections])


def render_weights(found: WeightComparison) -> str:
    """Returns the page about a fine-tuned model's weights against the pre-trained ones.

    Raises:
        InputError: If jinja2 is not installed.
    """
    kinds = [{"name": group.name, "paths": group.paths, "layers": group.layers} for group in found.groups]
    title = f"{found.after}: its weights against {found.before}"
    return _page("weights", title, short(to_json(found) | {"groups": kinds}))


def _page(name: str, title: str, data: Any) -> str:
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise InputError("The page needs jinja2. Install it with: pip install 'spectral-surgery[report]'.") from error
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_text("page.html.j2"))
    return template.render(
        mark=MARK,
        title=title,
        style=_text("page.css"),
        body=_text(f"{name}.html"),
        script=_text("charts.js") + _text(f"{name}.js"),
        # A "</script>" inside a string would end the block early.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        version=__version__,
    )


def write(path: Path, text: str) -> None:
    """Writes a page, in folders that are made where there are none; see :func:`check_path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def check_path(path: Path, *, overwrite: bool) -> None:
    """Checks that a page may be written.

    Raises:
        OutputError: If the path is a folder, a file that is no page of ours, or is not to be overwritten.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Choose a file name such as inspection.html.")
    if not path.exists():
        return
    with path.open("rb") as file:
        if not file.read(len(MARK)).startswith(MARK.encode()):
            raise OutputError(f"{path} exists and is no page of ours, so it is never overwritten.")
    if not overwrite:
        raise OutputError(f"{path} exists. Pass --overwrite to replace it, or choose another name.")


def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _data(inspection: Inspection) -> dict[str, Any]:
    return short(
        {
            "name": inspection.name,
            "headline": headline(inspection),
            "findings": plain(findings(inspection)),
            "groups": [
                {"name": group.name, "paths": group.paths, "layers": group.layers} for group in inspection.groups
            ],
            "modules": {path: _module(inspection, path) for path in inspection.modules},
            "matrices": [_without(plain(matrix), "angles", "cosine_mean") for matrix in inspection.matrices],
            "curves": plain(inspection.curves),
            "against": plain(inspection.against),
            "examples": inspection.examples,
        }
    )


def _module(inspection: Inspection, path: str) -> dict[str, Any]:
    kept = _without(vars(inspection.modules[path]), "module", "energy_kept", "tied_groups")
    for name, known in (("response", inspection.responses), ("base", inspection.base)):
        if path in known:
            kept[name] = _without(plain(known[path]), "study")
    return kept


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def short(value: Any) -> Any:
    """Returns JSON values with floats at four digits, which is what the eye needs and a third of the size."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [short(inner) for inner in value]
    return value
