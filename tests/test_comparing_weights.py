"""A fine-tuned model's weights against the pre-trained ones: the job, its text, JSON, figure and page."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_page import BROWSER, WATCH, References
from test_weights import weight

from spectral_surgery import page, plots
from spectral_surgery.cli import main
from spectral_surgery.comparing_weights import WeightComparison, compare_weights
from spectral_surgery.errors import BaseModelError
from spectral_surgery.weight_files import open_folder

SHAPES = {"self_attn.q_proj": (40, 48), "mlp.up_proj": (60, 48)}


def model(folder: Path, *, moved: float = 0.0) -> Path:
    """Two layers; ``moved`` is added to the first singular value of every matrix, in units of that value."""
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": torch.zeros(9, 48), "model.layers.0.norm.weight": torch.ones(48)}
    for layer in range(2):
        for i, (kind, shape) in enumerate(SHAPES.items()):
            W = weight(*shape, seed=10 * layer + i)
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            tensors[f"model.layers.{layer}.{kind}.weight"] = (W + moved * S[0] * U[:, :1] @ Vh[:1]).float()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def found(tmp_path: Path) -> WeightComparison:
    return compare_weights(
        open_folder(model(tmp_path / "tuned", moved=0.5)), open_folder(model(tmp_path / "base")), n=4
    )


def test_what_was_planted_is_measured_in_every_matrix(found: WeightComparison) -> None:
    assert [group.name for group in found.groups] == ["q_proj", "up_proj"]
    assert len(found.studies) == 4
    for path, study in found.studies.items():
        np.testing.assert_allclose(study.ratio, [1.5, 1, 1, 1], rtol=1e-5)
        np.testing.assert_allclose(study.output_by_index, 1, atol=1e-5)
        S = study.before
        assert found.change[path] == pytest.approx(0.5 * S[0] / np.linalg.norm(_all(path)), rel=1e-4)
        assert study.nearness.intruders == 0


def _all(path: str) -> np.ndarray:
    kind, layer = path.split(".", 3)[3], int(path.split(".")[2])
    return torch.linalg.svdvals(weight(*SHAPES[kind], seed=10 * layer + list(SHAPES).index(kind))).numpy()


def test_the_command_prints_writes_and_selects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, base = str(model(tmp_path / "tuned", moved=0.5)), str(model(tmp_path / "base"))
    extra = ["--html", str(tmp_path / "w.html"), "--figures", str(tmp_path / "f"), "--figure-format", "svg"]
    assert main(["weights", tuned, base, *extra]) == 0
    out = capsys.readouterr().out
    assert "4 weights" in out
    assert "1.500" in out
    assert (tmp_path / "f" / "weights.svg").is_file()
    assert (tmp_path / "w.html").read_text().startswith(page.MARK)
    assert main(["weights", tuned, base, *extra]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["weights", tuned, base, "--json", "--modules", "up_proj", "--layers", "1", "--directions", "3"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["modules"]
    assert one["module"] == "model.layers.1.mlp.up_proj"
    assert one["ratio"] == pytest.approx([1.5, 1, 1], rel=1e-4)


def test_models_without_a_common_matrix_are_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    (tmp_path / "other").mkdir()
    save_file({"h.0.c_attn.weight": torch.zeros(3, 3)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(BaseModelError, match="share no weight matrix"):
        compare_weights(open_folder(base), open_folder(tmp_path / "other"))


def test_the_figure_has_a_line_a_layer_and_the_chance_level(found: WeightComparison) -> None:
    figure = plots.weights(found)
    assert figure is not None
    top, _, best = figure.axes[0], figure.axes[2], figure.axes[4]
    np.testing.assert_allclose(top.lines[0].get_ydata(), [1.5, 1, 1, 1], rtol=1e-5)
    chance = found.studies["model.layers.0.self_attn.q_proj"].output_best_by_chance.mean
    assert best.lines[-1].get_ydata()[0] == pytest.approx(chance)


HOVER = """<script>
addEventListener("load", () => {
  const hover = (id, mark) => {
    const shape = document.querySelectorAll(`#${id} ${mark}`)[2];
    shape.dispatchEvent(new PointerEvent("pointerenter", {clientX: 9, clientY: 9}));
    return document.getElementById("tip").textContent;
  };
  document.getElementById("figure").value = "input_best";
  document.getElementById("figure").dispatchEvent(new Event("change"));
  seen.told = [hover("map", ".cell"), hover("ratio", ".dot"), hover("cosine", ".dot")];
  seen.ready = document.body.dataset.ready;
  seen.wide = document.documentElement.scrollWidth > innerWidth;
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  document.body.append(told);
});
</script>"""


def test_the_page_refers_to_nothing_outside_itself(found: WeightComparison) -> None:
    parser = References()
    parser.feed(page.render_weights(found))
    assert (parser.found, parser.scripts) == (["data:,"], 2)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine to open the page in")
def test_in_a_browser_the_page_draws_and_answers_to_hovering(found: WeightComparison, tmp_path: Path) -> None:
    text = page.render_weights(found).replace("<head>", f"<head>{WATCH}").replace("</body>", f"{HOVER}</body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [str(BROWSER), *options, "--virtual-time-budget=10000", (tmp_path / "page.html").as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told = re.search(r'<pre id="seen">(.*?)</pre>', run.stdout, re.DOTALL)
    assert told, run.stderr[-2000:]
    seen = json.loads(html.unescape(told[1]))
    assert seen["errors"] == seen["blocked"] == []
    assert (seen["ready"], seen["wide"]) == ("yes", False)
    assert "size of the change" in seen["told"][0]
    assert "before" in seen["told"][1]
    assert "chance" in seen["told"][2]
