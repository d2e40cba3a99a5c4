"""Names the packages that `make gpu` lacks, with the command that installs them; imports none of them."""

import importlib.util
import sys

USUAL = "accelerate numpy peft pillow pyarrow pytest safetensors timm torch torchvision tqdm transformers"
SMALL = "donfig google-crc32c numcodecs obstore pydantic ruamel.yaml zarr"
MODULES = {"google-crc32c": "google_crc32c", "pillow": "PIL", "ruamel.yaml": "ruamel"}


def main() -> None:
    """Exit with 1 if something is missing."""
    packages = f"{USUAL} {SMALL}".split()
    missing = [name for name in packages if importlib.util.find_spec(MODULES.get(name, name)) is None]
    if missing:
        raise SystemExit(
            f"{sys.executable} lacks {', '.join(missing)}; give make gpu another PYTHON (.venv/bin/python), or run\n"
            f"  {sys.executable} -m pip install {' '.join(missing)}"
        )


if __name__ == "__main__":
    main()
