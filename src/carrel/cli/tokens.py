"""``carrel bank token``: secrets by which programs ask the bank."""

import re
from typing import Annotated

from cyclopts import App, Parameter

from carrel.cli import desk, output
from carrel.cli.guest import Json
from carrel.daemons.bank_views import TokenMade, TokenView
from carrel.errors import UsageError
from carrel.model.access import Scope

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

app = App(name="token", help="Tokens, by which programs ask the bank.")


@app.command
def add(
    *,
    user: Annotated[str, Parameter(show_default=False, help="Whom it stands for; you by default.")] = "",
    scope: Annotated[
        Scope, Parameter(show_default=False, help="What its user may read, or all that an administrator may do.")
    ] = "read",
    ttl: Annotated[str, Parameter(help="How long it is good: 90s, 30m, 12h, 30d.")] = "30d",
    note: Annotated[str, Parameter(show_default=False, help="What it is for.")] = "",
    json: Json = False,
) -> None:
    """Make a token and print its secret, this once; nobody can show it again."""
    body = {"user": user, "scope": scope, "ttl_s": _seconds(ttl), "note": note}
    made = desk.change("tokens", TokenMade, body)
    if json:
        output.objects([made])
        return
    print(made.secret)
    output.say(
        f"token {made.token.name} of {made.token.user} is good until {output.clock(made.token.expires)}; "
        f"to end it: carrel bank token revoke {made.token.name}"
    )


@app.command(name="list")
def list_(*, json: Json = False) -> None:
    """List your tokens; all of them for an administrator."""
    found = desk.ask("tokens", list[TokenView])
    if json:
        output.objects(found)
        return
    output.table(
        ("TOKEN", "USER", "SCOPE", "STATE", "EXPIRES", "NOTE"),
        [(one.name, one.user, one.scope, _state(one), output.clock(one.expires), one.note) for one in found],
    )


@app.command
def revoke(name: Annotated[str, Parameter(help="Name of the token, as it is listed.")], /) -> None:
    """End a token at once."""
    desk.change(f"tokens/{desk.part(name)}", TokenView, method="DELETE")
    print(f"token {name} is good no more")


def _state(token: TokenView) -> str:
    return "revoked" if token.revoked else "good" if token.good else "expired"


def _seconds(text: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if not found:
        raise UsageError(f"--ttl '{text}': write a number with s, m, h or d, like 30d")
    return int(found[1]) * _UNITS_S[found[2]]
