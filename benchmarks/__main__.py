"""All benchmarks at their usual sizes: ``python -m benchmarks``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = [
    ["preprocessing.py"],
    ["segmentation.py"],
    ["features.py", "--cells", "16", "--batch", "8"],
    ["clustering.py"],
    ["conversion.py"],
]

for command in RUNS:
    print("#", *command, flush=True)
    subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True)
