"""Names the packages that `make gpu` lacks, with the command that installs them."""

import importlib.util
import sys

USUAL = "accelerate numpy peft pillow pyarrow pytest safetensors timm torch torchvision tqdm transformers"
SMALL = "donfig google-crc32c numcodecs obstore pydantic ruamel.yaml zarr"
MODULES = {"google-crc32c": "google_crc32c", "pillow": "PIL"}


def lacking(package: str) -> str | None:
    """Return `package` if it is missing, or what it fails to import, if it is a small one; else None."""
    module = MODULES.get(package, package)
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return package
    try:
        if package in SMALL.split():
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        return package if error.name is None or module.startswith(error.name) else error.name
    return None


def main() -> None:
    """Exit with 1 if something is missing."""
    missing = dict.fromkeys(filter(None, map(lacking, f"{USUAL} {SMALL}".split())))
    if missing:
        raise SystemExit(
            f"{sys.executable} lacks {', '.join(missing)}; give make gpu another PYTHON (.venv/bin/python), or run\n"
            f"  {sys.executable} -m pip install {' '.join(missing)}"
        )


if __name__ == "__main__":
    main()
