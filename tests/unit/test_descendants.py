"""Whose a process is, told from /proc while it goes on working."""

import subprocess  # a process that never rests
import sys
from pathlib import Path

from carrel.sandbox import descendants

OPENS_AND_CLOSES = """
import os, sys
log = open(sys.argv[1] + "/log", "w")
print("begun", flush=True)
while True:
    for other in [os.open("/dev/null", os.O_RDONLY) for _ in range(500)]:
        os.close(other)
"""


def test_a_process_is_known_by_its_open_file_whatever_else_it_opens_and_closes_meanwhile(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OPENS_AND_CLOSES, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "begun\n"
            name = Path(f"/proc/{process.pid}/comm").read_text().strip()
            for _ in range(10):
                assert process.pid in descendants.with_open_file(name, tmp_path)
        finally:
            process.kill()
