"""The machine: GPU, driver, clocks, versions, and what it reaches in a copy and in products."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import torch

from benchmarks.conftest import environment
from benchmarks.roofline import measure_ceilings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args()
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    found = {
        "environment": environment(device),  # clocks before, at rest
        "properties": {
            name: getattr(properties, name)
            for name in ("total_memory", "multi_processor_count", "L2_cache_size")
        },
        "ceilings": measure_ceilings(device),
        "nvidia-smi": subprocess.getoutput("nvidia-smi -q"),  # clocks after, under load
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["environment"] | found["ceilings"], indent=1))


if __name__ == "__main__":
    main()
