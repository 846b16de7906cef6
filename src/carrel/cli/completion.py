"""``carrel completion``: what a shell needs to complete our commands."""

from typing import Literal

from cyclopts import App

app = App(name="completion", help="Print the completion script of a shell.")


@app.default
def script(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the completion script of a shell., as in: carrel completion bash > /etc/bash_completion.d/carrel."""
    # The script describes all commands, so all of them are loaded, by the one that knows them.
    from carrel.cli import main  # noqa: PLC0415

    print(main.app.generate_completion(shell=shell))
