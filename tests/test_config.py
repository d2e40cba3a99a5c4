"""All faults of params.yaml at once, each with its path, the value, the bound and the remedy."""

from pathlib import Path

import pytest

from pipeline.config import Section, load_sections, parse_override
from pipeline.errors import ConfigError
from pipeline.project import Project

ROOT = Path(__file__).parents[1]


MINIMAL = """data: {source: images, path: x}
model: {backbone: "torchvision:resnet18"}
encode: {cuts: [1.0]}
"""


class Oven(Section):
    heat: int
    door: str = "shut"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


def test_sections_are_read_and_frozen(tmp_path: Path) -> None:
    oven = load_sections(write(tmp_path, "oven: {heat: 200}"), {"oven": Oven})["oven"]
    assert oven == Oven(heat=200)
    with pytest.raises(ValueError, match="frozen"):
        oven.heat = 3  # type: ignore[attr-defined]


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "oven: {heat: hot, dor: open}\ngrill: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_sections(path, {"oven": Oven})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "grill: unknown section" in lines[0]
    assert any("oven.heat: 'hot'" in line and "integer" in line for line in lines)
    assert any("oven.dor: unknown setting (did you mean door?)" in line for line in lines)


def test_a_fault_of_an_inner_section_names_its_settings(tmp_path: Path) -> None:
    class Kitchen(Section):
        oven: Oven | None = None

    path = write(tmp_path, "kitchen: {oven: {heat: 200, dor: open}}")
    with pytest.raises(
        ConfigError, match=r"kitchen\.oven\.dor: unknown .*\(did you mean door\?\); kitchen\.oven has heat, door$"
    ):
        load_sections(path, {"kitchen": Kitchen})


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"oven\.heat: missing"):
        load_sections(write(tmp_path, "oven: {}"), {"oven": Oven})


@pytest.mark.parametrize(("text", "message"), [("- 1", "holds list"), ("a: [", "not valid YAML")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sections(write(tmp_path, text), {"oven": Oven})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_sections(tmp_path / "nowhere.yaml", {"oven": Oven})


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", ROOT / "examples/construction-faq/params.yaml"], ids=["demo", "construction-faq"]
)
def test_the_settings_that_are_shipped_are_valid(path: Path) -> None:
    assert Project.load(path).encode.cuts[:2] == [0, 0.5]


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ("[1.5]", "lies in 0..1"),
        ("[-1]", "lies in 0..1"),
        ("[2.0]", "whole and from 2 on"),
        ("['layer#x']", "no module path"),
        ("[0.5, 0.5]", "listed twice"),
        ("['../up']", "no module path"),
        ("[]", "at least 1 item"),
    ],
)
def test_cuts_that_cannot_be_are_refused(tmp_path: Path, cuts: str, message: str) -> None:
    text = (ROOT / "params.yaml").read_text().replace("[0, 0.5, 0.75, 1.0]", cuts)
    with pytest.raises(ConfigError, match=message):
        Project.load(write(tmp_path, text))


def test_cuts_are_shares_numbers_and_paths(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text().replace("[0, 0.5, 0.75, 1.0]", "[0, 0.5, 6, layer3, encoder.layer#2, 1]")
    project = Project.load(write(tmp_path, text))
    assert project.encode.cuts == [0, 0.5, 6, "layer3", "encoder.layer#2", 1]
    assert [project.cut(str(cut)) for cut in project.encode.cuts] == project.encode.cuts
    assert project.store_path(6).name == "6"


def test_a_cut_that_is_not_encoded_is_answered_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"'0.6'; encode.cuts has 0, 0.5, 0.75, 1.0"):
        Project.load(ROOT / "params.yaml").cut("0.6")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1e-05", 1e-5), ("3E-5", 3e-5), ("5e+2", 500.0), (".5", 0.5)]
)
def test_numbers_are_read_as_in_yaml_1_2_which_dvc_writes(tmp_path: Path, text: str, value: float) -> None:
    assert Project.load(write(tmp_path, f"{MINIMAL}train: {{lr: {text}}}")).train.lr == value
    setting, given = parse_override(f"train.lr={text}")
    assert Project.load(write(tmp_path, MINIMAL), {setting: given}).train.lr == value


def test_words_are_no_booleans(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.download: 'yes': Input should be a valid boolean"):
        Project.load(write(tmp_path, MINIMAL.replace("path: x", "path: x, download: yes")))


@pytest.mark.parametrize("text", ["train: {lr: 0.1, lr: 0.2}", "train: {lr: 0.1}\ntrain: {epochs: 2}"])
def test_a_key_that_is_there_twice_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r'not valid YAML: .*found duplicate key "(lr|train)"'):
        Project.load(write(tmp_path, MINIMAL + text))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_file_that_says_its_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "params.yaml"
    mark = b"\xff\xfe" if encoding == "utf-16-le" else b""
    path.write_bytes(mark + (MINIMAL + "# caf\u00e9\n").encode(encoding))
    assert Project.load(path).data.path == "x"


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "mac-roman"])
def test_a_file_in_another_encoding_is_a_message(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes((MINIMAL + "# caf\u00e9\n").encode(encoding))
    with pytest.raises(ConfigError, match=r"params\.yaml: line 4 holds the byte 0x.*save the file as UTF-8"):
        Project.load(path)


@pytest.mark.parametrize("section", ["[]", "3", "text", "false"])
def test_a_section_that_is_no_mapping_is_a_fault(tmp_path: Path, section: str) -> None:
    with pytest.raises(ConfigError, match="train: "):
        Project.load(write(tmp_path, f"{MINIMAL}train: {section}"))
