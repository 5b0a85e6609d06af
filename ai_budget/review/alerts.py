"""What somebody should know about now, and writing it down once, however many workers look.

``evaluate`` reads balances, sums and the calls of the last two hours, in the same few queries
however many calls there are, has the rules decide, and records what nobody has recorded yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import date, datetime, timedelta
from functools import partial
from itertools import groupby
from typing import Any
from zoneinfo import ZoneInfo

from django.db import IntegrityError, connections, transaction
from django.db.models import Count, F, Q, QuerySet, Sum
from django.db.models.functions import Coalesce

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.ledger.connection import patient_transaction, retry
from ai_budget.ledger.set_aside import SetAside
from ai_budget.models import (
    Alert,
    AlertDelivery,
    Batch,
    BatchSubmission,
    CallLog,
    DowngradeRung,
    FeatureBudget,
    SpendWindow,
)
from ai_budget.periods import Period, Window
from ai_budget.pricing.rates import DEAREST
from ai_budget.review import notifiers, spikes
from ai_budget.review.alert_rules import (
    Due,
    Ladder,
    Watched,
    of_forecast,
    of_ladder,
    of_limits,
    of_plan,
    percent_of,
)
from ai_budget.review.balances import balances_today_and_month
from ai_budget.review.limits import allowances
from ai_budget.review.spans import Span
from ai_budget.review.sums import Reading, reading
from ai_budget.values import SITE

Kind = Alert.Kind

LOOKED_BACK = timedelta(hours=2)
"""Calls reserved since then are looked at one by one, and batches that were finished since then."""

BATCHES_LOOKED_BACK = timedelta(days=2)

STUCK_TRIES = 5
"""Failures in a row after which a submission of a batch is worth telling."""


def evaluate(*, using: str | None = None, aside: SetAside | None = None) -> int:
    """Record every alert that is due and has not been told; return how many are to be delivered.

    Reads balances, sums and the calls of the last two hours. What nothing can be done with is
    set ``aside``; that something was set aside is an alert, too. Raises ``LedgerUnavailable``
    where the database does not take them.
    """
    alias, aside = using or conf.LEDGER_DATABASE, aside or SetAside()
    now = periods.now()
    due: list[Due] = []
    with aside.on_failure("alerts of", "budgets"):
        due += due_of_budgets(now, alias)
    with aside.on_failure("alerts of", "spikes"), reading(alias) as figures:
        due += spikes_in(figures)
    with aside.on_failure("alerts of", "calls"):
        due += due_of_calls(now, alias)
    with aside.on_failure("alerts of", "batches"):
        due += due_of_batches(now, alias)
    told = record(due, at=now, alias=alias, aside=aside)
    return told + record(due_of_set_aside(aside, now), at=now, alias=alias, aside=aside)


def due_of_set_aside(aside: SetAside, now: datetime) -> list[Due]:
    """Return what periodic work could not do: each row's name, once a day."""
    names = aside.names
    return [
        Due(
            kind=Kind.SET_ASIDE,
            budget=SITE,
            period=Period.DAY,
            first_day=periods.day(now, conf.TIME_ZONE).first_day,
            about=name[:_LONGEST_NAME],
            count=len(names),
        )
        for name in names[:_MOST_SET_ASIDE]
    ]


_LONGEST_NAME = 200

_MOST_SET_ASIDE = 20
"""Rows that are named in alerts of one run; the log has them all."""


def due_of_budgets(now: datetime, alias: str) -> list[Due]:
    """Return what is due of the plans, limits and ladders of all budgets."""
    zone = conf.TIME_ZONE
    today, month = periods.day(now, zone), periods.month(now, zone)
    windows = {Period.DAY: today, Period.MONTH: month}
    budgets = watched(today, month, alias)
    thresholds = sorted(set(conf.ALERT_THRESHOLDS))
    due: list[Due] = []
    for budget in budgets.values():
        due += of_plan(budget, thresholds, month)
        due += of_limits(budget, thresholds, windows)
        due += of_forecast(budget, month, now)
        due += of_ladder(budget, budgets, windows)
    return due


def watched(today: Window, month: Window, alias: str) -> dict[str, Watched]:
    """Return all budgets by name, with the site's whether or not it has a row."""
    rows = FeatureBudget.objects.using(alias).select_related("parent").prefetch_related("rungs")
    budgets = {row.name: row for row in rows}
    budgets.setdefault(SITE, FeatureBudget(name=SITE))
    uses = balances_today_and_month(list(budgets.values()), using=alias)
    plans = allowances(month.start, month.end, using=alias)
    refused = _refused(budgets, today, alias)
    return {
        name: Watched(
            name=name,
            use=uses[name],
            enforce=budget.enforce,
            category=budget.parent.name if budget.parent else "",
            plan_nanousd=plans[name].plan_nanousd if name in plans else None,
            refused_today=refused.get(name, 0),
            ladder=_ladder_of(budget, budgets),
        )
        for name, budget in budgets.items()
    }


def _refused(names: Collection[str], today: Window, alias: str) -> dict[str, int]:
    """Return how often each budget's calls were refused today."""
    scopes = {f"{kind}:{name}": name for name in names for kind in ("feature", "category")}
    scopes[SITE] = SITE
    keys = [SpendWindow.key_for(scope, Period.DAY, today.first_day) for scope in scopes]
    windows = SpendWindow.objects.using(alias).filter(pk__in=keys, refused__gt=0)
    found: dict[str, int] = {}
    for scope, refused in windows.values_list("scope", "refused"):
        name = scopes[scope]
        found[name] = max(refused, found.get(name, 0))
    return found


def _ladder_of(budget: FeatureBudget, budgets: Mapping[str, FeatureBudget]) -> Ladder | None:
    """Return a budget's own ladder, else its category's, else the site's."""
    parent = budgets.get(budget.parent.name) if budget.parent else None
    for owner in (budget, parent, budgets[SITE]):
        rungs = _rungs(owner)
        if owner is not None and rungs:
            ladder = sorted((rung.at_percent, rung.model) for rung in rungs)
            return Ladder(owner=owner.name, enforce=owner.enforce, rungs=tuple(ladder))
    return None


def _rungs(budget: FeatureBudget | None) -> Sequence[DowngradeRung]:
    return [] if budget is None or budget.pk is None else list(budget.rungs.all())


# Spikes


def spikes_in(figures: Reading) -> list[Due]:
    """Return the features whose last full hour, or this hour so far, is out of the ordinary."""
    zone = figures.zone
    this = spikes.hour_of(figures.now, zone)
    spent = _by_hour(figures.quarters([(this - _HOUR, this + _HOUR)]), zone)
    high = {feature for (_, feature), cost in spent.items() if cost >= spikes.LEAST_NANOUSD}
    if not high:
        return []
    hours = {start: spikes.same_hours(start, zone) for start in (this - _HOUR, this)}
    spans = {(at, at + _HOUR) for before in hours.values() for at in before}
    spent = {**_by_hour(figures.quarters(spans, features=high), zone), **spent}
    return [
        due
        for start, before in hours.items()
        for due in _spikes_of_hour(start, before, spent, figures)
    ]


_HOUR = timedelta(hours=1)


def _by_hour(
    quarters: Mapping[tuple[datetime, str], int], zone: ZoneInfo
) -> dict[tuple[datetime, str], int]:
    """Return what features spent in each hour of the clock on the wall."""
    spent: dict[tuple[datetime, str], int] = {}
    for (quarter, feature), cost in quarters.items():
        key = (spikes.hour_of(quarter, zone), feature)
        spent[key] = spent.get(key, 0) + cost
    return spent


def _spikes_of_hour(
    start: datetime,
    before: Sequence[datetime],
    spent: Mapping[tuple[datetime, str], int],
    figures: Reading,
) -> list[Due]:
    found = {feature: cost for (at, feature), cost in spent.items() if at == start}
    high = {name: cost for name, cost in found.items() if cost >= spikes.LEAST_NANOUSD}
    if not high:
        return []
    today = periods.day(start, figures.zone)
    calls = figures.by(Span(since=start, until=start + _HOUR), "feature")
    first = periods.midnight(today.first_day - timedelta(days=spikes.DAYS), figures.zone)
    days: dict[str, int] = {}
    for feature, _day in figures.spend(Span(since=first, until=today.start), "feature", "day"):
        days[feature] = days.get(feature, 0) + 1
    due = []
    for feature, cost in sorted(high.items()):
        samples = [spent.get((at, feature), 0) for at in before]
        usual = spikes.usual(samples)
        paid = calls[(feature,)].paid_calls if (feature,) in calls else 0
        known = days.get(feature, 0)
        if spikes.is_spike(cost, samples, calls=paid, days_with_spend=known):
            due.append(
                Due(
                    kind=Kind.SPIKE,
                    budget=feature,
                    period=Period.DAY,
                    first_day=today.first_day,
                    spent_nanousd=cost,
                    of_nanousd=usual,
                    percent=percent_of(cost, usual) if usual else None,
                    count=paid,
                    since=start,
                )
            )
    return due


# Calls and batches


def due_of_calls(now: datetime, alias: str) -> list[Due]:
    """Return the features whose recent calls cost more than was held, or had no known price.

    Those of a batch were reserved with it, so they are looked for by that moment.
    """
    finished = Batch.objects.using(alias).filter(
        status=Batch.Status.FINISHED, finished_at__gte=now - LOOKED_BACK, reserved_at__isnull=False
    )
    of_batches = list(finished.values_list("reserved_at", flat=True))
    recent = Q(reserved_at__gte=now - LOOKED_BACK) | Q(reserved_at__in=of_batches)
    over = Q(cost_nanousd__gt=F("reserved_nanousd"))
    unpriced = Q(rates__startswith=f"{DEAREST}; ", cost_nanousd__gt=0)
    rows = (
        CallLog.objects.using(alias)
        .filter(recent, over | unpriced)
        .order_by()
        .values("feature_id", "model", "day")
        .annotate(
            over_calls=Count("pk", filter=over),
            over_cost=Coalesce(Sum("cost_nanousd", filter=over), 0),
            over_held=Coalesce(Sum("reserved_nanousd", filter=over), 0),
            unpriced_calls=Count("pk", filter=unpriced),
            unpriced_cost=Coalesce(Sum("cost_nanousd", filter=unpriced), 0),
        )
    )
    bounds: dict[tuple[str, date], tuple[int, int, int]] = {}
    prices: dict[tuple[str, date, str], tuple[int, int]] = {}
    for row in rows:
        feature, day, model = str(row["feature_id"]), row["day"], row["model"]
        if row["over_calls"]:
            held = (row["over_calls"], int(row["over_cost"]), int(row["over_held"]))
            before = bounds.get((feature, day), (0, 0, 0))
            bounds[feature, day] = (before[0] + held[0], before[1] + held[1], before[2] + held[2])
        if row["unpriced_calls"]:
            month = day.replace(day=1)
            calls, cost = prices.get((feature, month, model), (0, 0))
            calls, cost = calls + row["unpriced_calls"], cost + int(row["unpriced_cost"])
            prices[feature, month, model] = (calls, cost)
    return [
        *(
            Due(
                kind=Kind.BOUND,
                budget=feature,
                period=Period.DAY,
                first_day=day,
                spent_nanousd=cost,
                of_nanousd=held,
                percent=percent_of(cost, held) if held else None,
                count=calls,
            )
            for (feature, day), (calls, cost, held) in bounds.items()
        ),
        *(
            Due(
                kind=Kind.UNPRICED,
                budget=feature,
                period=Period.MONTH,
                first_day=month,
                about=model,
                spent_nanousd=cost,
                count=calls,
                model=model,
            )
            for (feature, month, model), (calls, cost) in prices.items()
        ),
    ]


def due_of_batches(now: datetime, alias: str) -> list[Due]:
    """Return batches with items that were not answered, and submissions to see to."""
    zone = conf.TIME_ZONE
    failed = Batch.objects.using(alias).filter(
        Q(errored__gt=0) | Q(expired__gt=0) | Q(refused__gt=0),
        status=Batch.Status.FINISHED,
        finished_at__gte=now - BATCHES_LOOKED_BACK,
    )
    waiting = (
        BatchSubmission.objects.using(alias)
        .filter(
            Q(status=BatchSubmission.Status.UNCERTAIN) | Q(tries__gte=STUCK_TRIES),
            batch__status__in=[Batch.Status.PREPARING, Batch.Status.OPEN],
        )
        .exclude(status=BatchSubmission.Status.DONE)
        .select_related("batch")
    )
    due = [
        Due(
            kind=Kind.BATCH,
            budget=batch.feature_id,
            period=Period.DAY,
            first_day=periods.day(batch.created_at, zone).first_day,
            about=f"#{batch.pk}",
            spent_nanousd=batch.spent_nanousd,
            count=batch.errored + batch.expired + batch.refused,
        )
        for batch in failed
    ]
    for submission in waiting:
        batch = submission.batch
        uncertain = submission.status == BatchSubmission.Status.UNCERTAIN
        due.append(
            Due(
                kind=Kind.UNCERTAIN if uncertain else Kind.STUCK,
                budget=batch.feature_id,
                period=Period.DAY,
                first_day=periods.day(batch.created_at, zone).first_day,
                about=f"#{batch.pk}/{submission.number}",
                spent_nanousd=batch.held_nanousd,
                count=submission.tries,
            )
        )
    return due


# Writing it down, once ---------------------------------------------------------------------------


def record(due: Iterable[Due], *, at: datetime, alias: str, aside: SetAside | None = None) -> int:
    """Write down what nobody has, and return how many alerts are to be delivered.

    Of several that are new and about one thing the severest is delivered, and covers the others.
    """
    aside = aside or SetAside()
    by_key = {one.key: one for one in due}
    missing = by_key.keys() - _recorded(by_key.values(), alias)
    if not missing:
        return 0
    connection = connections[alias]
    groups = groupby(sorted(by_key.values(), key=lambda it: it.group), key=lambda it: it.group)
    told = 0
    for _group, some in groups:
        ordered = sorted(some, key=lambda it: it.severity, reverse=True)
        if any(one.key in missing for one in ordered):
            with aside.on_failure("the alert of", ordered[0].budget):
                told += retry(connection, partial(_write, ordered, missing, at, alias))
    return told


def _recorded(due: Iterable[Due], alias: str) -> set[tuple[Any, ...]]:
    due = list(due)
    if not due:
        return set()
    known = Alert.objects.using(alias).filter(
        first_day__in={one.first_day for one in due}, budget__in={one.budget for one in due}
    )
    return set(known.values_list("first_day", "budget", "period", "kind", "threshold", "about"))


def _write(ordered: Sequence[Due], missing: Collection[Any], at: datetime, alias: str) -> int:
    """Write down what one thing has due, the severest first, which alone is delivered."""
    told = 0
    with patient_transaction(connections[alias]):
        for number, one in enumerate(ordered):
            if one.key not in missing:
                continue
            alert = _insert(one, at=at, covered=number > 0, alias=alias)
            if alert is not None and not alert.covered:
                _have_delivered(alert, at, alias)
                told += 1
    return told


def _insert(due: Due, *, at: datetime, covered: bool, alias: str) -> Alert | None:
    """Insert an alert; None where another worker did."""
    values = {field.name: getattr(due, field.name) for field in fields(due)}
    alert = Alert(raised_at=at, covered=covered, **values)
    try:
        with transaction.atomic(using=alias):
            alert.save(using=alias, force_insert=True)
    except IntegrityError:
        return None
    return alert


def _have_delivered(alert: Alert, at: datetime, alias: str) -> None:
    names = [notifiers.SIGNAL, *notifiers.named()]
    AlertDelivery.objects.using(alias).bulk_create(
        AlertDelivery(alert=alert, notifier=name, due_at=at) for name in names
    )


# Taking note of it -------------------------------------------------------------------------------


def acknowledge(alerts: QuerySet[Alert], *, by: Any, at: datetime) -> list[Alert]:
    """Note that a user has taken note of alerts; return those that nobody had before.

    An alert is raised no second time for it: what it was about has been told.
    """
    acknowledged = []
    for alert in alerts.filter(acknowledged_at=None):
        still = Alert.objects.using(alerts.db).filter(pk=alert.pk, acknowledged_at=None)
        if still.update(acknowledged_at=at, acknowledged_by=by):
            acknowledged.append(alert)
    return acknowledged
