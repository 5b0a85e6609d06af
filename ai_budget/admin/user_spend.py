"""The page of one caller: what was spent, what is allowed and why, and the last calls.

Of a user it also offers to raise, lower and block. That writes the user's own quota: each change
is confirmed on a page of its own, asks for the permission to change quotas, and is kept in the
history of the quota.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import messages
from django.contrib.admin import AdminSite
from django.contrib.admin.utils import label_for_field, quote, unquote
from django.core.exceptions import PermissionDenied
from django.db import IntegrityError, router, transaction
from django.db.models import F, Model
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.functional import Promise
from django.utils.http import urlencode
from django.utils.safestring import SafeString
from django.utils.text import capfirst
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from ai_budget import money, periods
from ai_budget.admin.amounts import EMPTY, UsdInput, count, milliseconds, price
from ai_budget.admin.batch_decisions import moment
from ai_budget.admin.history import change
from ai_budget.conf import conf
from ai_budget.models import CallLog, DayTotal, UserQuota
from ai_budget.review import charts
from ai_budget.review.arithmetic import percent
from ai_budget.review.callers import (
    DAYS,
    Caller,
    CallerSpend,
    LimitInForce,
    Whose,
    has_called,
    in_force,
    last_calls,
    limits_of,
    quotas_of,
    spend_of,
    user_by_key,
)
from ai_budget.review.names import deleted_user
from ai_budget.review.spenders import CallerFigures
from ai_budget.values import SITE, Measure

if TYPE_CHECKING:
    _QuotaForm = forms.ModelForm[UserQuota]
else:
    _QuotaForm = forms.ModelForm

SEE_SPEND = "ai_budget.view_spend"
"""The permission to see what was spent."""

SETTABLE = ("daily_calls", "daily_limit_usd", "monthly_limit_usd")
"""What is raised, lowered and blocked here; the quota's own page has the rest."""

_MOST_CALLS = 20


def user_url(admin_site: AdminSite, user_id: Any) -> str:
    """Return the address of a user's page, by primary key, whether or not the user exists."""
    return _url(admin_site, "user_spend", quote(str(user_id)))


def subject_url(admin_site: AdminSite, subject: str) -> str:
    """Return the address of a subject's page."""
    return _url(admin_site, "subject_spend", quote(subject))


def may_see_spend(request: HttpRequest, admin_site: AdminSite) -> bool:
    """Whether there are these pages in a site, and whoever asks may see them."""
    return admin_site.is_registered(DayTotal) and request.user.has_perm(SEE_SPEND)


def _url(admin_site: AdminSite, page: str, *args: Any) -> str:
    return reverse(f"admin:ai_budget_{page}", args=args, current_app=admin_site.name)


# Changes -----------------------------------------------------------------------------------------

Values = Mapping[str, int | Decimal | None]
"""What a user's own quota says, by field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """One way to change a user's own quota."""

    label: str | Promise
    title: str | Promise
    explanation: str | Promise
    button: str | Promise


_CHANGES: Mapping[str, _Change] = {
    "set": _Change(
        label=gettext_lazy("Raise or lower"),
        title=gettext_lazy("Raise or lower the limits of %(user)s"),
        explanation=gettext_lazy(
            "These are the user's own, for all features together. A field that is left empty "
            "inherits: what holds now is shown in it. 0 lets nothing through."
        ),
        button=gettext_lazy("Save"),
    ),
    "double": _Change(
        label=gettext_lazy("Double"),
        title=gettext_lazy("Double the limits of %(user)s?"),
        explanation=gettext_lazy("What holds now is doubled, as the user's own quota."),
        button=gettext_lazy("Yes, double them"),
    ),
    "halve": _Change(
        label=gettext_lazy("Halve"),
        title=gettext_lazy("Halve the limits of %(user)s?"),
        explanation=gettext_lazy("What holds now is halved, as the user's own quota."),
        button=gettext_lazy("Yes, halve them"),
    ),
    "block": _Change(
        label=gettext_lazy("Block"),
        title=gettext_lazy("Block %(user)s?"),
        explanation=gettext_lazy(
            "Every paid call is refused from the next one on, in every feature. Calls that are in "
            "flight end as they would."
        ),
        button=gettext_lazy("Yes, block"),
    ),
    "unblock": _Change(
        label=gettext_lazy("Unblock"),
        title=gettext_lazy("Unblock %(user)s?"),
        explanation=gettext_lazy(
            "The zeros of the user's own quota are taken away, so that what is inherited holds "
            "again."
        ),
        button=gettext_lazy("Yes, unblock"),
    ),
}


def wanted_by(name: str, limits: Sequence[LimitInForce]) -> Values:
    """Return what a change makes of the user's own quota: the fields that it sets, and to what.

    ``limits`` are those in force for all features together. What has no limit is not doubled, and
    halving never comes to 0, which would block.
    """
    wanted: dict[str, int | Decimal | None] = {}
    for limit in limits:
        match name, limit.amount:
            case "unblock", 0:
                if limit.whose is Whose.OWN:
                    wanted[limit.name] = None
            case "double", int(amount) if 0 < amount * 2 <= _most(limit):
                wanted[limit.name] = _typed(limit, amount * 2)
            case "halve", int(amount) if amount > 1:
                wanted[limit.name] = _typed(limit, (amount + 1) // 2)
            case "block", amount if amount != 0:
                wanted[limit.name] = _typed(limit, 0)
    return wanted


def _most(limit: LimitInForce) -> int:
    """Return the most that every database can store of it."""
    return 2**31 - 1 if limit.is_calls else money.MAX_NANOUSD


def _typed(limit: LimitInForce, amount: int) -> int | Decimal:
    """Return an amount as the quota has it: calls, or dollars."""
    return amount if limit.is_calls else money.to_usd(amount)


class _ChangedMeanwhile(Exception):
    """The limits are not those that the page showed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Own:
    """A user's own quota for all features together, beside all others, at one moment."""

    user: Any
    quotas: Sequence[UserQuota]

    @classmethod
    def of(cls, user: Any) -> _Own:
        quotas = quotas_of(Caller(user_id=user.pk), user=user, using=_alias())
        return cls(user=user, quotas=quotas)

    @property
    def row(self) -> UserQuota | None:
        """The row; None where the user has none."""
        own = (quota for quota in self.quotas if quota.user_id is not None)
        return next((quota for quota in own if quota.feature_id is None), None)

    @property
    def limits(self) -> list[LimitInForce]:
        """What is in force for all features together, of what can be set here."""
        limits = in_force(Caller(user_id=self.user.pk), self.quotas, at=periods.now())
        return [limit for limit in limits if _is_settable(limit)]

    @property
    def token(self) -> str:
        """A text that changes with what is in force, or with where it comes from."""
        return ";".join(
            f"{it.amount}/{None if it.quota is None else it.quota.pk}" for it in self.limits
        )

    def changed(self, values: Values) -> _Own:
        """Return what it would be with these values."""
        row = UserQuota(user=self.user) if self.row is None else copy(self.row)
        for name, value in values.items():
            setattr(row, name, value)
        return _Own(user=self.user, quotas=[*(it for it in self.quotas if it != self.row), row])


def _is_settable(limit: LimitInForce) -> bool:
    return limit.feature == SITE and limit.name in SETTABLE


def _alias() -> str:
    return router.db_for_write(UserQuota)


class _LimitsForm(_QuotaForm):
    """The user's own limits. What holds now stands in the fields that inherit it."""

    class Meta:
        model = UserQuota
        fields = SETTABLE
        widgets = {"daily_limit_usd": UsdInput, "monthly_limit_usd": UsdInput}

    def __init__(self, data: Any, *, own: _Own) -> None:
        super().__init__(data, instance=own.changed({}).row)
        for limit in own.limits:
            self.fields[limit.name].widget.attrs["placeholder"] = _amount(limit)

    @property
    def values(self) -> Values:
        return {name: self.cleaned_data[name] for name in SETTABLE}


# Pages -------------------------------------------------------------------------------------------


class CallerPages:
    """The pages of users and subjects in one admin site, below the address of whatever has them.

    Who may see what was spent may see them. The calls are for those who may see calls, and the
    changes for those who may change quotas; that a subject has a quota of its own cannot be said.
    """

    def __init__(self, admin_site: AdminSite) -> None:
        self.admin_site = admin_site

    def urls(self) -> list[URLPattern]:
        """Return the addresses, to come before all that take any text."""
        pages: list[tuple[str, Callable[..., HttpResponse], str]] = [
            ("users/<path:user_id>/", self.user_page, "user_spend"),
            ("subjects/<path:subject>/", self.subject_page, "subject_spend"),
            ("quotas/<slug:name>/<path:user_id>/", self.quota_page, "user_quota"),
        ]
        return [
            path(route, self.admin_site.admin_view(view), name=f"ai_budget_{name}")
            for route, view, name in pages
        ]

    def user_page(self, request: HttpRequest, user_id: str) -> HttpResponse:
        self._ensure_may_see(request)
        key, user = _user(user_id)
        caller = Caller(user_id=key)
        if user is None and not has_called(caller):
            raise Http404
        return self._page(
            request,
            caller,
            user=user,
            title=deleted_user(key) if user is None else user.get_username(),
            subtitle=_("Spend of a user"),
        )

    def subject_page(self, request: HttpRequest, subject: str) -> HttpResponse:
        self._ensure_may_see(request)
        name = unquote(subject)
        caller = Caller(subject=name)
        # No database that is told apart by its texts has one with this in it.
        if "\0" in name or not has_called(caller):
            raise Http404
        return self._page(request, caller, user=None, title=name, subtitle=_("Spend of a subject"))

    def quota_page(self, request: HttpRequest, name: str, user_id: str) -> HttpResponse:
        self._ensure_may_see(request)
        _key, user = _user(user_id)
        if user is None or name not in _CHANGES:
            raise Http404
        own = _Own.of(user)
        if not self._may_change(request, own.row):
            raise PermissionDenied
        back = user_url(self.admin_site, user.pk)
        if name == "set":
            return self._set(request, own, back)
        if request.method == "POST" and self._scale(request, own, name):
            return HttpResponseRedirect(back)
        own = _Own.of(user)
        values = wanted_by(name, own.limits)
        if not values:
            self._tell(request, _("There is nothing to change."), messages.WARNING)
            return HttpResponseRedirect(back)
        return self._ask(request, name, own, lines=_differences(own, own.changed(values)))

    # Changing

    def _set(self, request: HttpRequest, own: _Own, back: str) -> HttpResponse:
        posted = request.POST if request.method == "POST" else None
        form = _LimitsForm(posted, own=own)
        changed = posted is not None and posted.get("seen") != own.token
        if not changed and form.is_valid():
            try:
                self._write(request, own.user, lambda now: form.values)
            except _ChangedMeanwhile:
                changed, own = True, _Own.of(own.user)
            else:
                return HttpResponseRedirect(back)
        if changed:
            form = _LimitsForm(posted, own=own)
            form.add_error(None, _changed_meanwhile(own))
        return self._ask(request, "set", own, form=form)

    def _scale(self, request: HttpRequest, own: _Own, name: str) -> bool:
        """Carry a change out that needs no more than a yes; say why it could not be."""
        try:
            self._write(request, own.user, lambda now: wanted_by(name, now.limits))
        except _ChangedMeanwhile:
            self._tell(request, _changed_meanwhile(_Own.of(own.user)), messages.ERROR)
            return False
        return True

    def _write(self, request: HttpRequest, user: Any, decide: Callable[[_Own], Values]) -> None:
        """Change the user's own quota, and keep it in its history.

        Of two who change it at once, the second is told: ``_ChangedMeanwhile``.
        """
        try:
            with transaction.atomic(using=_alias()):
                # Locks the row and, on SQLite, the database; a row that is not there yet is
                # created by one alone.
                key = UserQuota(user=user).compute_key()
                rows = UserQuota.objects.using(_alias()).filter(key=key)
                rows.update(priority=F("priority"))
                own = _Own.of(user)
                if request.POST.get("seen") != own.token:
                    raise _ChangedMeanwhile
                self._save(request, own, decide(own))
        except IntegrityError:
            raise _ChangedMeanwhile from None

    def _save(self, request: HttpRequest, own: _Own, values: Values) -> None:
        before = own.row
        if not self._may_change(request, before):
            raise PermissionDenied
        quota = own.changed(values).row
        changed = [name for name in values if _value(before, name) != _value(quota, name)]
        if quota is None or not changed:
            self._tell(request, _("There is nothing to change."), messages.INFO)
            return
        quota.save(using=_alias())
        fields = [
            change(_field_label(name), _value(before, name), _value(quota, name))
            for name in changed
        ]
        said = [{"changed": {"fields": fields}}]
        quota_admin = self.admin_site.get_model_admin(UserQuota)
        if before is None:
            quota_admin.log_addition(request, quota, [{"added": {}}, *said])
        else:
            quota_admin.log_change(request, quota, said)
        text = _("The limits of %(user)s are changed.") % {"user": own.user.get_username()}
        self._tell(request, text, messages.SUCCESS)

    def _ask(
        self,
        request: HttpRequest,
        name: str,
        own: _Own,
        *,
        lines: Sequence[str] = (),
        form: forms.BaseForm | None = None,
    ) -> HttpResponse:
        chosen = _CHANGES[name]
        return self._response(
            request,
            "admin/ai_budget/confirm.html",
            title=str(chosen.title) % {"user": own.user.get_username()},
            lines=[chosen.explanation, *lines],
            hidden=[("seen", own.token)],
            form=form,
            button=chosen.button,
            back=user_url(self.admin_site, own.user.pk),
            opts=UserQuota._meta,
        )

    # Showing

    def _page(
        self, request: HttpRequest, caller: Caller, *, user: Any, **page: Any
    ) -> HttpResponse:
        quotas = quotas_of(caller, user=user)
        limits = limits_of(caller, quotas)
        spend = spend_of(caller)
        calls = self._may_view(request, CallLog)
        link = partial(self._calls_url, caller) if calls else _no_link
        return self._response(
            request,
            "admin/ai_budget/user_spend.html",
            opts=DayTotal._meta,
            **page,
            blocked=any(it.amount == 0 for it in limits if _is_settable(it)),
            calls=self._last_calls(caller) if calls else None,
            calls_url=link(reserved="all"),
            changes=[] if user is None else self._offered(request, _Own(user=user, quotas=quotas)),
            limits=[
                (
                    "" if feature == SITE else feature,
                    [self._limit(request, it) for it in limits if it.feature == feature],
                )
                for feature in dict.fromkeys(it.feature for it in limits)
            ],
            account_url=self._account_url(request, user),
            spend_url=_url(self.admin_site, "spend"),
            zone=str(conf.TIME_ZONE),
            **_figures(limits, spend, link),
        )

    def _offered(self, request: HttpRequest, own: _Own) -> list[tuple[str, str | Promise]]:
        """Return the changes that would change anything, to whoever may."""
        if not self._may_change(request, own.row):
            return []
        return [
            (_url(self.admin_site, "user_quota", name, quote(str(own.user.pk))), it.label)
            for name, it in _CHANGES.items()
            if name == "set" or wanted_by(name, own.limits)
        ]

    def _limit(self, request: HttpRequest, limit: LimitInForce) -> dict[str, Any]:
        source = ""
        if limit.quota is not None and self._may_view(request, UserQuota):
            source = _url(self.admin_site, "userquota_change", limit.quota.pk)
        return {
            "label": _limit_label(limit),
            "amount": _amount(limit),
            "bar": _bar(limit),
            "taken": "" if limit.period is None else _quantity(limit, limit.used),
            "held": _quantity(limit, limit.held) if limit.held else "",
            "left": "" if limit.left is None or not limit.period else _left(limit),
            "source": _source(limit),
            "source_url": source,
            "resets": "" if limit.resets_at is None else moment(limit.resets_at),
        }

    def _account_url(self, request: HttpRequest, user: Any) -> str:
        if user is None or not self._may_view(request, type(user)):
            return ""
        meta = user._meta
        name = f"admin:{meta.app_label}_{meta.model_name}_change"
        return reverse(name, args=[quote(user.pk)], current_app=self.admin_site.name)

    def _last_calls(self, caller: Caller) -> list[dict[str, Any]]:
        return [
            {
                "url": _url(self.admin_site, "calllog_change", call.pk),
                "time": moment(call.reserved_at),
                "feature": call.feature_id,
                "status": call.get_status_display(),
                "model": call.model,
                "asked_for": call.requested_model if call.downgraded else "",
                "tokens": count(call.output_tokens),
                "cost": _cost(call),
                "latency": milliseconds(call.latency_ms),
            }
            for call in last_calls(caller, most=_MOST_CALLS)
        ]

    def _calls_url(self, caller: Caller, **query: Any) -> str:
        """Return the address of the caller's calls, of those that the query leaves."""
        whose = {"subject": caller.subject} if caller.user_id is None else {"user": caller.user_id}
        address = _url(self.admin_site, "calllog_changelist")
        return f"{address}?{urlencode({**whose, **query})}"

    def _response(self, request: HttpRequest, template: str, **page: Any) -> HttpResponse:
        context = {**self.admin_site.each_context(request), "media": _MEDIA, **page}
        request.current_app = self.admin_site.name
        return TemplateResponse(request, template, context)

    def _tell(self, request: HttpRequest, text: str, level: int) -> None:
        messages.add_message(request, level, text)

    # Permissions

    def _ensure_may_see(self, request: HttpRequest) -> None:
        if not may_see_spend(request, self.admin_site):
            raise PermissionDenied

    def _may_view(self, request: HttpRequest, model: type[Model]) -> bool:
        if not self.admin_site.is_registered(model):
            return False
        return self.admin_site.get_model_admin(model).has_view_permission(request)

    def _may_change(self, request: HttpRequest, own: UserQuota | None) -> bool:
        if not self.admin_site.is_registered(UserQuota):
            return False
        quota_admin = self.admin_site.get_model_admin(UserQuota)
        if own is None:
            return quota_admin.has_add_permission(request)
        return quota_admin.has_change_permission(request, own)


_MEDIA = forms.Media(css={"all": ["ai_budget/admin.css", "ai_budget/user.css"]})


def _user(text: str) -> tuple[Any, Any]:
    """Return the primary key that an address has, and the user, who is None where gone."""
    try:
        return user_by_key(unquote(text))
    except LookupError:
        raise Http404 from None


def _value(quota: UserQuota | None, name: str) -> Any:
    return None if quota is None else getattr(quota, name)


# Figures ---------------------------------------------------------------------------------------

Link = Callable[..., str]
"""Returns the address of some of the caller's calls; empty for who may not see calls."""


def _no_link(**query: Any) -> str:
    return ""


def _figures(limits: Sequence[LimitInForce], spend: CallerSpend, link: Link) -> dict[str, Any]:
    """Return what was spent, as the template shows it."""
    now = {it.name: it.balance for it in limits if it.feature == SITE}
    day, month = now["daily_limit_usd"], now["monthly_limit_usd"]
    total, first = spend.total, spend.days[0].day
    since = first if spend.purged_day is None else spend.purged_day
    days = [it.day for it in spend.days]
    amounts = tuple(it.figures.spend_nanousd for it in spend.days)
    series = charts.Series(label=_("Spend"), hue=1, amounts=amounts)
    return {
        "tiles": [
            (_("Today"), _usd(day.spent_nanousd), _calls_made(day.calls)),
            (_("This month"), _usd(month.spent_nanousd), _calls_made(month.calls)),
            (
                _("Last %(days)s days") % {"days": DAYS},
                _usd(total.spend_nanousd),
                _calls_made(total.calls),
            ),
            (_("Saved in these days"), _usd(total.saved_nanousd), ""),
            (_("Refused in these days"), count(spend.refused), ""),
        ],
        "chart": charts.stacked_bars(
            days,
            [series],
            name="ai-budget-days",
            title=_("Spend by day, the last %(days)s days") % {"days": DAYS},
        ),
        "by_day": [
            {
                "day": it.day,
                "url": link(**_of_days(it.day, it.day)),
                "refused": count(it.refused),
                **_shown(it.figures),
            }
            for it in reversed(spend.days)
        ],
        "by_month": [
            {
                "month": month,
                "url": link(**_of_days(month, periods.next_month(month) - timedelta(days=1))),
                **_shown(figures),
            }
            for month, figures in _since_first_call(spend.months)
        ],
        "by_feature": _shared(spend.by_feature, lambda name: link(since=since, feature=name)),
        "by_model": _shared(spend.by_model, lambda name: link(since=since, model=name)),
        "since": since,
        "purged_day": spend.purged_day,
    }


def _since_first_call(
    months: Sequence[tuple[date, CallerFigures]],
) -> Sequence[tuple[date, CallerFigures]]:
    """Return this month and those before it, up to the first in which anything was called."""
    called = [number for number, (_month, figures) in enumerate(months) if figures.attempts]
    return months[: max(called, default=0) + 1]


def _of_days(first: date, last: date) -> dict[str, date]:
    return {"since": first, "until": last + timedelta(days=1)}


def _shared(
    rows: Sequence[tuple[str, CallerFigures]], link: Callable[[str], str]
) -> list[dict[str, Any]]:
    """Return rows with the share that each has of all of them."""
    whole = sum(figures.spend_nanousd for _name, figures in rows)
    return [
        {
            "name": name,
            "url": link(name),
            "share": percent(figures.spend_nanousd, whole),
            "bar": charts.share_bar(figures.spend_nanousd, whole),
            **_shown(figures),
        }
        for name, figures in rows
    ]


def _shown(figures: CallerFigures) -> dict[str, str]:
    return {
        "calls": count(figures.calls),
        "spend": _usd(figures.spend_nanousd),
        "saved": _usd(figures.saved_nanousd),
    }


def _calls_made(number: int) -> str:
    return ngettext("%(number)s call", "%(number)s calls", number) % {"number": count(number)}


# Words -------------------------------------------------------------------------------------------


def _field_label(name: str) -> str:
    return capfirst(str(label_for_field(name, UserQuota)))


def _changed_meanwhile(own: _Own) -> str:
    now = ", ".join(f"{_limit_label(it)}: {_amount(it)}" for it in own.limits)
    return _(
        "Somebody has changed the limits since this page was shown, so nothing was done. What "
        "holds now: %(limits)s."
    ) % {"limits": now}


def _differences(before: _Own, after: _Own) -> list[str]:
    return [
        f"{_limit_label(old)}: {_amount(old)} → {_amount(new)}"
        for old, new in zip(before.limits, after.limits, strict=True)
        if old.amount != new.amount
    ]


def _limit_label(limit: LimitInForce) -> str:
    return str(_LIMIT_LABELS[limit.name])


_LIMIT_LABELS: Mapping[str, str | Promise] = {
    "daily_calls": gettext_lazy("Calls a day"),
    "daily_limit_usd": gettext_lazy("Dollars a day"),
    "monthly_limit_usd": gettext_lazy("Dollars a month"),
    "requests_per_minute": gettext_lazy("Requests a minute"),
    "tokens_per_minute": gettext_lazy("Tokens a minute"),
}


def _amount(limit: LimitInForce) -> str:
    """Return a limit as someone would write it."""
    if limit.amount is None:
        return _("no limit")
    if limit.measure is Measure.NANOUSD:
        return price(money.to_usd(limit.amount))
    return count(limit.amount)


def _quantity(limit: LimitInForce, amount: int) -> str:
    """Return what is taken of a limit, or left of it."""
    return _usd(amount) if limit.measure is Measure.NANOUSD else count(amount)


def _left(limit: LimitInForce) -> str:
    return _quantity(limit, limit.left or 0)


def _usd(nanousd: int) -> str:
    # One caller's day is often a matter of cents and their parts.
    return money.format_usd(nanousd, decimals=4 if nanousd else 2)


def _source(limit: LimitInForce) -> str:
    match limit.whose:
        case Whose.OWN:
            return _("own quota")
        case Whose.GROUP:
            group = None if limit.quota is None else limit.quota.group
            return _("group %(group)s") % {"group": group}
        case Whose.EVERYONE:
            return _("everyone’s default")
    return EMPTY


def _bar(limit: LimitInForce) -> SafeString:
    if limit.period is None or limit.amount is None:
        return SafeString("")
    figures = {
        "used": _quantity(limit, limit.used),
        "held": _quantity(limit, limit.held),
        "limit": _amount(limit),
    }
    title = (
        _("%(used)s of %(limit)s")
        if limit.is_calls
        else _("%(used)s spent, %(held)s held; the limit is %(limit)s")
    )
    return charts.budget_bar(limit.used, held=limit.held, limit=limit.amount, title=title % figures)


def _cost(call: CallLog) -> str:
    if call.cost_nanousd is not None:
        return money.format_usd(call.cost_nanousd, decimals=6)
    held = money.format_usd(call.reserved_nanousd, decimals=6)
    return _("%(amount)s held") % {"amount": held}
