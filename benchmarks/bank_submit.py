"""What the bank costs Slurm: a question of job_submit.lua, and Slurm's job rate with the bank and without.

Usage: bank_submit.py [JOBS]. Questions are asked as the Lua asks them, over the counter's socket, one at a time. Rates
are of pairs in both orders, so that whatever else the machine does meanwhile falls on both.
"""

import secrets
import socket
import statistics
import sys
import time
from typing import NamedTuple

from carrel.sandbox.cluster import Sandbox

QUESTIONS = 500
JOBS = 100
PAIRS = 3
CONF = "[bank]\nlook_period_s = 2.0\n"
"""A site's period; a sandbox looks more often, so that nobody waits for it."""


def main() -> None:
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else JOBS
    with Sandbox(guests=False, bank=True, deposit_su=10**6, carrel_conf=CONF) as paid, Sandbox(guests=False) as free:
        latencies = questions(paid)
        print(
            f"a question: p50 {latencies[len(latencies) // 2]:.2f} ms, p99 {latencies[-len(latencies) // 100]:.2f} ms"
        )
        found: dict[str, list[Turn]] = {"with": [], "without": []}
        for first, second in PAIRS * ((paid, free), (free, paid)):
            for box in (first, second):
                found["with" if box is paid else "without"].append(turn(box, jobs))
        for what in Turn._fields:
            median = {name: statistics.median(getattr(each, what) for each in turns) for name, turns in found.items()}
            print(f"{what}, with the bank {median['with']:.2f}, without {median['without']:.2f}, ", end="")
            print(f"ratio {median['with'] / median['without']:.3f}")


def questions(box: Sandbox) -> list[float]:
    """Return how long answers took, in milliseconds, sorted; each places a lien."""
    took = []
    for _ in range(QUESTIONS):
        words = ["submit", f"token={secrets.token_hex(16)}", "uid=0", "time_limit=10", "num_tasks=2"]
        began_s = time.perf_counter()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(box.layout.submit_socket))
            sock.sendall(("\x1f".join(words) + "\n").encode())
            answer = sock.recv(4096)
        took.append((time.perf_counter() - began_s) * 1000)
        assert answer.startswith(b"ok\t"), answer
    return sorted(took)


class Turn(NamedTuple):
    """What one turn showed. The nodes share the machine, and their jobs are most of a turn: jobs/s varies by half."""

    jobs_per_s: float
    sbatch_ms: float
    """Median; in it, the time in which slurmctld asks."""


def turn(box: Sandbox, jobs: int) -> Turn:
    """Submit jobs one after the other, and wait until all have ended."""
    began_s = time.perf_counter()
    took_ms = []
    for _ in range(jobs):
        asked_s = time.perf_counter()
        done = box.run(["sbatch", "-t1", "--output=/dev/null", "--chdir=/tmp", "--wrap=true"])
        took_ms.append((time.perf_counter() - asked_s) * 1000)
        assert done.returncode == 0, done.stderr
    while box.run(["squeue", "-h"]).stdout.strip():
        time.sleep(0.05)
    return Turn(jobs / (time.perf_counter() - began_s), statistics.median(took_ms))


if __name__ == "__main__":
    main()
