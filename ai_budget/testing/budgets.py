"""Budgets, the clock and the local API, for the length of a test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from django.conf import settings
from django.db import transaction
from django.test import override_settings

from ai_budget import periods
from ai_budget.conf import DEFAULTS, conf
from ai_budget.ledger.connection import stand_in
from ai_budget.models import DowngradeRung, FeatureBudget
from ai_budget.pricing import rates
from ai_budget.savings.digest_keys import apart
from ai_budget.testing.simulator import AnthropicSimulator

if TYPE_CHECKING:
    from django.test import SimpleTestCase

    _Case = SimpleTestCase
else:
    _Case = object


@contextmanager
def override_budget(
    feature: str, *, rungs: Iterable[tuple[int, str]] | None = None, **fields: Any
) -> Iterator[FeatureBudget]:
    """Give a feature, a category or the site ("*") these limits inside the block.

    ``fields`` are those of ``FeatureBudget``; ``rungs`` are pairs of percent and model. As a
    decorator it needs a database, like the calls inside. What was there before comes back.
    """
    manager = FeatureBudget.objects.using(conf.LEDGER_DATABASE)
    before = manager.filter(name=feature).values().first()
    ladder: list[tuple[int, str]] = list(
        DowngradeRung.objects.using(manager.db)
        .filter(budget__name=feature)
        .values_list("at_percent", "model")
    )
    budget, _ = manager.update_or_create(name=feature, defaults=fields)
    try:
        if rungs is not None:
            _set_rungs(budget, rungs)
        yield budget
    finally:
        if before is not None:
            manager.filter(pk=budget.pk).update(**before)
        else:
            # Calls may have been booked to it, so it stays, without limits of its own.
            blank = FeatureBudget(pk=budget.pk, name=feature)
            blank.save(using=manager.db, force_update=True)
        if rungs is not None:
            _set_rungs(budget, ladder)


def _set_rungs(budget: FeatureBudget, rungs: Iterable[tuple[int, str]]) -> None:
    # At once, or a rung that is refused would leave a test's transaction unusable.
    with transaction.atomic(using=budget._state.db):
        budget.rungs.all().delete()
        for percent, model in rungs:
            budget.rungs.create(at_percent=percent, model=model)


@contextmanager
def freeze(at: datetime) -> Iterator[None]:
    """Let the budget's clock stand still at an aware moment inside the block."""
    if at.tzinfo is None:
        raise ValueError("freeze() takes an aware datetime")
    moment = at.astimezone(UTC)
    with periods.override_clock(lambda: moment):
        yield


class BudgetTestMixin(_Case):
    """For ``TestCase`` and ``TransactionTestCase``: calls go to ``self.anthropic_api``.

    The ledger writes through the test's own connection, so that it is rolled back with it. Nothing
    is found in the caches of answers and prompts that was kept before the test.
    """

    anthropic_api: AnthropicSimulator
    _overridden_settings: ClassVar[dict[str, Any]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.anthropic_api = AnthropicSimulator()
        cls.anthropic_api.start()
        cls.addClassCleanup(cls.anthropic_api.stop)
        cls.enterClassContext(conf.default(BASE_URL=cls.anthropic_api.base_url))
        # Django puts these in force before setUpTestData, which may make calls, and after it
        # has what override_settings says of the class.
        own: dict[str, Any] = getattr(cls, "_overridden_settings", None) or {}
        with override_settings(**own):
            cls.enterClassContext(ledger_of_the_test())
            cls.enterClassContext(apart())
            local = {**own, "AI_BUDGET": local_settings(cls.anthropic_api)}
        cls._overridden_settings = local
        cls.addClassCleanup(setattr, cls, "_overridden_settings", own)
        super().setUpClass()

    def setUp(self) -> None:
        super().setUp()
        self.enterContext(apart())
        self.anthropic_api.reset()
        rates.forget()


def ledger_of_the_test() -> AbstractContextManager[None]:
    """Let the test's own connection stand in for a second alias, where the site has one."""
    return stand_in("default") if conf.LEDGER_DATABASE != "default" else nullcontext()


def local_settings(api: AnthropicSimulator) -> dict[str, Any]:
    """Return the project's AI_BUDGET with calls sent to the local API."""
    return {
        **getattr(settings, "AI_BUDGET", {}),
        "API_KEY": "local",
        "BASE_URL": api.base_url,
        # What a test reserved is rolled back with it.
        "LEDGER": DEFAULTS["LEDGER"],
        "LEDGER_DATABASE": "default",
    }
