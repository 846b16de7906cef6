"""Brokers for tests: librdkafka's own mock of a cluster, and a real Apache Kafka without ZooKeeper (KRaft).

Both are processes of their own, so that they can be halted, killed and started again.
"""

import os
import signal
import socket
import subprocess  # servers that outlive the call
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from carrel.process import run

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0
_LOOK_EVERY_S = 0.05
_DIED_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
_MOCK = """
import signal, sys
import confluent_kafka
client = confluent_kafka.Producer({"test.mock.num.brokers": 3, "log_level": 0})
print(",".join(f"{one.host}:{one.port}" for one in client.list_topics(timeout=30).brokers.values()), flush=True)
signal.pause()
"""
_JAVA = ("-Xms128m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")


class MockKafka:
    """Three brokers in one process: Kafka's protocol without its disks."""

    def __init__(self) -> None:
        """Start them (a tenth of a second)."""
        words = [*_DIED_WITH_PARENT, sys.executable, "-c", _MOCK]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.servers = self._process.stdout.readline().strip()
        assert self.servers, "the mock cluster did not start"

    def halt(self) -> None:
        """Answer nobody any more."""
        self._process.send_signal(signal.SIGSTOP)
        # Until one of its threads has taken the signal the others go on, on a busy machine for long enough to answer.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        """Answer again."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


class Kafka:
    """One real broker in a directory of its own, on loopback."""

    def __init__(self, where: Path, jars: Path) -> None:
        """Format its storage and start it (about six seconds).

        Args:
            where: Its directory.
            jars: Apache Kafka's server and what it needs.
        """
        self._where = where
        self._jars = jars
        self._ports = _free_ports(2)
        self.servers = f"127.0.0.1:{self._ports[0]}"
        (where / "server.properties").write_text(self._properties())
        cluster = "carrelcarrelcarrelcarr"
        run([*self._java(), "kafka.tools.StorageTool", "format", "-t", cluster, "-c", where / "server.properties"])
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def _java(self) -> list[str]:
        return ["java", *_JAVA, f"-Dkafka.logs.dir={self._where}", "-cp", f"{self._jars}/*"]

    def _properties(self) -> str:
        clients, controllers = self._ports
        settings = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@127.0.0.1:{controllers}",
            "listeners": f"PLAINTEXT://127.0.0.1:{clients},CONTROLLER://127.0.0.1:{controllers}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{clients}",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": self._where / "data",
            "num.partitions": 2,
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "auto.create.topics.enable": "true",
            "group.initial.rebalance.delay.ms": 0,
            # A test that stops it does not want to wait for a handover to nobody.
            "controlled.shutdown.enable": "false",
        }
        return "".join(f"{name}={value}\n" for name, value in settings.items())

    def start(self) -> None:
        """Start it where it was, and wait until it answers. A second call does nothing."""
        if self._process is not None:
            return
        words = [*_DIED_WITH_PARENT, *self._java(), "kafka.Kafka", str(self._where / "server.properties")]
        with (self._where / "log").open("ab") as log:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.stop()
                raise RuntimeError(f"kafka did not start: {(self._where / 'log').read_text()[-2000:]}")
            time.sleep(_LOOK_EVERY_S)  # until a fact that only the server makes

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._ports[0]), timeout=1):
            return _brokers(self.servers) > 0
        return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; what it has acknowledged is on its disk. A second call does nothing."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    close = stop


def _brokers(servers: str) -> int:
    # An extra: the plug-in of pytest loads without it.
    from confluent_kafka import KafkaException  # noqa: PLC0415
    from confluent_kafka.admin import AdminClient  # noqa: PLC0415

    with suppress(KafkaException):
        return len(AdminClient({"bootstrap.servers": servers, "log_level": 0}).list_topics(timeout=5).brokers)
    return 0


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on; a server that must know them beforehand leaves no better way."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Reader:
    """Reads topics from their beginnings to their ends, again and again."""

    def __init__(self, servers: str) -> None:
        """Connect when first asked."""
        from confluent_kafka import Consumer  # noqa: PLC0415  # an extra

        settings = {"bootstrap.servers": servers, "group.id": f"test-{os.getpid()}", "log_level": 0}
        # What is there shall come at once, not in half a second.
        settings |= {"fetch.wait.max.ms": 20, "fetch.error.backoff.ms": 20, "enable.auto.commit": False}
        self._consumer: Any = Consumer(settings)

    def topics(self) -> Sequence[str]:
        return sorted(self._consumer.list_topics(timeout=60).topics)

    def messages(self, topic: str) -> Sequence[Any]:
        """Return all messages of a topic; those of one partition are in their order."""
        from confluent_kafka import TopicPartition  # noqa: PLC0415  # an extra

        partitions = self._consumer.list_topics(topic, timeout=60).topics[topic].partitions
        ends = {}
        for number in partitions:
            _, end = self._consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=60)
            if end > 0:  # and not -1001: a topic that was just made
                ends[number] = end
        self._consumer.assign([TopicPartition(topic, number, 0) for number in ends])
        found: list[Any] = []
        while ends:
            message = self._consumer.poll(60)
            assert message is not None, f"{topic}: nothing comes, and there is more up to {ends}"
            assert message.error() is None, message.error()
            found.append(message)
            if message.offset() + 1 >= ends.get(message.partition(), 0):
                ends.pop(message.partition(), None)
        return found

    def close(self) -> None:
        self._consumer.close()
