"""What the bank costs Slurm: a question of job_submit.lua, and Slurm's job rate with the bank and without.

Usage: bank_submit.py [JOBS]. Questions are asked as the Lua asks them, over the counter's socket, one at a time. Rates
are of pairs in both orders, so that whatever else the machine does meanwhile falls on both.
"""

import secrets
import socket
import statistics
import sys
import time

from carrel.sandbox.cluster import Sandbox

QUESTIONS = 500
JOBS = 100
CONF = "[bank]\nlook_period_s = 2.0\n"
"""A site's period; a sandbox looks more often, so that nobody waits for it."""


def main() -> None:
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else JOBS
    with Sandbox(guests=False, bank=True, deposit_su=10**6, carrel_conf=CONF) as paid, Sandbox(guests=False) as free:
        latencies = questions(paid)
        print(
            f"a question: p50 {latencies[len(latencies) // 2]:.2f} ms, p99 {latencies[-len(latencies) // 100]:.2f} ms"
        )
        rates: dict[str, list[float]] = {"with": [], "without": []}
        for first, second in ((paid, free), (free, paid)):
            for box in (first, second):
                rates["with" if box is paid else "without"].append(rate(box, jobs))
        mean = {name: statistics.mean(values) for name, values in rates.items()}
        print(f"jobs/s with the bank {mean['with']:.1f}, without {mean['without']:.1f}, ", end="")
        print(f"ratio {mean['with'] / mean['without']:.3f}")


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


def rate(box: Sandbox, jobs: int) -> float:
    """Return how many jobs a second are submitted, one after the other."""
    began_s = time.perf_counter()
    for _ in range(jobs):
        done = box.run(["sbatch", "-t1", "--output=/dev/null", "--chdir=/tmp", "--wrap=true"])
        assert done.returncode == 0, done.stderr
    while box.run(["squeue", "-h"]).stdout.strip():
        time.sleep(0.05)
    return jobs / (time.perf_counter() - began_s)


if __name__ == "__main__":
    main()
