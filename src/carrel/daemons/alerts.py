"""Tells somebody when an account has used half of what it was given, three quarters, nearly all, all.

Into the log always, and by the site's own command, which may send mail or open a ticket.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from carrel import process
from carrel.bank import alerts
from carrel.bank.alerts import Alert
from carrel.config import AlertSettings
from carrel.model.money import format_su
from carrel.ports import Store
from carrel.process import CommandError

_LOG = logging.getLogger("carrelctld.bank")


class Alerts:
    """Looks every minute or so. Each crossing is told once; after a crash perhaps a second time, under its own name."""

    def __init__(self, settings: AlertSettings, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        """Look at nothing yet."""
        self._settings = settings
        self._store = store
        self._clock = clock

    async def look(self) -> float:
        """Tell what is new, and return after how many seconds to look again."""
        thresholds = tuple(sorted(self._settings.percent))
        if thresholds:
            for alert in await asyncio.to_thread(alerts.due, self._store, int(self._clock()), thresholds):
                if await self._tell(alert):
                    await asyncio.to_thread(alerts.told, self._store, alert)
        return self._settings.period_s

    async def _tell(self, alert: Alert) -> bool:
        used, given = format_su(alert.used.spent_micro_su), format_su(alert.used.given_micro_su)
        sentence = (
            f"account '{alert.account}' has used {used} of {given} SU, {alert.percent} % or more; "
            f"see: carrel account show {alert.account}"
        )
        _LOG.warning("%s alert=%s", sentence, alert.name)
        if not self._settings.command:
            return True
        words = {
            "CARREL_ALERT": alert.name,
            "CARREL_ALERT_ACCOUNT": alert.account,
            "CARREL_ALERT_PERCENT": str(alert.percent),
            "CARREL_ALERT_SENTENCE": sentence,
        }
        try:
            await process.run_async(self._settings.command, timeout_s=self._settings.timeout_s, env=words)
        except CommandError as error:
            _LOG.warning("the alert %s is told again later: %s", alert.name, error)
            return False
        return True
