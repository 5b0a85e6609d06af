"""Figures for Prometheus, read from the database when it asks.

    REGISTRY.register(BudgetCollector())

Whichever process answers a scrape tells of all of them, for what it tells is what the ledger and
the log of calls have: no counter is kept in memory, and none begins at zero after a restart. A
database that does not answer fails the scrape, for a zero would be taken for the truth.

Features and models are labels, so many of each and the rest together; users, subjects and tags
never are. Amounts are exact until they
are written out: the format knows only floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, timedelta

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ai_budget import money, periods
from ai_budget.conf import conf
from ai_budget.models import FeatureBudget, SpendWindow, TotalMark
from ai_budget.periods import Period, Window
from ai_budget.review.balances import BudgetUse, balances_today_and_month
from ai_budget.review.spans import ever
from ai_budget.review.sums import Figures, reading
from ai_budget.values import Status

_FINAL = frozenset({Status.SETTLED.value, Status.CACHED.value})
"""How calls stand that change no more, so that a counter can count them."""

_TOKENS: Mapping[str, Callable[[Figures], int]] = {
    "input": lambda it: it.input_tokens,
    "cache_write_5m": lambda it: it.cache_write_5m_tokens,
    "cache_write_1h": lambda it: it.cache_write_1h_tokens,
    "cache_read": lambda it: it.cache_read_tokens,
    "output": lambda it: it.output_tokens,
}
"""The types of tokens, each with a price of its own; those of thinking are output."""

_COLUMNS = ("feature", "model", "status", "saved_reason")

_KEYS_AT_ONCE = 1_000

MOST_FEATURES, MOST_MODELS = 500, 200
"""Values that a label may have, for each is a series that Prometheus keeps."""

OTHER = "(other)"
"""What those beyond are counted under."""


class BudgetCollector(Collector):
    """Reads everything anew at each scrape, in a few queries, however many calls there are."""

    def describe(self) -> Iterable[Metric]:
        """Return what there is without asking the database, which may not be there yet."""
        return _Families().all()

    def collect(self) -> Iterable[Metric]:
        families = _Families()
        alias = conf.LEDGER_DATABASE
        # The oldest keep their labels whatever is added later: a counter must not fall.
        budgets = list(FeatureBudget.objects.using(alias).order_by("pk")[:MOST_FEATURES])
        with reading() as sums:
            found = sums.by(ever(), *_COLUMNS)
            families.add_figures(_with_few_labels(found, [budget.name for budget in budgets]))
            families.behind.add_metric([], TotalMark.objects.using(alias).count())
        budgets.sort(key=lambda budget: budget.name)
        at = periods.now()
        month, today = periods.month(at, conf.TIME_ZONE), periods.day(at, conf.TIME_ZONE)
        families.add_refusals(_refused(budgets, month.first_day, today.first_day, alias))
        families.add_windows(today, month)
        # Asked of the ledger, which may keep them elsewhere.
        families.add_balances(balances_today_and_month(budgets))
        return families.all()


class _Families:
    """The metrics of one scrape, in the order in which they are told."""

    def __init__(self) -> None:
        self.cost = CounterMetricFamily(
            "ai_budget_cost_usd",
            "Dollars that settled calls cost. Calls that are only estimated are not in it, for an "
            "estimate may be corrected downwards: see ai_budget_estimated_cost_usd.",
            labels=["feature", "model"],
        )
        self.estimated = GaugeMetricFamily(
            "ai_budget_estimated_cost_usd",
            "Dollars that calls are booked at whose true cost nobody knows, or nobody knows yet.",
            labels=["feature", "model"],
        )
        self.tokens = CounterMetricFamily(
            "ai_budget_tokens",
            "Tokens of settled calls, each counted in one type.",
            labels=["feature", "model", "type"],
        )
        self.calls = CounterMetricFamily(
            "ai_budget_calls",
            "Calls that are over: settled ones, and those that the response cache answered.",
            labels=["feature", "model", "status"],
        )
        self.cache_lookups = CounterMetricFamily(
            "ai_budget_cache_lookups",
            "Calls whose answer was looked for in the response cache.",
            labels=["feature"],
        )
        self.cache_hits = CounterMetricFamily(
            "ai_budget_cache_hits",
            "Calls that the response cache answered.",
            labels=["feature"],
        )
        self.saved = GaugeMetricFamily(
            "ai_budget_saved_usd",
            "Dollars that calls would have cost more without the levers that took part in them; "
            "less than nothing where a lever cost more than it saved.",
            labels=["feature", "lever"],
        )
        self.in_flight = GaugeMetricFamily(
            "ai_budget_in_flight_calls",
            "Requests that are reserved and not booked yet. A batch is one until it is over.",
            labels=["feature"],
        )
        self.refusals = CounterMetricFamily(
            "ai_budget_refusals",
            "Calls that this site itself refused since the month began, by whichever limit: it "
            "begins anew with each month. What the API refuses is not among them.",
            labels=["feature"],
        )
        self.limit = GaugeMetricFamily(
            "ai_budget_limit_usd",
            "The limit in force, raises included; none where nothing is limited.",
            labels=["feature", "period"],
        )
        self.spent = GaugeMetricFamily(
            "ai_budget_spent_usd",
            "Dollars that count against the limit of the current day or month. The whole site is "
            'the feature "*", and a category counts what its features do.',
            labels=["feature", "period"],
        )
        self.held = GaugeMetricFamily(
            "ai_budget_held_usd",
            "Dollars that calls in flight hold of the limit of the current day or month.",
            labels=["feature", "period"],
        )
        self.start = GaugeMetricFamily(
            "ai_budget_period_start_timestamp_seconds",
            "When the current day or month began, in the zone whose days limits count in.",
            labels=["period"],
        )
        self.end = GaugeMetricFamily(
            "ai_budget_period_end_timestamp_seconds",
            "When the current day or month ends.",
            labels=["period"],
        )
        self.behind = GaugeMetricFamily(
            "ai_budget_totals_behind",
            "Bookings that are not added up yet; it grows while ai_budget_tick does not run.",
            labels=[],
        )

    def all(self) -> list[Metric]:
        return list(vars(self).values())

    def add_figures(self, found: Mapping[tuple[str, ...], Figures]) -> None:
        """Take the sums of all calls by feature, model, status and lever."""
        final = {key: it for key, it in found.items() if key[2] in _FINAL}
        for (feature, model), it in _added(final, 0, 1).items():
            self.cost.add_metric([feature, model], _dollars(it.settled_nanousd))
            for kind, count in _TOKENS.items():
                self.tokens.add_metric([feature, model, kind], count(it))
        for (feature, model, status), it in _added(final, 0, 1, 2).items():
            self.calls.add_metric([feature, model, status], it.calls)
        for (feature,), it in _added(final, 0).items():
            self.cache_lookups.add_metric([feature], it.looked_up)
            self.cache_hits.add_metric([feature], it.cached)
        for (feature, model), it in _added(found, 0, 1).items():
            self.estimated.add_metric([feature, model], _dollars(it.estimated_nanousd))
        for (feature,), it in _added(found, 0).items():
            self.in_flight.add_metric([feature], it.in_flight)
        for (feature, lever), it in _added(found, 0, 3).items():
            if lever:
                self.saved.add_metric([feature, lever], _dollars(it.saved_nanousd))

    def add_refusals(self, refused: Mapping[str, int]) -> None:
        for feature, count in refused.items():
            self.refusals.add_metric([feature], count)

    def add_balances(self, found: Mapping[str, BudgetUse]) -> None:
        for name, use in found.items():
            for period, of_period in ((Period.DAY, use.today), (Period.MONTH, use.month)):
                labels = [name, period.value]
                self.spent.add_metric(labels, _dollars(of_period.spent_nanousd))
                self.held.add_metric(labels, _dollars(of_period.held_nanousd))
                if of_period.limit_nanousd is not None:
                    self.limit.add_metric(labels, _dollars(of_period.limit_nanousd))

    def add_windows(self, *windows: Window) -> None:
        for window in windows:
            self.start.add_metric([window.period.value], window.start.timestamp())
            self.end.add_metric([window.period.value], window.end.timestamp())


def _with_few_labels(
    found: Mapping[tuple[str, ...], Figures], features: Sequence[str]
) -> dict[tuple[str, ...], Figures]:
    """Put the features and models that are too many under one name; those given go first."""
    others = sorted({key[0] for key in found}.difference(features))
    shown = {*features, *others[: MOST_FEATURES - len(features)]}
    models = set(sorted({key[1] for key in found})[:MOST_MODELS])
    few: dict[tuple[str, ...], Figures] = {}
    for (feature, model, *rest), figures in found.items():
        key = (
            feature if feature in shown else OTHER,
            model if model in models else OTHER,
            *rest,
        )
        few[key] = few[key] + figures if key in few else figures
    return few


def _added(
    found: Mapping[tuple[str, ...], Figures], *columns: int
) -> dict[tuple[str, ...], Figures]:
    """Add up figures that are alike in some of their columns."""
    sums: dict[tuple[str, ...], Figures] = {}
    for key, figures in found.items():
        own = tuple(key[column] for column in columns)
        sums[own] = sums[own] + figures if own in sums else figures
    return dict(sorted(sums.items()))


def _refused(
    budgets: Iterable[FeatureBudget], first_day: date, last_day: date, alias: str
) -> dict[str, int]:
    """Return how often each feature was refused on some days.

    Looked up by the keys of its days: among the days of all users it would take long to find.
    """
    days = [first_day + timedelta(days=n) for n in range((last_day - first_day).days + 1)]
    refused = {budget.name: 0 for budget in budgets if not budget.is_site}
    of_key = {
        SpendWindow.key_for(f"feature:{name}", Period.DAY, day): name
        for name in refused
        for day in days
    }
    keys = list(of_key)
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        rows = SpendWindow.objects.using(alias).filter(pk__in=keys[start : start + _KEYS_AT_ONCE])
        for key, count in rows.filter(refused__gt=0).values_list("pk", "refused"):
            refused[of_key[key]] += count
    return refused


def _dollars(nanousd: int) -> float:
    """Return an amount as the format wants it, the float that is nearest to it."""
    return float(money.to_usd(nanousd))
