"""docs/reference/sinks.md and docs/how-to/ldms.md name every setting."""

import re
from pathlib import Path

import msgspec
import pytest

from carrel.config import Ldms
from carrel.sinks.files import FileSettings
from carrel.testing import SinkContract

DOCS = Path(__file__).resolve().parents[2] / "docs"


def words(page: str) -> set[str]:
    return set(re.findall(r"[A-Za-z0-9_.]+", (DOCS / page).read_text()))


def names(settings: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(settings)}


def test_every_setting_of_a_sink_is_named() -> None:
    kafka = pytest.importorskip("carrel.sinks.kafka", reason="not installed: carrel's extra kafka")
    parquet = pytest.importorskip("carrel.sinks.parquet", reason="not installed: carrel's extra parquet")
    prometheus = pytest.importorskip("carrel.sinks.prometheus", reason="not installed: carrel's extra prometheus")
    wanted = names(FileSettings) | names(kafka.KafkaSettings) | names(parquet.ParquetSettings)
    assert wanted | names(prometheus.PrometheusSettings) <= words("reference/sinks.md")


def test_every_setting_of_ldms_is_named() -> None:
    assert names(Ldms) <= words("how-to/ldms.md")


def test_the_page_for_authors_names_what_the_contract_asks_for() -> None:
    assert {"make", "taken", "down", SinkContract.__name__} <= words("how-to/write-a-sink.md")
