"""Stores that DVC tracks: dvc://REVISION:PATH[?remote=NAME], read from the remote where they are."""

from pipeline.tracked.outputs import SCHEME, Place, Tracked, open_tracked

__all__ = ["SCHEME", "Place", "Tracked", "open_tracked"]
