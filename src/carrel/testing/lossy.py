"""A stand-in before a vCenter that loses requests or answers, refuses, waits, or is gone: what networks and people do.

It ends the TLS of its callers with the vCenter's own certificate, keeps every request that it saw, and decides by the
method that is called. Each rule serves once.
"""

import http.client
import re
import ssl
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from carrel.testing.vcsim import Certificates

_METHOD = re.compile(rb"<(?:\w+:)?Body>\s*<(?:\w+:)?(\w+)")
_PASSED_ON = ("Cookie", "SOAPAction", "Content-Type")
_ANSWERED = ("Set-Cookie", "Content-Type")
_WAIT_S = 60.0
_FAULT = """<?xml version="1.0" encoding="UTF-8"?>
<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"
 xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body><soapenv:Fault>
<faultcode>ServerFaultCode</faultcode><faultstring>{text}</faultstring>
<detail><{name}Fault xmlns="urn:vim25" xsi:type="{name}">{more}</{name}Fault></detail>
</soapenv:Fault></soapenv:Body></soapenv:Envelope>"""


class LoseRequest(msgspec.Struct, frozen=True):
    """The vCenter never hears of it."""


class LoseAnswer(msgspec.Struct, frozen=True):
    """The vCenter does it, and nobody is told. ``done`` is called in between."""

    done: Callable[[], None] = lambda: None


class Refuse(msgspec.Struct, frozen=True):
    """The answer is a fault of this name; ``more`` is XML inside it."""

    name: str
    text: str = ""
    more: str = ""


class Rewrite(msgspec.Struct, frozen=True):
    """The vCenter gets another request, and so fails by itself."""

    change: Callable[[bytes], bytes]


class Hold(msgspec.Struct, frozen=True):
    """The request waits here: ``arrived`` is set when it comes, and it goes on once ``release`` is."""

    arrived: threading.Event
    release: threading.Event


Rule = LoseRequest | LoseAnswer | Refuse | Rewrite | Hold


class LossyVcenter:
    """Listens on ``port`` while its context is open."""

    def __init__(self, behind: int, certificates: Certificates) -> None:
        self.requests: list[tuple[str, str]] = []
        """Method and body of each request, in the order in which they came."""
        self.gone = False
        self._behind = behind
        self._rules: dict[str, deque[Rule]] = defaultdict(deque)
        self._trust = ssl.create_default_context(cafile=certificates.ca)
        shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        shown.load_cert_chain(certificates.cert, certificates.key)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.socket = shown.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]

    @contextmanager
    def serving(self) -> Iterator["LossyVcenter"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def once(self, method: str, rule: Rule) -> None:
        """Follow this rule the next time that the method is called, after those that wait for it already."""
        self._rules[method].append(rule)

    def bodies(self, method: str) -> list[str]:
        """Return the bodies of all requests of this method."""
        return [body for name, body in self.requests if name == method]

    def answer(self, path: str, headers: Any, body: bytes, *, verb: str) -> tuple[int, dict[str, str], bytes] | None:
        """Return status, headers and body of the answer; None: the connection is lost."""
        match = _METHOD.search(body)
        method = match[1].decode() if match else ""
        if method:
            self.requests.append((method, body.decode()))
        rule = self._rules[method].popleft() if self._rules[method] else None
        if self.gone or isinstance(rule, LoseRequest):
            return None
        if isinstance(rule, Refuse):
            text = _FAULT.format(name=rule.name, text=rule.text, more=rule.more)
            return 500, {"Content-Type": "text/xml"}, text.encode()
        if isinstance(rule, Hold):
            rule.arrived.set()
            rule.release.wait(_WAIT_S)
        if isinstance(rule, Rewrite):
            body = rule.change(body)
        answer = self._ask(verb, path, {name: headers[name] for name in _PASSED_ON if name in headers}, body)
        if isinstance(rule, LoseAnswer):
            rule.done()
            return None
        return None if self.gone else answer

    def _ask(self, verb: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPSConnection("127.0.0.1", self._behind, context=self._trust, timeout=_WAIT_S)
        try:
            connection.request(verb, path, body or None, headers)
            answer = connection.getresponse()
            shown = {name: value for name in _ANSWERED if (value := answer.getheader(name))}
            return answer.status, shown, answer.read()
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: callers that do not trust us hang up, and that is what is tested."""


def _handler(vcenter: LossyVcenter) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:  # the base class's name
            self._pass_on("GET")

        def do_POST(self) -> None:  # the base class's name
            self._pass_on("POST")

        def _pass_on(self, verb: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = vcenter.answer(self.path, self.headers, body, verb=verb)
            if found is None:
                self.close_connection = True
                return
            status, headers, text = found
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
