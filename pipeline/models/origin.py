"""The source of a Hugging Face network: the place of its configuration, weights and tokenizer."""

from pathlib import Path
from typing import Any

from pipeline.errors import AbsentError
from pipeline.files import PACKAGE, locate
from pipeline.models.config import ModelConfig

GGUF = ".gguf"


class Origin:
    """The source of configuration, weights and tokenizer: a directory, a GGUF file, or a repository of the hub.

    `folder` is the directory, None for a repository; `arguments` are those of every `from_pretrained`.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.source, found = config.name, None
        if self.source.startswith(PACKAGE) or Path(self.source).expanduser().exists():
            found = locate(self.source, "model.backbone")
            self.source = str(found)
        elif self.source.startswith((".", "/", "~")):
            raise AbsentError(f"model.backbone is {config.backbone!r}; there is no such directory")
        file = {}
        if self.source.endswith(GGUF):
            repository, name = self.source.split("/")[:2], self.source.split("/")[2:]
            self.source = "/".join(repository) if found is None else str(found.parent)
            file = {"gguf_file": "/".join(name) if found is None else found.name}
        self.folder = Path(self.source) if found is not None else None
        self.arguments: dict[str, Any] = {
            "revision": config.revision or "main",
            "trust_remote_code": config.trust_remote_code,
            "local_files_only": self.folder is not None,  # a directory is never looked up on the network
            **file,
        }
