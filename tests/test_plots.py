"""Figures are drawn from the figures of the inspection, whole, legible, and the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import planted
import pytest

from spectral_surgery import plots
from spectral_surgery.errors import InputError, OutputError
from spectral_surgery.inspecting import inspect
from spectral_surgery.inspection import Inspection

HEADS = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}


@pytest.fixture(scope="module")
def views() -> list[Inspection]:
    return inspect([planted.readable(name="some/where/one"), planted.readable(seed=3, name="two")])


@pytest.mark.parametrize("extension", plots.FORMATS)
def test_all_figures_are_written_in_every_format(views: list[Inspection], tmp_path: Path, extension: str) -> None:
    written = plots.save(views[:1], tmp_path / "new", extension)
    assert [path.stem for path in written] == ["wall-output", "wall-input", "synergy", "spectra"]
    assert all(path.suffix == f".{extension}" and path.read_bytes().startswith(HEADS[extension]) for path in written)


def test_the_same_inspection_gives_the_same_file(views: list[Inspection], tmp_path: Path) -> None:
    first, second = (plots.save(views[:1], tmp_path / name, "svg") for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_wall_has_a_map_for_every_kind_of_every_adapter(views: list[Inspection]) -> None:
    figure = plots.wall(views, "output")
    assert figure is not None
    maps = [axis for axis in figure.axes if axis.images]
    assert len(maps) == 2 * len(planted.SIZES)
    titles = [axis.get_title().splitlines()[0] for axis in maps[:5]]
    assert titles == ["q_proj*", "k_proj*", "o_proj", "up_proj*", "down_proj"]
    matrix = next(m for m in views[0].matrices if (m.group, m.side) == ("o_proj", "output"))
    shown = np.asarray(maps[2].images[0].get_array())
    assert shown[1, 1] == pytest.approx(1, abs=1e-5)
    share = np.log(max(matrix.overlap[0, 2] * 96 / 4, 1)) / np.log(96 / 4)
    assert shown[0, 2] == pytest.approx(share, abs=1e-6)


def test_the_synergy_figure_shows_the_curve_of_o_proj_and_down_proj_first(views: list[Inspection]) -> None:
    figure = plots.synergy(views)
    assert figure is not None
    axis = figure.axes[0]
    assert axis.get_title() == "o_proj output with down_proj output"
    curve = next(c for c in views[1].curves if c.name == axis.get_title())
    np.testing.assert_allclose(axis.lines[1].get_ydata(), curve.overlap)


def test_the_smallest_text_is_seven_points(views: list[Inspection]) -> None:
    with plots._style():
        figures = [plots.wall(views, "input"), plots.synergy(views), plots.fan(views)]
        for figure in figures:
            assert figure is not None
            figure.draw_without_rendering()
            sizes = [text.get_fontsize() for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))]
            assert min(sizes) >= 7


def test_without_geometry_only_the_spectra_are_drawn(tmp_path: Path) -> None:
    views = inspect([planted.readable()], geometry=False)
    assert [path.name for path in plots.save(views, tmp_path, "svg")] == ["spectra.svg"]


def test_a_wrong_format_and_a_file_in_the_way_are_refused(views: list[Inspection], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'gif'\. Choose pdf, png, svg"):
        plots.save(views, tmp_path, "gif")
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        plots.save(views, tmp_path / "taken", "svg")
