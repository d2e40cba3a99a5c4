"""Stage `train`: store + sample table -> results/runs/<name>."""

from collections.abc import Sequence
from pathlib import Path

import click

from pipeline import workflows
from pipeline.config import parse_override
from pipeline.project import Project
from pipeline.runs.record import STORE
from stages.options import params_option


@click.command("train")
@click.option("--cut", required=True, help="One of encode.cuts.")
@click.option("--set", "settings", multiple=True, metavar="SETTING=VALUE", help="Replaces one of params.yaml.")
@click.option("--store", metavar="URL", help="Where the states lie: as encode.store, or dvc://REVISION:PATH.")
@click.option("--name", help="What the run is called, as a folder too. [default: CUT, or CUT-VALUE-VALUE with --set]")
@params_option
def command(params: Path, cut: str, settings: Sequence[str], store: str | None, name: str | None) -> None:
    """Fine-tune the layers above one cut from its store.

    --set may be given several times, as in --set train.seed=1 --set data.fraction=0.5. A run that was killed goes on
    from its last validation, by default that of its last whole epoch. --store dvc://REVISION:data/activations reads
    what DVC tracks there straight from its remote (?remote=NAME names another than the default); an empty revision is
    dvc.lock as it lies here.
    `torchrun --nproc-per-node 2 -m stages.cli train --cut CUT` trains one run in two processes.
    """
    overrides = dict(map(parse_override, settings)) | ({} if store is None else {STORE: store})
    train_project = workflows.train.train_project
    from pipeline.train.processes import together  # noqa: PLC0415  (torch is slow to import)

    with together():
        train_project(Project.load(params, overrides), cut, name)
