"""Plots show what was measured."""
from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench.plots import BEGIN, END, PLOTS, Event, Line, Panel, chart, figures, main, with_figures

FOLDER = Path(__file__).parents[3] / "docs" / "plots"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def results() -> Any:
    """What the committed plots are made of."""
    return json.loads((FOLDER / "results.json").read_text())


def paths(svg: str, colour: str) -> list[str]:
    """The lines of a colour."""
    return [one.attrib["d"] for one in ET.fromstring(svg).iter(f"{SVG}path") if one.get("class") == colour]


@pytest.mark.parametrize("name", PLOTS)
def test_the_committed_plots_are_of_the_committed_results(results: Any, name: str) -> None:
    """To the last byte: nobody drew by hand, nobody forgot one of the two."""
    assert (FOLDER / f"{name}.svg").read_text() == PLOTS[name][1](results)


def test_the_committed_results_are_no_quick_look(results: Any) -> None:
    """What `--quick` gives is not for figures."""
    assert results["quick"] is False


def test_the_page_has_the_figures_of_the_committed_results(results: Any) -> None:
    """The table in the page and the plots are of one run."""
    page = (FOLDER.parent / "ordering-and-fairness.md").read_text()
    assert with_figures(page, results) == page and figures(results) in page


def test_a_line_goes_through_its_points() -> None:
    """Up is more, right is later, a hole is a hole."""
    drawn, = paths(chart("t", "s", [Panel("p", [Line("l", [(0, 0.0), (5, 10.0), (6, None), (10, 5.0)])])], [Event(5, "e")]), "one")
    assert drawn == "M64.0 244.0L404.0 74.0M744.0 159.0"


def test_a_logarithmic_panel() -> None:
    """Ten times as much is as far up wherever one is."""
    drawn, = paths(chart("t", "s", [Panel("p", [Line("l", [(0, 1.0), (5, 10.0), (10, 100.0)])], log=True)], []), "one")
    assert [point.split()[1] for point in drawn[1:].split("L")] == ["244.0", "159.0", "74.0"]


def test_names_are_text_and_no_markup() -> None:
    """Whatever they are."""
    svg = chart("a < b & c", "s", [Panel("<p>", [Line("&", [(0, 1.0), (1, 2.0)])])], [])
    assert {"a < b & c", "<p>", "&"} <= {one.text for one in ET.fromstring(svg).iter(f"{SVG}text")}


def test_main_writes_all_of_it(results: Any, tmp_path: Path) -> None:
    """Plots, results, and the table of the page, whose other text stays."""
    page = tmp_path / "docs" / "ordering-and-fairness.md"
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    (tmp_path / "all.json").write_text(json.dumps({**results, "a": 1}))
    assert main([str(tmp_path / "all.json"), str(tmp_path / "docs" / "plots")]) == 0
    assert {p.name for p in (tmp_path / "docs" / "plots").iterdir()} == {"results.json", *(f"{name}.svg" for name in PLOTS)}
    assert page.read_text() == f"before\n{BEGIN}\n{figures(results)}\n{END}after\n"


def test_main_refuses_what_lacks_a_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says which, and writes nothing."""
    (tmp_path / "some.json").write_text(json.dumps({"machine": {}, "quick": False, "c": {}}))
    assert main([str(tmp_path / "some.json"), str(tmp_path / "plots")]) == 2
    assert "lacks workload e, g" in capsys.readouterr().err and not (tmp_path / "plots").exists()
    assert main([]) == 2
