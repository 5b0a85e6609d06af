"""Reads the rules in force for a charge: always from the database, so that a change in admin
is effective on the next call in every worker."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, TypeVar

from django.contrib.auth import get_user_model
from django.core.exceptions import FieldDoesNotExist
from django.db import DatabaseError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F, FilteredRelation, Q, QuerySet, Value

from ai_budget import money
from ai_budget.conf import conf
from ai_budget.exceptions import FeatureDisabled
from ai_budget.ledger.connection import patient_transaction, retry
from ai_budget.models import FeatureBudget, UserQuota
from ai_budget.models.budgets import NAME_PATTERN
from ai_budget.policy.limits import Budget, Quota, Rules, Rung, own_limit, raised
from ai_budget.values import SITE, Charge

log = logging.getLogger("ai_budget")

Result = TypeVar("Result")


def read_rules(charge: Charge, *, at: datetime) -> Rules:
    """Return the budgets and quotas that a charge counts against at that moment.

    An unknown feature has a budget with the defaults that is still to be created, or raises
    ``FeatureDisabled``, as the setting ``UNKNOWN_FEATURE`` says. Writes nothing. Raises
    ``LedgerUnavailable`` where they cannot be read.
    """

    def read() -> Rules:
        budgets = _budgets(charge.feature, at)
        if not budgets.keys() - {SITE}:  # nor one that the database takes for the same
            _ensure_creatable(charge.feature)
            budgets[charge.feature] = (Budget(name=charge.feature, is_new=True), _NO_ID, None)
        return _rules(charge, budgets)

    if charge.feature == SITE:
        raise FeatureDisabled("Calls are made for a feature; * is the budget of all of them.")
    return _retried(read)


def create_if_new(feature: Budget) -> None:
    """Create the budget of a feature that was unknown until its first call was reserved.

    A call that is refused creates none, so nobody can fill the table with names.
    """
    if not feature.is_new:
        return
    alias = conf.LEDGER_DATABASE
    try:
        # Somebody may be creating it in a transaction of theirs, the caller for one.
        with patient_transaction(connections[alias]):
            FeatureBudget.objects.using(alias).get_or_create(name=feature.name)
    except DatabaseError as error:
        log.warning(
            "The budget of %s could not be created (%s); its next call creates it.",
            feature.name,
            type(error).__name__,
        )


def read_site(*, at: datetime) -> Budget:
    """Return the budget of the whole site."""

    def read() -> Budget:
        budgets = _budgets(SITE, at)
        return budgets[SITE][0] if SITE in budgets else _site_of_settings()

    return _retried(read)


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """How a feature's calls are routed, the model it asks for ("": the default), and its cache."""

    how: str = "off"
    model: str = ""
    cache_scope: str = "off"


def read_routing(feature: str) -> Routing:
    """Return how a feature's calls are routed; one that nobody has used yet is not created."""

    def read() -> Routing:
        rows = _phrased(connections[conf.LEDGER_DATABASE], "routing", _routing_query).run(feature)
        # A collation may find one that is written differently.
        found = (row[1:] for row in rows if row[0] == feature)
        how, model, scope = next(found, ("off", "", "off"))
        return Routing(how=how, model=model, cache_scope=scope)

    return _retried(read)


def read_quotas(charge: Charge) -> tuple[Quota, ...]:
    """Return the quotas of a caller for all features together."""
    return _retried(lambda: _quotas(charge, _NO_ID))


_NO_ID = 0
"""A primary key that no row has."""


def _retried(read: Callable[[], Result]) -> Result:
    return retry(connections[conf.LEDGER_DATABASE], read)


def _rules(charge: Charge, budgets: Mapping[str, tuple[Budget, int, str | None]]) -> Rules:
    name = charge.feature
    if name not in budgets:
        # A collation may find one that is written differently, and calls are kept by name.
        raise FeatureDisabled(f"{name!r} is too like the name of another feature.")
    feature, feature_id, category_name = budgets[name]
    category = budgets[category_name][0] if category_name and category_name in budgets else None
    if category_name == name:
        # Calls made for a category itself count with those of its features.
        category = replace(feature)
    site = budgets[SITE][0] if SITE in budgets else _site_of_settings()
    quotas = _quotas(charge, feature_id)
    return Rules(feature=feature, category=category, site=site, quotas=quotas)


def forget_feature(name: str) -> None:
    """Give a feature's answers another version, so that those that are kept are not found.

    Every feature of a category, or of the site, gets its own: they stay forgotten wherever they
    are moved, and whatever is deleted. Raises ``LookupError`` for a name that has no budget.
    """
    alias = conf.LEDGER_DATABASE
    budgets = FeatureBudget.objects.using(alias).order_by("pk")
    if name != SITE:
        budgets = budgets.filter(Q(name=name) | Q(parent__name=name))
    with patient_transaction(connections[alias]):
        found = list(budgets.values_list("pk", flat=True))
        if not found and name != SITE:
            raise LookupError(f"There is no feature {name[:64]!r}, and so nothing to forget.")
        for key in found:
            own = FeatureBudget.objects.using(alias).filter(pk=key)
            own.update(cache_version=F("cache_version") + 1)


def _ensure_creatable(feature: str) -> None:
    if not re.match(NAME_PATTERN, feature) or feature == SITE or len(feature) > 64:
        raise FeatureDisabled(
            f"{feature[:80]!r} cannot be a feature's name: use at most 64 letters, digits, "
            "hyphens, underscores and dots."
        )
    if conf.UNKNOWN_FEATURE == "refuse":
        raise FeatureDisabled(
            f"There is no budget for the feature {feature!r}. Add one in admin, or set "
            'AI_BUDGET["UNKNOWN_FEATURE"] to "create".'
        )


def _budgets(feature: str, at: datetime) -> dict[str, tuple[Budget, int, str | None]]:
    """Return the feature, its category and the site by name, each with its id and category.

    A feature that others have for their category is its own.
    """
    connection = connections[conf.LEDGER_DATABASE]
    rows: dict[str, list[Any]] = {}
    for row in _phrased(connection, "budgets", _budgets_query).run(feature, at=at):
        rows.setdefault(row[1], []).append(row)
    return {
        name: (_budget(found), found[0][0], _category_name(name, found[0]))
        for name, found in rows.items()
    }


def _category_name(name: str, row: Sequence[Any]) -> str | None:
    parent: str | None = row[16]
    has_children = row[21] is not None
    return parent or (name if has_children else None)


def _budgets_query() -> QuerySet[Any]:
    """One row for each pair of a budget's rungs and its overrides in force."""
    return (
        FeatureBudget.objects.annotate(
            raised=FilteredRelation("overrides", condition=Q(overrides__until__gt=_MOMENT))
        )
        .filter(Q(name__in=[_TEXTS[0], SITE]) | Q(children__name=_TEXTS[0]))
        .values_list(
            "id",
            "name",
            "enabled",
            "enforce",
            "daily_limit_usd",
            "monthly_limit_usd",
            "requests_per_minute",
            "tokens_per_minute",
            "model",
            "max_tokens",
            "allow_unbounded",
            "cache_scope",
            "cache_ttl",
            "cache_counts",
            "cache_version",
            "prompt_cache",
            "parent__name",
            "rungs__at_percent",
            "rungs__model",
            "raised__period",
            "raised__amount_usd",
            "children__name",
        )
        .order_by()
    )


def _routing_query() -> QuerySet[Any]:
    own = FeatureBudget.objects.filter(name=_TEXTS[0])
    return own.values_list("name", "routing", "model", "cache_scope").order_by()


def _budget(rows: list[Any]) -> Budget:
    """Fold the rows of one budget, repeated for each of its rungs and overrides."""
    _, name, enabled, enforce, daily, monthly, requests, tokens, *others = rows[0]
    model, max_tokens, unbounded, scope, ttl, counts, version, prompt_cache, *_rest = others
    rungs = {(row[17], row[18]) for row in rows if row[17] is not None}
    overrides = {(row[19], row[20]) for row in rows if row[19] is not None}
    default_daily, default_monthly = _limits_of_settings()
    daily = own_limit(daily, name, of_settings=default_daily)
    monthly = own_limit(monthly, name, of_settings=default_monthly)
    return Budget(
        name=name,
        enabled=bool(enabled),
        enforce=bool(enforce),
        daily_limit=raised(daily, _amounts(overrides, "day")),
        monthly_limit=raised(monthly, _amounts(overrides, "month")),
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        model=model,
        max_tokens=max_tokens,
        allow_unbounded=bool(unbounded),
        cache_scope=scope,
        cache_ttl=ttl,
        cache_counts=bool(counts),
        cache_version=version,
        prompt_cache=prompt_cache,
        rungs=tuple(Rung(at_percent=percent, model=model) for percent, model in sorted(rungs)),
    )


def _amounts(overrides: Iterable[tuple[str, int]], wanted: str) -> list[int]:
    return [amount for period, amount in overrides if period == wanted]


def _site_of_settings() -> Budget:
    """Return the site's budget where nobody has made a row for it."""
    daily, monthly = _limits_of_settings()
    return Budget(name=SITE, daily_limit=daily, monthly_limit=monthly)


def _limits_of_settings() -> tuple[int | None, int | None]:
    return _setting(conf.DAILY_LIMIT_USD), _setting(conf.MONTHLY_LIMIT_USD)


@lru_cache(maxsize=64, typed=True)
def _setting(limit: Decimal | int | str | None) -> int | None:
    return None if limit is None else money.parse_usd(limit)


def _quotas(charge: Charge, feature_id: int) -> tuple[Quota, ...]:
    if charge.user_id is None and not charge.subject:
        return ()
    everyone = "everyone"
    whose = everyone if charge.user_id is None else f"user:{charge.user_id}"
    keys = [everyone, f"{everyone},feature:{feature_id}", whose, f"{whose},feature:{feature_id}"]
    connection = connections[conf.LEDGER_DATABASE]
    groups = None if charge.user_id is None else _groups_of_users()
    if groups is None:
        rows = _phrased(connection, "quotas", _quotas_query).run(*keys)
    else:
        # As its column takes it: the key of a user need not be a number.
        user_key = groups.model._meta.pk.get_db_prep_value(charge.user_id, connection)
        found = _phrased(connection, "quotas of members", lambda: _members_query(groups))
        rows = found.run(*keys, user_key, feature_id)
    return tuple(
        Quota(
            for_user=key.startswith("user:"),
            group=None if group_id is None else (priority, group_id),
            for_feature=",feature:" in key,
            unlimited=bool(unlimited),
            daily_calls=calls,
            daily_limit=daily,
            monthly_limit=monthly,
            requests_per_minute=requests,
            tokens_per_minute=tokens,
        )
        for key, group_id, priority, unlimited, calls, daily, monthly, requests, tokens in rows
    )


def _quotas_query() -> QuerySet[Any]:
    return _columns(UserQuota.objects.filter(key__in=_TEXTS[:4]))


def _members_query(groups: Any) -> QuerySet[Any]:
    """The quotas that are the caller's by name, and those of the caller's groups."""
    of_user = {groups.m2m_field_name(): Value(_TEXTS[4])}
    through = groups.remote_field.through._default_manager.filter(**of_user)
    in_feature = Q(feature__isnull=True) | Q(feature=Value(_TEXTS[5]))
    of_groups = UserQuota.objects.filter(
        in_feature, group__in=through.values(groups.m2m_reverse_field_name())
    )
    # One after the other, for an OR of both would use the index of neither.
    return _quotas_query().union(_columns(of_groups), all=True)


def _columns(quotas: QuerySet[UserQuota]) -> QuerySet[Any]:
    return quotas.values_list(
        "key",
        "group_id",
        "priority",
        "unlimited",
        "daily_calls",
        "daily_limit_usd",
        "monthly_limit_usd",
        "requests_per_minute",
        "tokens_per_minute",
    ).order_by()


def _groups_of_users() -> Any:
    """Return the field that has a user's groups; None where users of this site have none."""
    try:
        field = get_user_model()._meta.get_field("groups")
    except FieldDoesNotExist:
        return None
    group = UserQuota._meta.get_field("group").related_model
    return field if field.many_to_many and field.related_model is group else None


# Queries that the ORM phrases once, because it takes longer than the database to answer

_TEXTS = [f"ai_budget:{number}" for number in range(6)]
_MOMENT = datetime(1970, 1, 1, tzinfo=UTC)


class _Phrased:
    """A query with places for values and a moment; amounts come out as nano-dollars."""

    def __init__(self, connection: BaseDatabaseWrapper, queryset: QuerySet[Any]) -> None:
        self._connection = connection
        compiler = queryset.using(connection.alias).query.get_compiler(connection=connection)
        self._sql, self._params = compiler.as_sql()
        self._moment = connection.ops.adapt_datetimefield_value(_MOMENT)

    def run(self, *values: Any, at: datetime = _MOMENT) -> list[Any]:
        """Return the rows for these values, as the database takes them, at this moment."""
        given: dict[Any, Any] = dict(zip(_TEXTS, values, strict=False))
        given[self._moment] = self._connection.ops.adapt_datetimefield_value(at)
        with self._connection.cursor() as cursor:
            cursor.execute(self._sql, [given.get(param, param) for param in self._params])
            return list(cursor.fetchall())


def _phrased(
    connection: BaseDatabaseWrapper, name: str, query: Callable[[], QuerySet[Any]]
) -> _Phrased:
    """Return a query as it was phrased for this connection."""
    kept: dict[str, _Phrased] | None = getattr(connection, "_ai_budget_queries", None)
    if kept is None:
        kept = {}
        connection._ai_budget_queries = kept  # type: ignore[attr-defined]
    if name not in kept:
        kept[name] = _Phrased(connection, query())
    return kept[name]
