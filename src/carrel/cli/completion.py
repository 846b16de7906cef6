"""``carrel completion``: what a shell needs to complete our commands."""

from typing import Annotated, Literal

from cyclopts import App, Parameter

Shell = Annotated[
    Literal["bash", "zsh", "fish"],
    Parameter(help="Whose, as in: carrel completion bash > /etc/bash_completion.d/carrel"),
]

app = App(name="completion", help="Print the completion script of a shell.")


@app.default
def script(shell: Shell, /) -> None:
    """Print the completion script of a shell."""
    # The script describes all commands, so all of them are loaded, by the one that knows them.
    from carrel.cli import main  # noqa: PLC0415

    print(main.app.generate_completion(shell=shell))
