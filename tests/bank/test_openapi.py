"""Requests that nobody thought of, made from our OpenAPI description: none is answered with a 5xx or breaks the books.

Half of them fit the description, half do not; half name an account that is there.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from schemathesis import GenerationMode

from carrel.cli.reference import rest
from carrel.daemons import callers
from carrel.testing.desk import RestBank, rest_bank

pytestmark = pytest.mark.fuzz

EXAMPLES = 24
"""For each of some thirty operations."""
NEEDS_SLURM = {"/v1/bank/reconcile", "/v1/bank/sync"}
"""Without a Slurm they say 503, as the description says."""
OPERATIONS: list[Any] = [
    cast("Any", found).ok() for found in schemathesis.openapi.from_dict(json.loads(rest())).get_all_operations()
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestBank]:
    with rest_bank(tmp_path_factory.mktemp("openapi")) as found:
        found.account("physics", 10**15)
        yield found


async def send(desk: RestBank, words: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(app=cast("Any", desk.app), client=(callers.UNIX, 0), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://carrel", trust_env=False) as http:
        return await http.request(**words)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_request_breaks_the_server(desk: RestBank, operation: Any) -> None:
    kinds = [operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
    desk.app.state.desk = desk.desk

    @settings(
        max_examples=EXAMPLES,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategies.one_of(*kinds), known=strategies.booleans())
    def ask(case: Any, known: bool) -> None:
        if known and "account" in case.path_parameters:
            case.path_parameters["account"] = "physics"
        words = dict(case.as_transport_kwargs(base_url="http://carrel"))
        words.pop("cookies")  # we have none
        if isinstance(words.get("data"), bytes):
            words["content"] = words.pop("data")
        try:
            answer = asyncio.run(send(desk, words))
        except (UnicodeEncodeError, httpx.InvalidURL, TypeError):
            return  # no such request can be sent
        away = answer.status_code == 503 and operation.path in NEEDS_SLURM
        assert answer.status_code < 500 or away, f"{words}: {answer.status_code} {answer.text}"
        if answer.status_code >= 400:
            assert answer.json()["error"], "every refusal is a sentence"

    ask()
