"""What the documents name exists, what they show runs, and the generated page is current."""

import itertools
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from documents import BLOCK, LINK, ROOT, comments, faults, prose, relative
from torch.utils.data import default_collate
from transformers import BertConfig, BertForSequenceClassification

from pipeline.project.settings import SECTIONS, Project

GLOBS = ("*.md", "docs/*.md", "data/*.md", "benchmarks/*.md", "examples/**/README.md")
PAGES = [page for pattern in GLOBS for page in sorted(ROOT.glob(pattern)) if page.name != "CHANGELOG.md"]
MODULES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")])
SETTINGS = sorted([*ROOT.glob("*.yaml"), *ROOT.glob("examples/*/*.yaml")])


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_what_a_page_names_exists(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize("path", SETTINGS, ids=relative)
def test_what_comments_of_settings_name_exists(path: Path) -> None:
    assert faults(comments(path), path.parent) == []


def test_what_docstrings_and_messages_name_exists() -> None:
    found = {relative(path): faults(prose(path), path.parent) for path in MODULES}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see pipeline/gone/away.py", "path pipeline/gone/away.py"),
        ("see `gone.py`", "path gone.py"),
        ("writes `data/gone.parquet`", "path data/gone.parquet"),
        ("`pipeline.split.gone`", "name pipeline.split.gone"),
        ("[this](gone.svg)", "link gone.svg#"),
        ("[this](README.md#gone)", "link README.md#gone"),
        ("call recycle gone", "command recycle gone"),
        ("`recycle train --cut 1 --gone`", "option --gone in recycle train --cut 1 --gone"),
        ("```\nrecycle store gone  # this\n```", "command gone in recycle store gone "),
        ("`python -m stages.cli train --gone`", "option --gone in python -m stages.cli train --gone"),
        ("`--gone`", "option --gone in --gone"),
        ("`make gone`", "target gone"),
        ("`train.gone`", "setting train.gone"),
        ("`recycle train --set train.gone=1`", "setting train.gone"),
    ],
)
def test_what_does_not_exist_is_found(text: str, fault: str) -> None:
    assert fault in faults(text, ROOT)


def test_readme_fits_one_screen_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1000
    linked = {path for path, _ in LINK.findall(text)}
    assert {relative(page) for page in ROOT.glob("docs/*.md")} | {"ARCHITECTURE.md", "CONTRIBUTING.md"} <= linked


def test_the_page_of_settings_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs/make_settings.py"))["page"]()
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == page, "run make docs"


@pytest.mark.parametrize("flow", ["Encode", "Train"])
def test_each_file_of_a_flow_calls_the_next(flow: str) -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition(f"### {flow}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `([\w./]+)` \|.*\|(?: `([\w ]+)`)? \|$", table, re.MULTILINE)
    assert rows[0][0] == "dvc.yaml"
    assert len(rows) - 2 <= 3, "a reader opens at most three files besides the command"
    for (path, called), (following, _) in itertools.pairwise(rows):
        calls, definition = (
            (called, rf'"{called.split()[-1]}"') if " " in called else (f"{called}(", rf"def {called}\(")
        )
        assert calls in (ROOT / path).read_text(encoding="utf-8"), f"{path} does not call {called}"
        assert re.search(definition, (ROOT / following).read_text(encoding="utf-8")), f"{following} lacks {called}"


def test_readme_s_python_fine_tunes_what_follows_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.randint(5, 50, (12, 7))
    dataset = [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": int(one[0]) % 2} for one in ids]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = [block for language, block in BLOCK.findall(text) if language == "python"]
    assert len(code.splitlines()) <= 12
    exec(code, {"model": model, "dataset": dataset, "batch": default_collate(dataset[:4])})
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    layers = {int(number) for name in moved for number in re.findall(r"layer\.(\d+)\.", name)}
    assert layers == {2, 3}
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= moved
    assert "bert.embeddings.word_embeddings.weight" not in moved


BLOCKS = [
    pytest.param(block, id=f"{relative(page)}-{number}")
    for page in [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in ("guide", "tasks", "cluster"))]
    for number, (language, block) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    if language == "yaml"
]


@pytest.mark.parametrize("block", BLOCKS)
def test_settings_of_the_pages(block: str) -> None:
    shown = yaml.safe_load(block)
    assert shown
    needed = {"encode": {"cuts": [0.5]}}  # a block of some settings of a section stands for a file with the others
    for name, settings in shown.items():
        SECTIONS[name].model_validate(needed.get(name, {}) | settings)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("examples/*/params.yaml")))
def test_settings_of_the_examples(name: str) -> None:
    project = Project.load(ROOT / "examples" / name / "params.yaml")
    stages = yaml.safe_load((ROOT / "examples" / name / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert {"encode", "train", "report"} <= set(stages)
    for stage in stages.values():
        for setting in stage.get("params", []):
            section, _, field = setting.partition(".")
            assert not field or field in getattr(project, section).model_fields_set
