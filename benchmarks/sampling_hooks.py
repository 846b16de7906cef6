"""Measure what sampling costs a job's start and end: the hooks of a job without a guest, beside an empty script.

Usage: python benchmarks/sampling_hooks.py [--runs 300]

slurmd starts both for each job, so what an empty script takes is not ours. Nothing is asserted: figures are for
reading.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

HOOK = Path(__file__).resolve().parents[1] / "slurm" / "carrel-hook"


def took_ms(command: list[str], env: dict[str, str], runs: int) -> list[float]:
    """Return how long each run took, in order of size."""
    found = []
    for _ in range(runs):
        began_s = time.perf_counter()
        subprocess.run(command, env=env, check=True)
        found.append((time.perf_counter() - began_s) * 1000)
    return sorted(found)


def main() -> None:
    """Print a row for each."""
    parser = argparse.ArgumentParser(description="What the hooks of a job without a guest take.")
    parser.add_argument("--runs", type=int, default=300)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory(dir="/tmp") as where:
        (Path(where) / "c1" / "hints").mkdir(parents=True)
        config = Path(where) / "carrel.toml"
        config.write_text(f'[metrics]\nperiod_s = 1.0\n[node]\ndir = "{where}/{{node}}"\n')
        env = {"PATH": os.defpath, "CARREL_CONFIG": str(config), "SLURM_JOB_ID": "4711", "SLURMD_NODENAME": "c1"}
        print(f"load {os.getloadavg()[0]:.1f}, {runs} runs each")
        for name, command in {
            "an empty script": ["/bin/sh", "-c", ":"],
            "prolog": [str(HOOK), "prolog"],
            "epilog": [str(HOOK), "epilog"],
        }.items():
            found = took_ms(command, env, runs)
            print(f"{name:<16} median {statistics.median(found):6.2f} ms, p99 {found[int(runs * 0.99) - 1]:6.2f} ms")


if __name__ == "__main__":
    main()
