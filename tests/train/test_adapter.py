"""Adapters train after the cut in place of the pretrained weights, and end as plain weights."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import pipeline.train.fit
from pipeline.data import SampleTable
from pipeline.errors import ConfigError, TrainError
from pipeline.project import Project
from pipeline.project.loaders import open_loaders
from pipeline.project.towers import open_tower
from pipeline.split import merge, split
from pipeline.train.adapter import AdapterConfig, adapt, merged
from pipeline.train.config import TrainConfig
from pipeline.train.objective import evaluate
from pipeline.workflows.encode import encode_project
from pipeline.workflows.export import export_run
from pipeline.workflows.train import train_project

pytestmark = pytest.mark.slow

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [9, 4, 3, 2, 0]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
SIZES = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}
CLASSIFIER = frozenset({"classifier.weight", "classifier.bias"})


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=10, max_position_embeddings=8, **SIZES))


def gpt2() -> nn.Module:
    """Its layers are transformers' Conv1D, whose weights lie the other way round."""
    config = GPT2Config(
        vocab_size=10, n_positions=8, n_embd=8, n_layer=4, n_head=2, num_labels=3, bos_token_id=1, eos_token_id=1
    )
    config.pad_token_id, config.use_cache = 0, False
    return GPT2ForSequenceClassification(config)


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES))


def layers() -> nn.Module:
    """Blocks that are single layers: the one at the cut is adapted too."""
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], frozenset[str], str, float]] = {
    "bert-lora": (bert, TEXT, CLASSIFIER, "lora", 0.5),
    "bert-peanut": (bert, TEXT, CLASSIFIER, "peanut", 0.5),
    "bert-inputs": (bert, TEXT, CLASSIFIER, "lora", 0.0),
    "gpt2-lora": (gpt2, TEXT, frozenset({"score.weight"}), "lora", 0.5),
    "vit-lora": (vit, {"pixel_values": PIXELS}, CLASSIFIER, "lora", 0.75),
    "vit-peanut": (vit, {"pixel_values": PIXELS}, CLASSIFIER, "peanut", 0.5),
    "conv-lora": (lambda: tiny.ConvNet(3), {"x": PIXELS}, CLASSIFIER, "lora", 0.5),
    "conv-inputs": (lambda: tiny.ConvNet(3), {"x": PIXELS}, CLASSIFIER, "lora", 0.0),
    "layers-lora": (layers, {"input": PIXELS[:, 0, 0]}, frozenset({"4.weight", "4.bias"}), "lora", 0.5),
    "layers-peanut": (layers, {"input": PIXELS[:, 0, 0]}, frozenset({"4.weight", "4.bias"}), "peanut", 0.5),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    make, example, fresh, kind, at = CASES[request.param]
    torch.manual_seed(0)
    model = make().eval()
    prefix, plain = split(model, at, example)
    adapted = adapt(model, plain, prefix(**example), example, AdapterConfig(kind=kind, rank=2), fresh=fresh, seed=3)
    return SimpleNamespace(
        model=model, prefix=prefix, plain=plain, adapted=adapted, example=example, fresh=fresh, kind=kind
    )


def output(model: Callable[..., object], *args: object, **inputs: Tensor) -> Tensor:
    found = model(*args, **inputs)
    return found if isinstance(found, Tensor) else found.logits  # type: ignore[attr-defined]


def paths(suffix: nn.Module) -> set[str]:
    """The layers that are adapted."""
    found = {name.partition(".base_layer.")[0] for name in suffix.state_dict() if ".base_layer." in name}
    assert found
    return found


def of(case: SimpleNamespace, suffix: nn.Module) -> Tensor:
    return output(suffix, case.prefix(**case.example), **case.example)


def train(case: SimpleNamespace, steps: int = 10) -> list[float]:
    """Train the adapted suffix on three labels; return the losses."""
    trained = [item for item in case.adapted.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    case.adapted.train()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(of(case, case.adapted), torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    case.adapted.eval()
    return losses


def test_at_first_it_does_what_the_plain_suffix_does(case: SimpleNamespace) -> None:
    assert torch.equal(of(case, case.adapted.eval()), of(case, case.plain.eval()))
    plain = case.model.state_dict()
    assert all(torch.equal(plain[name], item) for name, item in case.plain.state_dict().items())


def test_adapters_and_head_alone_have_gradients(case: SimpleNamespace) -> None:
    of(case, case.adapted.train()).square().sum().backward()
    trained = {name for name, item in case.adapted.named_parameters() if item.grad is not None}
    inside = {name for name, _ in case.adapted.named_parameters() if f".{case.kind}_" in name}
    assert trained == inside | case.fresh
    assert inside
    assert all(item.requires_grad for item in case.model.parameters())


def test_the_pretrained_weights_and_statistics_stay_bit_for_bit(case: SimpleNamespace) -> None:
    losses = train(case)
    assert losses[-1] < losses[0]
    own, now = case.model.state_dict(), case.adapted.state_dict()
    frozen = {name.replace(".base_layer.", "."): item for name, item in now.items() if f".{case.kind}_" not in name}
    assert frozen.keys() == case.plain.state_dict().keys()
    assert all(torch.equal(own[name], item) for name, item in frozen.items() if name not in case.fresh)
    assert all(not torch.equal(own[name], frozen[name]) for name in case.fresh)


def test_merged_it_does_the_same(case: SimpleNamespace) -> None:
    train(case)
    weights = merged(case.adapted)
    own = case.model.state_dict()
    changed = {name for name, item in weights.items() if not torch.equal(own[name], item)}
    assert changed == {f"{path}.weight" for path in paths(case.adapted)} | case.fresh
    expected = of(case, case.adapted)
    case.plain.load_state_dict(weights)
    torch.testing.assert_close(of(case, case.plain.eval()), expected, rtol=1e-5, atol=1e-5)
    full = merge(case.model, case.plain)
    torch.testing.assert_close(output(full, **case.example), expected, rtol=1e-5, atol=1e-5)


def test_it_is_the_full_adapted_model_s_upper_part(case: SimpleNamespace) -> None:
    """The same layers adapted by peft alone in the full model: outputs and gradients."""
    train(case)
    kept, targets = case.adapted.state_dict(), sorted(paths(case.adapted))
    config = (
        peft.LoraConfig(
            r=2,
            lora_alpha=16,
            target_modules=targets,
            fan_in_fan_out=isinstance(case.model, GPT2ForSequenceClassification),
        )
        if case.kind == "lora"
        else peft.PeanutConfig(r=2, depth=0, scaling=8.0, target_modules=targets)
    )
    full = peft.inject_adapter_in_model(config, copy.deepcopy(case.model)).eval()
    assert not full.load_state_dict(kept, strict=False).unexpected_keys
    for name in case.fresh:
        full.get_parameter(name).requires_grad_()
    torch.testing.assert_close(of(case, case.adapted), output(full, **case.example), rtol=1e-5, atol=1e-6)
    for model in (full, case.adapted):
        model.zero_grad()
    of(case, case.adapted).square().sum().backward()
    output(full, **case.example).square().sum().backward()
    found = {name: item.grad for name, item in case.adapted.named_parameters() if item.grad is not None}
    expected = {name: item.grad for name, item in full.named_parameters() if item.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def adapted(model: nn.Module, example: dict[str, object], at: float | str = 0.5, **settings: object) -> nn.Module:
    prefix, suffix = split(model, at, example)
    config = AdapterConfig.model_validate(settings)
    return adapt(model, suffix, prefix(**example), example, config, fresh=CLASSIFIER, seed=0)


def test_chosen_layers_alone_are_adapted() -> None:
    suffix = adapted(bert(), TEXT, targets=["query", "layer.3.output.dense"])
    layer = "bert.encoder.layer"
    assert paths(suffix) == {f"{layer}.{i}.attention.self.query" for i in (2, 3)} | {f"{layer}.3.output.dense"}


def test_convolutions_that_peft_cannot_merge_are_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.plain = nn.Conv2d(4, 4, 3, padding=1)
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
            self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
            self.classifier = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.first, self.plain, self.grouped, self.dilated, self.mirrored):
                x = layer(x).relu()
            return self.classifier(x.mean((2, 3)))

    suffix = adapted(Net(), {"x": PIXELS}, at="plain")
    assert paths(suffix) == {"plain"}


def test_fresh_batch_normalisation_goes_on_counting() -> None:
    torch.manual_seed(0)
    model = tiny.ConvNet(3)
    prefix, suffix = split(model, 0.5, {"x": PIXELS})
    fresh = frozenset({"blocks.3.1.weight", "blocks.3.1.bias"})
    both = adapt(model, suffix, prefix(x=PIXELS), {"x": PIXELS}, AdapterConfig(), fresh=fresh, seed=0)
    before = copy.deepcopy(both.state_dict())
    both.train()(prefix(x=PIXELS), x=PIXELS)
    moved = {name for name, item in both.state_dict().items() if not torch.equal(item, before[name])}
    assert moved == {f"blocks.3.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_where_only_the_head_is_left_it_trains_alone() -> None:
    suffix = adapted(tiny.ConvNet(3), {"x": PIXELS}, at=1.0)
    assert {name for name, item in suffix.named_parameters() if item.requires_grad} == CLASSIFIER


def test_faults_name_the_remedy() -> None:
    with pytest.raises(TrainError, match=r"peanut, which adapts Linear; after the cut .* \(but BatchNorm2d, Conv2d\)"):
        adapted(tiny.ConvNet(3), {"x": PIXELS}, kind="peanut")
    with pytest.raises(TrainError, match=r"\(but none with weights\); choose a lower cut"):
        adapted(tiny.ConvNet(3), {"x": PIXELS}, at=1.0, targets=["classifier"])
    with pytest.raises(ConfigError, match=r"targets has 'classifier'; .* they end in query, key, value, dense"):
        adapted(bert(), TEXT, targets=["query", "classifier"])
    for settings, message in (
        ({"kind": "peanut", "dropout": 0.1}, "peanut has no dropout"),
        ({"kind": "houlsby"}, "'lora' or 'peanut'"),
        ({"rank": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig.model_validate({"adapter": settings})


def test_layers_of_the_same_name_elsewhere_stay_as_they_are() -> None:
    """peft takes a name for the end of any path: here the path of a layer after the cut ends that of one before it."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 3))
    assert paths(adapted(model, {"input": PIXELS[:, 0, 0]}, at="1")) == {"1", "2"}


def test_a_network_that_peft_knows_better_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=10, hidden_size=8, state_size=4, num_hidden_layers=4))
    example = {"input_ids": IDS, "use_cache": False}
    with pytest.raises(TrainError, match=r"'out_proj' is incompatible .* with train\.adapter\.targets"):
        adapted(model, example)
    assert paths(adapted(model, example, targets=["x_proj"])) == {f"backbone.layers.{i}.mixer.x_proj" for i in (2, 3)}


def test_a_weight_that_is_read_behind_its_layer_s_back_is_found_out() -> None:
    class Net(tiny.Leaky):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.embedding(input_ids)
            for layer in self.layers:
                hidden = hidden + layer(hidden) + hidden @ layer.weight
            return self.classifier(hidden.mean(1))

    with pytest.raises(TrainError, match="the model reads a weight otherwise than by calling its layer"):
        adapted(Net(3), TEXT)


def test_a_kind_alone_is_a_section() -> None:
    assert TrainConfig.model_validate({"adapter": "lora"}).adapter == AdapterConfig(kind="lora")
    assert TrainConfig.model_validate({"adapter": {"kind": "peanut", "rank": 4}}).adapter is not None
    assert TrainConfig.model_validate({}).adapter is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty images, and pretrained weights of the network with a classifier of another size."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(20))
    torch.manual_seed(5)
    save_file(tiny.ConvNet(5).state_dict(), tmp_path / "pretrained.safetensors")
    encode_project(project(tmp_path))
    return tmp_path


def project(folder: Path, **train: object) -> Project:
    settings = {"epochs": 4, "lr": 0.02, "adapter": "lora"} | train
    model = {"weights": "pretrained.safetensors"}
    return Project.load(tiny.write_params(folder, model=model, train=settings, encode={"cuts": [0.0, 0.5]}))


def test_a_run_trains_keeps_plain_weights_and_exports(folder: Path) -> None:
    made = project(folder)
    run = train_project(made, "0.5")
    assert run.value > run.initial
    kept, pretrained = load_file("results/runs/0.5/model.safetensors"), load_file("pretrained.safetensors")
    changed = {name for name, item in kept.items() if name in CLASSIFIER or not torch.equal(pretrained[name], item)}
    assert changed == {"blocks.2.0.weight", "blocks.3.0.weight"} | CLASSIFIER
    parity = export_run(made, "0.5", folder / "model")
    assert parity.merged < 1e-5
    assert json.loads((folder / "model/parity.json").read_text())["samples"] == 32
    network = tiny.ConvNet(3)
    network.load_state_dict(load_file(folder / "model/model.safetensors"))
    assert all(torch.equal(network.state_dict()[name], item) for name, item in kept.items())


def test_the_value_is_that_of_the_kept_weights(folder: Path) -> None:
    made = project(folder, epochs=6, lr=0.1)
    run = train_project(made, "0.5")
    table = SampleTable.read(made.samples)
    tower = open_tower(made, 0.5, table)
    tower.suffix.load_state_dict(load_file("results/runs/0.5/model.safetensors"))
    _, batches, _ = open_loaders([tower], table, torch.device("cpu"))
    assert evaluate(tower.suffix, tower.loaded.task, batches, Accelerator())[run.metric] == pytest.approx(run.value)


class Killed(BaseException):
    pass


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Count the epochs that runs commit, and let one die right after its `last`."""
    counter = SimpleNamespace(done=0, last=None)
    save = pipeline.train.fit.save

    def counting(*args: object, **kwargs: object) -> None:
        save(*args, **kwargs)  # type: ignore[arg-type]
        counter.done += 1
        if counter.done == counter.last:
            raise Killed

    monkeypatch.setattr(pipeline.train.fit, "save", counting)
    return counter


@pytest.mark.parametrize(
    ("then", "epochs"), [({}, 2), ({"adapter": {"kind": "lora", "rank": 3}}, 4)], ids=["resumed", "other-settings"]
)
def test_a_killed_run_leaves_what_its_settings_need(
    folder: Path, saves: SimpleNamespace, then: dict[str, object], epochs: int
) -> None:
    """The same settings go on where it stopped, others start anew: both end as if nothing had happened."""
    weights = Path("results/runs/0.5/model.safetensors")
    adapter = {"kind": "lora", "rank": 4, "dropout": 0.2}
    train_project(project(folder, **({"adapter": adapter} | then)), "0.5")
    undisturbed = weights.read_bytes()
    saves.done, saves.last = 0, 2
    with pytest.raises(Killed):
        train_project(project(folder, adapter=adapter), "0.5")
    saves.done, saves.last = 0, None
    run = train_project(project(folder, **({"adapter": adapter} | then)), "0.5")
    assert saves.done == epochs
    assert len(run.history) == 4
    assert weights.read_bytes() == undisturbed


def test_full_fine_tuning_from_the_inputs(folder: Path) -> None:
    train_project(project(folder), "0.0")
    assert export_run(project(folder), "0.0", folder / "model").merged < 1e-5


def test_texts_of_every_length(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    texts = sorted({" ".join(draw.choice(["one", "two", "good", "bad"], draw.integers(1, 12))) for _ in range(80)})
    lines = [{"text": text, "label": "good" if "good" in text else "other"} for text in texts]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = Project.load(
        tiny.write_params(
            tmp_path,
            data={"source": "text", "path": "texts.jsonl", "text": "text", "label": "label"},
            model={"backbone": f"hf:{text_folder}"},
            preprocess={"kind": "text", "image_size": None},
            encode={"cuts": [0.5]},
            train={"epochs": 4, "adapter": {"kind": "peanut", "rank": 4}},
        )
    )
    encode_project(made)
    run = train_project(made, "0.5")
    assert run.history[-1]["train/loss"] < run.history[0]["train/loss"]
    assert export_run(made, "0.5", tmp_path / "model").merged < 1e-5
