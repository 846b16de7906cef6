"""``carrel bank``: the service units of the site."""

from cyclopts import App

app = App(name="bank", help="The site's service units: prices.")
app.command("carrel.cli.prices:app", name="prices", help="What an hour of each resource costs.")
