"""`recycle cuts`: a model -> every place to cut it, with costs and gains."""

import dataclasses
import json
from pathlib import Path

import click

from pipeline import workflows
from pipeline.project import Project
from stages.options import params_option

LEGEND = """
cut: for encode.cuts; the number of blocks before it (from 2 on) and their share name the same place.
of parameters: frozen. of FLOPs: of a forward pass, before the cut; matrix products, convolutions, attention count.
state bytes: of one sample in fp16. x full, x frozen: expected speed-up of a training step over full fine-tuning, and
over the same layers frozen but run every time, if computation is the bound and backward costs twice forward.
linear head: with --probe, the validation score of a linear head on the states, fitted to up to 1,000 samples; from here
on: the best of these at the cut or after it. Where it falls, deeper cuts have lost something that the task needs.
* sensible: it saves 10 % or stores less than the inputs, and no other one that stores as little does nearly as well."""


@click.command("cuts")
@click.argument("model", required=False)
@params_option
@click.option(
    "--weights",
    help="As model.weights. Costs do not depend on values: the default is random weights, but with --probe.",
)
@click.option("--image-size", type=click.IntRange(min=1), help="As preprocess.image_size.")
@click.option("--length", type=click.IntRange(min=2), help="As preprocess.max_length, in tokens.")
@click.option("--classes", type=click.IntRange(min=2), default=10, show_default=True, help="Of the head, without data.")
@click.option("--batch", type=click.IntRange(min=2), default=2, show_default=True, help="Samples of the example.")
@click.option("--measure", "timed", is_flag=True, help="Also time steps of the sensible cuts on this machine's CPU.")
@click.option("--probe", is_flag=True, help="Also score linear heads on the states of every cut (linear probes).")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw scores and costs into a PNG.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def command(
    model: str | None,
    params: Path,
    weights: str | None,
    image_size: int | None,
    length: int | None,
    classes: int,
    batch: int,
    timed: bool,
    probe: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """List every place to cut a model, with its costs and the speed-up to expect; mark the sensible ones.

    MODEL is a name as in model.backbone (torchvision:resnet34, timm:NAME, hf:DIRECTORY, module:function), tried on
    drawn inputs. Without it the model and the data of the settings' file are used.

    The expected speed-ups assume that computation is the bound and that backward costs twice forward.
    """
    settings = {"image_size": image_size, "max_length": length}
    preprocess = {name: value for name, value in settings.items() if value is not None}
    cuts = workflows.cuts
    from pipeline.project.model_example import from_name, from_project  # noqa: PLC0415  (torch is slow to import)

    if model is None:
        project = Project.load(params)
        weights = weights or (project.model.weights if probe else None)
        example = from_project(project, weights, preprocess, classes=classes, batch=batch)
    else:
        example = from_name(model, weights, preprocess, classes=classes, batch=batch)
    choices = cuts.choose(example.model, example.inputs)
    if timed:
        choices = cuts.measure(example.model, example.inputs, choices)
    if probe:
        choices = cuts.add_linear_scores(example, choices)
    if plot is not None:
        cuts.draw(choices, plot)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(choice) for choice in choices], indent=2))
    else:
        sizes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in example.inputs.items())
        click.echo(f"example: {sizes}\n\n{cuts.table(choices)}\n{LEGEND}")
