#!/usr/bin/env python3
"""The same as `astro-hpc convert`, for those who look for a tool: `tools/convert_checkpoint.py import HF_MODEL OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from astro_hpc.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert"]
    main()
