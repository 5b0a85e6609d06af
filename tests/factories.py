"""Rows for tests, valid in every status; what a test is about, it says itself."""

# factory_boy ships its types half written: its declarations have none.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth.models import AbstractUser
from factory.declarations import LazyAttribute, LazyFunction, SelfAttribute, Sequence, SubFactory
from factory.django import DjangoModelFactory, Password

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.models import (
    CallLog,
    DowngradeRung,
    FeatureBudget,
    LimitOverride,
    ModelRate,
    SpendWindow,
    TotalMark,
    UserQuota,
)

HAIKU, SONNET, OPUS = "claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"


class UserFactory(DjangoModelFactory[AbstractUser]):
    class Meta:
        model = settings.AUTH_USER_MODEL
        skip_postgeneration_save = True

    username = Sequence(lambda n: f"user-{n}")
    email = LazyAttribute(lambda it: f"{it.username}@example.com")
    password = Password("password")


class FeatureBudgetFactory(DjangoModelFactory[FeatureBudget]):
    """One budget a name: asking for the same name again gives the same row."""

    class Meta:
        model = FeatureBudget
        django_get_or_create = ("name",)

    name = Sequence(lambda n: f"feature-{n}")


class DowngradeRungFactory(DjangoModelFactory[DowngradeRung]):
    class Meta:
        model = DowngradeRung

    budget = SubFactory(FeatureBudgetFactory)
    at_percent = 80
    model = HAIKU


class LimitOverrideFactory(DjangoModelFactory[LimitOverride]):
    class Meta:
        model = LimitOverride

    budget = SubFactory(FeatureBudgetFactory)
    period = LimitOverride.Period.MONTH
    amount_usd = 200
    until = LazyFunction(lambda: periods.now() + timedelta(days=1))
    reason = "launch week"


class UserQuotaFactory(DjangoModelFactory[UserQuota]):
    class Meta:
        model = UserQuota

    user = SubFactory(UserFactory)
    daily_calls = 100


def _cost(call: Any) -> int | None:
    if call.status == CallLog.Status.RESERVED:
        return None
    return 0 if call.status in {CallLog.Status.RELEASED, CallLog.Status.CACHED} else 1_234_567


class CallLogFactory(DjangoModelFactory[CallLog]):
    """A settled call, unless ``status`` says otherwise; the cost follows the status."""

    class Meta:
        model = CallLog

    call_id = LazyFunction(uuid.uuid4)
    feature = SubFactory(FeatureBudgetFactory, name="chat")
    user = None
    status = CallLog.Status.SETTLED
    requested_model = SONNET
    model = SelfAttribute("requested_model")
    input_tokens = 100
    output_tokens = 50
    max_tokens = 1024
    reserved_nanousd = 2_000_000
    cost_nanousd = LazyAttribute(_cost)
    reserved_at = LazyFunction(periods.now)
    day = LazyAttribute(lambda it: periods.day(it.reserved_at, conf.TIME_ZONE).first_day)
    deadline = LazyAttribute(lambda it: it.reserved_at + timedelta(minutes=10))
    settled_at = LazyAttribute(
        lambda it: None if it.status == CallLog.Status.RESERVED else it.reserved_at
    )
    latency_ms = LazyAttribute(lambda it: None if it.status == CallLog.Status.RESERVED else 850)
    request_id = Sequence(lambda n: f"req_{n:024d}")

    @classmethod
    def _create(cls, model_class: type[CallLog], *args: Any, **kwargs: Any) -> CallLog:
        call: CallLog = super()._create(model_class, *args, **kwargs)
        mark(call)
        return call


def mark(call: CallLog) -> None:
    """Say that a call's sums have changed, as the ledger does where it books one."""
    TotalMark.objects.create(
        reserved_at=call.reserved_at, day=call.day, user_id=call.user_id, subject=call.subject
    )


class SpendWindowFactory(DjangoModelFactory[SpendWindow]):
    class Meta:
        model = SpendWindow

    scope = "feature:chat"
    period = SpendWindow.Period.DAY
    first_day = LazyFunction(lambda: periods.day(periods.now(), conf.TIME_ZONE).first_day)


class ModelRateFactory(DjangoModelFactory[ModelRate]):
    class Meta:
        model = ModelRate

    model = HAIKU
    valid_from = LazyFunction(periods.now)
    input_usd = 1
    output_usd = 5
