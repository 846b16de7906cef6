"""What all routes of the bank share: who asks, what a query and a body may hold, and how a refusal is told."""

from datetime import datetime
from functools import cache
from typing import Annotated, Any

import msgspec
from litestar import Request, Response
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, QueryParameter

from carrel.bank.queries import PAGE
from carrel.daemons.bank_views import RefusalView
from carrel.daemons.callers import AnyRequest, without_nul
from carrel.daemons.desk import DeniedError, Desk, admins_only
from carrel.daemons.views import ErrorView
from carrel.errors import NotFoundError, UsageError
from carrel.model.access import Person
from carrel.model.ledger import Name, NewName, OptionalName, Reason

Key = Annotated[
    str,
    HeaderParameter(
        name="Idempotency-Key",
        required=True,
        min_length=1,
        max_length=200,
        pattern=r"^[!-~]+$",
        description="Names this request: the same again is answered alike and changes nothing.",
    ),
]
# Bounds stand here and not in a Meta: Litestar does not look into those of a query.
Limit = Annotated[int, QueryParameter(ge=1, le=PAGE)]
Position = Annotated[int, QueryParameter(ge=0, le=2**62)]
Word = Annotated[str, QueryParameter(max_length=200)]
When = Annotated[datetime | None, QueryParameter(description="With its offset; without one it is UTC")]
_STATUS = {
    "funds": 402,
    "project_cap": 402,
    "user_cap": 402,
    "unknown": 404,
    "exists": 409,
    "state": 409,
    "conflict": 409,
    "invalid": 400,
}
ERRORS: dict[int, ResponseSpec] = {
    status: ResponseSpec(kind, description=text, generate_examples=False)
    for status, kind, text in (
        (400, ErrorView, "The request is malformed, or its values make no sense"),
        (401, ErrorView, "Nobody whom the bank knows: no credential, a bad one, a token that is good no more"),
        (403, ErrorView, "Known, and not allowed"),
        (404, ErrorView, "There is none, or none that the caller may see"),
        (405, ErrorView, "No such method here"),
        (503, ErrorView, "The ledger or Slurm did not answer: nobody can tell; ask again under the same key"),
    )
}
REFUSALS = ERRORS | {
    402: ResponseSpec(RefusalView, description="Not covered", generate_examples=False),
    409: ResponseSpec(RefusalView, description="Not possible in this state", generate_examples=False),
}


class StrictRequest(Request[Any, Any, Any]):
    """Takes a body to the letter, and decodes it once: Litestar would take ``"5"`` and ``5.0`` for an amount."""

    async def json(self) -> Any:
        """Return the body as what the handler takes."""
        field = self.route_handler.parsed_data_field
        try:
            return _decoder(field.annotation if field else Any).decode(await self.body())
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise UsageError(_sentence(str(error))) from error


def _sentence(text: str) -> str:
    """Return what is wrong with a body, for people: what a name may hold, and not the expression that says so."""
    for kind, words in _IN_WORDS.items():
        text = text.replace(f"`str` matching regex {_pattern(kind)!r}", words)
    return text.replace("`", "'").lower()


def _pattern(kind: Any) -> str:
    (meta,) = kind.__metadata__
    return str(meta.pattern)


_IN_WORDS = {
    Name: "a word of visible ASCII letters, without a space",
    NewName: "a name of visible ASCII letters, without a space or a slash",
    OptionalName: "a word of visible ASCII letters, without a space, or none",
    Reason: "one line of text",
}


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


async def met(request: AnyRequest) -> tuple[Desk, Person]:
    """Return the desk and who stands before it."""
    desk: Desk | None = request.app.state.desk
    if desk is None:
        raise NotFoundError("this site runs no bank; bank.enabled of carrel.toml begins one")
    without_nul(request)
    return desk, await desk.callers.person(request)


async def admin(request: AnyRequest, what: str) -> tuple[Desk, Person]:
    """Return the desk and who stands before it, if they may change something; ``what`` is for the sentence if not."""
    desk, person = await met(request)
    admins_only(person.writes, what)
    return desk, person


def denied(_request: AnyRequest, error: DeniedError) -> Response[RefusalView]:
    refusal = error.refusal
    return Response(
        RefusalView(
            error=refusal.sentence,
            why=refusal.why,
            needed_micro_su=refusal.needed_micro_su,
            available_micro_su=refusal.available_micro_su,
        ),
        status_code=_STATUS[refusal.why],
    )
