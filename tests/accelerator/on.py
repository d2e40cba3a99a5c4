"""Runs a script on the accelerator of device.py, if its build folder is named: `python -m accelerator.on FILE ...`

`-m MODULE` may stand in place of FILE. Packages named in the environment variable WITHOUT cannot be imported.
"""

import os
import runpy
import sys
from pathlib import Path

for name in os.environ.get("WITHOUT", "").split():
    sys.modules[name] = None  # type: ignore[assignment]
if os.environ.get("ACCELERATOR_BUILD"):
    import accelerator.device  # noqa: F401

if __name__ == "__main__":
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
