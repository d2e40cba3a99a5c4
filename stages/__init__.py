"""The command line: one click command per DVC stage, and the other verbs of `recycle`."""
