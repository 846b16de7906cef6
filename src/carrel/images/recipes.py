"""What the images that Carrel builds itself are made of."""

import msgspec


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution's smallest root with what a job script expects to find."""

    name: str
    suite: str
    packages: tuple[str, ...]
    epoch_s: int
    """Time of all files newer than it, and of what packages generate: the day the distribution was released."""
    needed_bytes: int
    """Room that building takes in the store, with the kernel."""
    scratch_bytes: int
    """Room that building takes below TMPDIR."""


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="debian12",
            suite="bookworm",
            packages=(
                "iproute2",  # ip: what network does the guest have?
                "less",  # what people page with in an interactive job
                "netbase",  # /etc/protocols, /etc/services
                "procps",  # ps, free, uptime: what runs here?
                "python3-minimal",  # the language of many job scripts
                "usr-is-merged",  # /usr is merged from the start, so usrmerge need not bring perl
            ),
            epoch_s=1686355200,  # 2023-06-10
            needed_bytes=900 * 2**20,
            scratch_bytes=900 * 2**20,
        ),
    )
}
