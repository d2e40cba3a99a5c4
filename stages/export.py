"""`recycle export`: a finished run -> a plain model."""

from pathlib import Path

import click

from pipeline import workflows
from pipeline.project import Project
from stages.options import params_option


@click.command("export")
@click.argument("to", type=click.Path(path_type=Path, file_okay=False))
@click.option("--run", "name", required=True, help="Its name: its cut, unless it was given another.")
@click.option("--adapter", is_flag=True, help="Write the LoRA adapters of the run alone, as files of peft.")
@params_option
def command(to: Path, params: Path, name: str, adapter: bool) -> None:
    """Write a finished run to the folder TO: a Hugging Face directory, or a safetensors state dict with its settings.

    The full model is proved on 32 samples to give what the suffix gives from the store. The lines of Python that load
    it, without this package, are printed, and are in load.py in the folder.
    """
    if adapter:
        difference = workflows.export.export_adapter(Project.load(params), name, to)
        click.echo(
            f"{to}: PeftModel.from_pretrained(base, {str(to)!r}) gives outputs within {difference:.1e} of the run's"
        )
        return
    proof = workflows.export.export_run(Project.load(params), name, to)
    click.echo(f"{to}: {proof}")
    for file in sorted(to.rglob(workflows.export.LOADER)):
        lines = file.read_text(encoding="utf-8").replace("Path(__file__).parent", f"Path({str(file.parent)!r})")
        click.echo(f"\n{file} loads it:\n\n{lines}", nl=False)
