"""`recycle adopt`: features that another program made -> a store."""

from pathlib import Path

import click


@click.command("adopt")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=click.Path(path_type=Path, file_okay=False))
@click.option("--ids", help="Array of SOURCE with the items' names. Default: of a folder, the names of its files.")
@click.option("--field", "fields", multiple=True, help="Array that is no state, such as labels; may be given again.")
@click.option("--about", default="", help="What you vouch for: network, layer, preprocessing. It is in the recipe.")
@click.option("--split", default="train", show_default=True, help="Name of this data set in the store.")
def command(source: Path, store: Path, ids: str | None, fields: tuple[str, ...], about: str, split: str) -> None:
    """Put the features in SOURCE, byte for byte, into the folder STORE.

    SOURCE is a file .h5, .npz or .safetensors with an entry per item in each array, or a folder of .pt files.
    """
    from pipeline.library.adopt import adopt  # noqa: PLC0415 (torch is slow to import)

    click.echo(f"{len(adopt(source, store, ids, fields, about, split))} items in {store}")
