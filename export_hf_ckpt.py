"""The same as export_hf.py, under the name that NVIDIA's example has for it."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("export_hf.py")), run_name="__main__")
