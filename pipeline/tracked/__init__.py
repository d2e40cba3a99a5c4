"""DVC: stores that it tracks, dvc://REVISION:PATH[?remote=NAME], read from the remote; and a new repository of it."""

from pipeline.tracked.new import init_dvc
from pipeline.tracked.outputs import SCHEME, Place, Tracked, open_tracked

__all__ = ["SCHEME", "Place", "Tracked", "init_dvc", "open_tracked"]
