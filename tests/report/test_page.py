"""The page of results: what it shows, that hostile data is text in it, and that a browser shows it at any width."""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import chromium
import numpy as np
import pytest
import tiny
from PIL import Image

from pipeline.project import Project
from pipeline.report.costs import read_costs
from pipeline.report.forecast import CutForecast, Forecast, settings_digest, write_plan
from pipeline.report.page import write_page
from pipeline.report.summary import summarise
from pipeline.runs.record import current_runs
from pipeline.workflows.encode import encode_project
from pipeline.workflows.report import report_project
from pipeline.workflows.train import train_project

HOSTILE = (
    '</script><script>hacked=1</script><img src=x onerror=hacked=1> " onload="hacked=1 javascript:hacked=1 {{7*7}}'
)
HOSTILE_NAME = "<img src=x onerror=hacked=1>\" onload='hacked=1"
LABELS = (HOSTILE, "'\"><svg/onload=hacked=1>", "good &amp; bad")
LARGEST = 5_000_000


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [str(attrs[name]) for _, attrs in self.found if name in attrs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with hostile texts and labels, in the current directory, and two current runs of three cuts."""
    folder, home = tmp_path_factory.mktemp("texts"), Path.cwd()
    os.chdir(folder)
    tiny.write_text_network(folder / "bert")
    texts = [f"{word} {HOSTILE} {number}" for number in range(12) for word in ("good", "bad", "three")]
    lines = [{"text": text, "label": LABELS[number % 3]} for number, text in enumerate([*texts, texts[0]])]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    params = tiny.write_params(
        folder,
        data={"source": "text", "path": "texts.jsonl", "text": "text", "label": "label", "validation": 0.5},
        model={"backbone": f"hf:{folder / 'bert'}"},
        preprocess={"kind": "text", "image_size": None},
        encode={"cuts": [0, 0.5, 1.0]},
    )
    encode_project(Project.load(params))
    for cut in ("0.5", "1.0"):
        train_project(Project.load(params), cut)
    yield folder
    os.chdir(home)


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """The page of these, of a run that is not current, and of two that other versions wrote."""
    current = json.loads(Path("results/runs/0.5/run.json").read_text())
    former = {name: value for name, value in current.items() if name not in ("review", "legend")}
    for name, content in {
        "former": former | {"name": "former"},
        "newer": current | {"name": "newer", "invented": 1},
        "changed": current | {"name": "changed", "identity": "0", "made_of": {}},
        "torn": None,
    }.items():
        Path("results/runs", name).mkdir()
        Path("results/runs", name, "run.json").write_text("{" if content is None else json.dumps(content))
    report_project(Project.load(Path("params.yaml")))
    return folder / "results/report.html"


def test_it_shows_the_results_and_names_what_it_lacks(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    text = " ".join(elements.text.split())
    (table,) = json.loads(Path("results/summary.json").read_text())[1:2]
    assert f"{table['value']:.3f}" in text
    for missing in ("newer/run.json cannot be read", "torn/run.json cannot be read", "run changed is left out"):
        assert missing in text
    assert "No mistakes are shown of former" in text
    assert "cuts without a run: 0;" in text
    assert "recycle train --cut 1.0" in text
    assert "the content of another" in text
    mistakes = [text for tag, attrs in elements.found if tag == "p" and (text := attrs.get("class")) == "text"]
    wrong = json.loads(Path("results/runs/1.0/run.json").read_text())["review"]["wrong"]
    assert len(mistakes) >= min(wrong, 20) > 0


def test_nothing_in_it_runs_or_is_fetched(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    assert {tag for tag, _ in elements.found}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "form", "base"}
    )
    assert not [name for _, attrs in elements.found for name in attrs if name.startswith("on")]
    addresses = [*elements.values("src"), *elements.values("href"), *elements.values("xlink:href")]
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in addresses)
    (policy,) = [value for value in elements.values("content") if "default-src" in value]
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    assert elements.text.count(HOSTILE) >= 3
    assert "7*7" in elements.text


def test_its_parts_can_be_found_without_seeing_them(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    tags = [tag for tag, _ in elements.found]
    assert tags.count("main") == tags.count("h1") == tags.count("nav") == 1
    assert tags.count("table") == tags.count("caption")
    assert all(attrs.get("scope") for tag, attrs in elements.found if tag == "th")
    assert all(attrs.get("alt") for tag, attrs in elements.found if tag == "img")
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = elements.values("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in elements.values("href")} <= set(ids)


@chromium.needed
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it(page: Path, width: int, dark: bool) -> None:
    with chromium.browser() as tab:
        tab.open(page, width=width, dark=dark)
        assert tab.complaints() == []
        assert tab.requests() == [page.absolute().as_uri()]
        assert tab.run("typeof hacked") == "undefined"
        assert tab.run("document.scripts.length") == 0
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
        empty = "[...document.querySelectorAll('.chart')].filter(one => !one.querySelector('svg [aria-label] title'))"
        assert tab.run("document.querySelectorAll('.chart').length") >= 5
        assert tab.run(f"{empty}.length") == 0
        light = "getComputedStyle(document.body).backgroundColor == 'rgb(255, 255, 255)'"
        assert tab.run(light) != dark


@chromium.needed
def test_the_keyboard_reaches_everything(page: Path) -> None:
    with chromium.browser() as tab:
        tab.open(page)
        places = "[...document.querySelectorAll('a, summary, [tabindex]')].filter(one => one.checkVisibility())"
        expected = tab.run(f"{places}.length")
        seen = set()
        for number in range(expected):
            tab.press("Tab", 9)
            seen.add(tab.run(f"{places}.indexOf(document.activeElement)"))
            if number == 0:
                assert tab.run("document.activeElement.className") == "skip"
                assert tab.run("document.activeElement.getBoundingClientRect().left") >= 0
        assert seen == set(range(expected))
        tab.run("document.querySelector('summary').focus()")
        tab.press("Enter", 13)
        assert tab.run("document.querySelector('details').open")


def test_many_runs_with_large_pictures_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(12))
    for number, file in enumerate(sorted(tmp_path.glob("photos/*/*.png"))):
        noise = np.random.default_rng(number).integers(0, 256, (200, 200, 3), np.uint8)
        Image.fromarray(noise).save(file)
        file.rename(file.with_name(f"{number}{HOSTILE_NAME}.png"))
    project = Project.load(tiny.write_params(tmp_path, data={"validation": 0.6}, encode={"cuts": [1.0]}))
    encode_project(project)
    run = train_project(project, "1.0")
    rows = project.training_table().rows("validation").tolist()
    near = [{"row": row, "similarity": 0.5, "is_right": False} for row in rows[:4]]
    mistake = {"expected": "a", "predicted": "b", "severity": 1.0, "marks": [], "neighbours": near}
    review = dict(run.review) | {"mistakes": [mistake | {"row": row} for row in [*rows, *rows][:20]]}
    runs = [
        dataclasses.replace(run, name=f"run-{n}", cut=f"block{n}", review=review, history=run.history * 15)
        for n in range(20)
    ]
    costs = read_costs(project)
    path = write_page(project, summarise(runs, costs), runs, costs, [])
    text = path.read_text(encoding="utf-8")
    assert text.count("<img") >= 60
    assert "as many pictures as it may" in text
    assert path.stat().st_size <= LARGEST
    elements = Elements(text)
    assert not [name for _, attrs in elements.found for name in attrs if name.startswith("on")]
    assert HOSTILE_NAME in elements.text


def test_where_the_data_is_not_there_the_page_says_so(page: Path) -> None:
    texts, samples = Path("texts.jsonl"), Path("elsewhere.jsonl")
    texts.rename(samples)
    try:
        report_project(Project.load(Path("params.yaml")))
        text = " ".join(Elements(page.read_text(encoding="utf-8")).text.split())
        assert "The data set cannot be read here" in text
        assert "nothing is there" in text
        texts.write_text(samples.read_text().replace("good", "fine"))
        report_project(Project.load(Path("params.yaml")))
        assert "changed since it was encoded" in page.read_text(encoding="utf-8")
    finally:
        samples.replace(texts)


def test_a_review_of_another_version_is_named(folder: Path) -> None:
    project = Project.load(Path("params.yaml"))
    costs, (runs, _) = read_costs(project), current_runs(project)
    runs = [dataclasses.replace(run, review={"samples": 3, "mistakes": [{"place": 1}]}) for run in runs]
    text = write_page(project, summarise(runs, costs), runs, costs, []).read_text(encoding="utf-8")
    assert "The mistakes of run 1.0 cannot be read" in text


def test_a_plan_is_shown_beside_what_was_measured(folder: Path) -> None:
    project = Project.load(Path("params.yaml"))
    costs, (runs, _) = read_costs(project), current_runs(project)
    cut = CutForecast(1.0, 1.0, samples=4, state_bytes=10, beside_bytes=0, encode_seconds=12.25, frozen_seconds=5.0)
    forecast = Forecast(settings_digest(project), 4, 12.25, 10, None, 2, [cut])
    shown = []
    for content in (asdict(forecast), asdict(dataclasses.replace(forecast, settings="others")), {"cuts": [1]}):
        write_plan(project, {"forecast": content})
        shown.append(write_page(project, summarise(runs, costs), runs, costs, []).read_text(encoding="utf-8"))
    (project.results / "plan.json").unlink()
    assert "12.2 / " in shown[0]
    assert "predicted / measured" in shown[0]
    assert not [text for text in shown[1:] if "predicted / measured" in text]
