"""A bank that speaks myBRC and counts as the original does: over HTTP, in this process, for tests and plug-in authors.

It sets nothing aside for a yes. A start counts by its POST, an end by what its PUT adds to the amount that is stored; a
PUT without an end changes the stored amount and not what counts as used.
"""

import json
import threading
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "Token 0123456789abcdef0123456789abcdef01234567"  # noqa: S105  # of no bank but this
DATES = ("submitdate", "startdate")


class UsageBank:
    """One account for everybody."""

    def __init__(self, allocation: str) -> None:
        """Listen, with so many SU in the account."""
        self.allocation = Decimal(allocation)
        self.used = Decimal(0)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.away = False
        """Answer everything with 503."""
        self.awake = threading.Event()
        """Cleared: nothing is answered."""
        self.awake.set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/api"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def config(self, *, prices: str = "main = 1.0", token: str = TOKEN, off: str = "") -> str:
        """Return a ``bank-config.toml`` that names it; ``off``: the switch that is not on."""
        switches = ("enable_job_submit_plugin", "enable_spank_plugin", "enable_job_complete_plugin")
        enabled = "\n".join(f"{name} = {'false' if name == off else 'true'}" for name in switches)
        return f'[Enable]\n{enabled}\n[PartitionPrice]\n{prices}\n[API]\nurl = "{self.url}"\ntoken = "{token}"\n'

    def close(self) -> None:
        self.awake.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Answer one request."""
        self.awake.wait()
        with self._lock:
            if self.away:
                return 503, {}
            words = path.strip("/").split("/")[1:]
            if words[0] == "can_submit_job":
                return 200, self._may(words[1])
            return self._told(method, body)

    def _may(self, cost: str) -> dict[str, Any]:
        self.asked.append(cost)
        if Decimal(cost) + self.used <= self.allocation:
            return {"success": True, "message": f"A job with job_cost {cost} can be submitted."}
        sentence = f"Adding job_cost {cost} to account balance {self.used} would exceed account allocation"
        return {"success": False, "message": f"{sentence} {self.allocation}."}

    def _told(self, method: str, job: dict[str, Any]) -> tuple[int, Any]:
        known = self.jobs.get(job["jobslurmid"])
        if method == "POST" and known is not None:
            return 400, {"jobslurmid": ["job with this jobslurmid already exists."]}
        counts = all(job.get(date) for date in DATES) and (method == "POST" or job.get("enddate"))
        if counts:
            self.used += Decimal(job["amount"]) - (Decimal(known["amount"]) if known else 0)
        self.jobs[job["jobslurmid"]] = job
        return (201 if method == "POST" else 200), job


def _handler(bank: UsageBank) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            told = json.loads(self.rfile.read(length)) if length else None
            mine = self.headers["Authorization"] == TOKEN
            status, body = bank.answer(self.command, self.path, told) if mine else (401, {"detail": "Invalid token."})
            raw = json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except OSError:  # whoever asked has not waited
                self.close_connection = True

        do_GET = do_PUT = do_POST = _answer  # noqa: N815  # names of the standard library

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
