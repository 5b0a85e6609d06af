"""What may be spent: budgets of features, their ladder and overrides, and quotas of users."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from ai_budget import money
from ai_budget.models.fields import UsdField
from ai_budget.scopes import SITE

if TYPE_CHECKING:
    _CharField = models.CharField[str, str]
else:
    _CharField = models.CharField

NAME_PATTERN = r"^(\*|[-a-zA-Z0-9_.]+)\Z"


class CacheScope(models.TextChoices):
    OFF = "off", _("Off")
    PRIVATE = "private", _("Private: per user")
    SHARED = "shared", _("Shared between all users")


class PromptCache(models.TextChoices):
    OFF = "off", _("Off")
    FIVE_MINUTES = "5m", _("5 minutes")
    ONE_HOUR = "1h", _("1 hour")
    AUTO = "auto", _("Automatic")


class Routing(models.TextChoices):
    OFF = "off", _("Off")
    LENGTH = "length", _("By length")
    CLASSIFIER = "classifier", _("By a classifier")


class FeatureBudget(models.Model):
    """What one feature, a category of features, or the whole site ("*") may spend."""

    name = models.CharField(
        _("name"),
        max_length=64,
        unique=True,
        validators=[
            RegexValidator(
                re.compile(NAME_PATTERN),
                _("Use letters, digits, hyphens, underscores and dots, or * for the whole site."),
            )
        ],
        help_text=_("The name that code uses, or * for the whole site. It cannot be changed."),
    )
    parent = models.ForeignKey(
        "self",
        verbose_name=_("category"),
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="children",
        help_text=_("A budget that spans several features; calls count against both."),
    )
    enabled = models.BooleanField(
        _("enabled"), default=True, help_text=_("Off pauses the feature: its calls are refused.")
    )
    enforce = models.BooleanField(
        _("enforce"),
        default=True,
        help_text=_("Off is shadow mode: limits are watched and recorded, and refuse nothing."),
    )
    daily_limit_usd = UsdField(
        _("daily limit ($)"), null=True, blank=True, help_text=_("Empty: none. 0: nothing.")
    )
    monthly_limit_usd = UsdField(
        _("monthly limit ($)"), null=True, blank=True, help_text=_("Empty: none. 0: nothing.")
    )
    monthly_plan_usd = UsdField(
        _("monthly plan ($)"),
        null=True,
        blank=True,
        help_text=_("What you expect to spend; reports compare with it, and it refuses nothing."),
    )
    plan_share = models.PositiveSmallIntegerField(
        _("plan share (%)"),
        null=True,
        blank=True,
        validators=[MaxValueValidator(100)],
        help_text=_("The plan as a share of the category's, where no amount is given."),
    )
    requests_per_minute = models.PositiveIntegerField(_("requests a minute"), null=True, blank=True)
    tokens_per_minute = models.PositiveBigIntegerField(_("tokens a minute"), null=True, blank=True)
    model = models.CharField(
        _("model"),
        max_length=128,
        blank=True,
        help_text=_("Empty: the site's default model."),
    )
    max_tokens = models.PositiveIntegerField(
        _("most output tokens"),
        null=True,
        blank=True,
        validators=[MinValueValidator(1)],
        help_text=_("The default for every call, and the most that any may ask for."),
    )
    cache_scope = models.CharField(
        _("response cache"),
        max_length=8,
        choices=CacheScope,
        default=CacheScope.OFF,
        help_text=_(
            "A question that was asked before is answered for nothing. Private: each user has "
            "answers of their own, and calls without a user none. Shared: everybody gets the same "
            "answer, so never for prompts with a user's data. Off leaves it to the code."
        ),
    )
    cache_ttl = models.PositiveIntegerField(
        _("cache lifetime (seconds)"),
        default=3600,
        help_text=_("The longer, the more calls are free, and the older an answer may be."),
    )
    cache_counts = models.BooleanField(
        _("cached answers count as calls"),
        default=False,
        help_text=_("On: an answer from the cache takes a call from a user's quota."),
    )
    cache_version = models.PositiveIntegerField(
        _("version of the cached answers"),
        default=0,
        help_text=_(
            "Answers of another version are not found. Raise it when a prompt's meaning changes."
        ),
    )
    prompt_cache = models.CharField(
        _("prompt cache"),
        max_length=4,
        choices=PromptCache,
        default=PromptCache.OFF,
        help_text=_(
            "The API keeps the beginning of a prompt: reading it again costs a tenth or less, "
            "keeping it a quarter more (5 minutes) or twice the price (1 hour). Automatic keeps "
            "only what is seen to come again, and costs at most 1 % more than none."
        ),
    )
    routing = models.CharField(
        _("routing"),
        max_length=10,
        choices=Routing,
        default=Routing.OFF,
        help_text=_(
            "Sends what a cheaper model can answer to a cheaper model, never to a dearer one. By "
            "length costs nothing; a classifier is a small call of its own before the call."
        ),
    )
    allow_unbounded = models.BooleanField(
        _("allow unbounded calls"),
        default=False,
        help_text=_("Let calls through whose most cost cannot be told. They may pass every limit."),
    )
    owner_email = models.EmailField(_("owner's e-mail"), blank=True)

    class Meta:
        verbose_name = _("feature budget")
        verbose_name_plural = _("feature budgets")
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(
                condition=Q(daily_limit_usd__gte=0) | Q(daily_limit_usd__isnull=True),
                name="ai_budget_feature_daily_not_negative",
            ),
            models.CheckConstraint(
                condition=Q(monthly_limit_usd__gte=0) | Q(monthly_limit_usd__isnull=True),
                name="ai_budget_feature_monthly_not_negative",
            ),
            models.CheckConstraint(
                condition=Q(monthly_plan_usd__gte=0) | Q(monthly_plan_usd__isnull=True),
                name="ai_budget_feature_plan_not_negative",
            ),
            models.CheckConstraint(
                condition=Q(plan_share__lte=100) | Q(plan_share__isnull=True),
                name="ai_budget_feature_plan_share_percent",
            ),
            models.CheckConstraint(
                condition=Q(max_tokens__gte=1) | Q(max_tokens__isnull=True),
                name="ai_budget_feature_max_tokens_positive",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_site(self) -> bool:
        return self.name == SITE

    def clean(self) -> None:
        """Keep the tree two levels deep and a name what its balances are kept under."""
        if self.pk is not None:
            before = type(self).objects.filter(pk=self.pk).values_list("name", flat=True).first()
            if before is not None and before != self.name:
                raise ValidationError({"name": _("A budget's calls are kept under its name.")})
        if self.parent is None:
            return
        if self.is_site:
            raise ValidationError({"parent": _("The whole site has no category.")})
        if self.parent.is_site:
            raise ValidationError({"parent": _("Every feature counts against * already.")})
        if self.parent_id == self.pk or self.parent.parent_id is not None:
            raise ValidationError({"parent": _("A category cannot be in a category.")})
        if self.pk is not None and self.children.exists():
            raise ValidationError({"parent": _("A category cannot be in a category.")})


class DowngradeRung(models.Model):
    """From this share of a limit on, a cheaper model answers."""

    budget = models.ForeignKey(
        FeatureBudget, verbose_name=_("budget"), on_delete=models.CASCADE, related_name="rungs"
    )
    at_percent = models.PositiveSmallIntegerField(
        _("at percent"),
        validators=[MinValueValidator(1), MaxValueValidator(99)],
        help_text=_("Share of the limit that is spent or held, in percent."),
    )
    model = models.CharField(_("model"), max_length=128)

    class Meta:
        verbose_name = _("downgrade rung")
        verbose_name_plural = _("downgrade rungs")
        ordering = ["budget", "at_percent"]
        constraints = [
            models.UniqueConstraint(
                fields=["budget", "at_percent"], name="ai_budget_rung_once_a_percent"
            ),
            models.CheckConstraint(
                condition=Q(at_percent__gte=1, at_percent__lte=99),
                name="ai_budget_rung_percent",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.at_percent} %: {self.model}"


class LimitOverride(models.Model):
    """A temporary raise of one limit of a budget. The highest that is in force wins."""

    class Period(models.TextChoices):
        DAY = "day", _("Daily limit")
        MONTH = "month", _("Monthly limit")

    budget = models.ForeignKey(
        FeatureBudget, verbose_name=_("budget"), on_delete=models.CASCADE, related_name="overrides"
    )
    period = models.CharField(_("limit"), max_length=5, choices=Period)
    amount_usd = UsdField(_("raised to ($)"))
    until = models.DateTimeField(_("until"))
    reason = models.CharField(_("reason"), max_length=200)
    created_by = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("created by"),
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        editable=False,
        related_name="+",
    )
    created_at = models.DateTimeField(_("created at"), auto_now_add=True)

    class Meta:
        verbose_name = _("limit override")
        verbose_name_plural = _("limit overrides")
        ordering = ["budget", "until"]
        constraints = [
            models.CheckConstraint(
                condition=Q(amount_usd__gte=0), name="ai_budget_override_not_negative"
            ),
        ]

    def __str__(self) -> str:
        amount = money.format_usd(money.parse_usd(self.amount_usd or 0))
        return f"{self.get_period_display()}: {amount}"


class QuotaKeyField(_CharField):
    """Whom and what a quota is for, as one text, so that every database can keep it unique.

    A unique constraint over nullable columns lets two default quotas through, and the
    conditional kind does not exist on MySQL and MariaDB.
    """

    def pre_save(self, model_instance: models.Model, add: bool) -> str:
        key = cast(UserQuota, model_instance).compute_key()
        setattr(model_instance, self.attname, key)
        return key


class UserQuota(models.Model):
    """What a user, the members of a group, or everyone by default may use.

    The most specific row wins, field by field: an empty field inherits, 0 blocks, and in a
    row marked unlimited an empty field is no limit at all.
    """

    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("user"),
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="+",
        help_text=_("Empty, with no group: everyone's default."),
    )
    group = models.ForeignKey(
        "auth.Group",
        verbose_name=_("group"),
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="+",
    )
    feature = models.ForeignKey(
        FeatureBudget,
        verbose_name=_("feature"),
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="quotas",
        help_text=_("Empty: all features together."),
    )
    priority = models.PositiveSmallIntegerField(
        _("priority"), default=100, help_text=_("Of a member's groups the lowest wins.")
    )
    unlimited = models.BooleanField(
        _("unlimited"),
        default=False,
        help_text=_("Empty fields mean no limit, rather than the next wider quota's."),
    )
    daily_calls = models.PositiveIntegerField(_("calls a day"), null=True, blank=True)
    daily_limit_usd = UsdField(_("daily limit ($)"), null=True, blank=True)
    monthly_limit_usd = UsdField(_("monthly limit ($)"), null=True, blank=True)
    requests_per_minute = models.PositiveIntegerField(_("requests a minute"), null=True, blank=True)
    tokens_per_minute = models.PositiveBigIntegerField(_("tokens a minute"), null=True, blank=True)
    key = QuotaKeyField(max_length=128, unique=True, editable=False)

    class Meta:
        verbose_name = _("user quota")
        verbose_name_plural = _("user quotas")
        ordering = ["key"]
        constraints = [
            models.CheckConstraint(
                condition=Q(user__isnull=True) | Q(group__isnull=True),
                name="ai_budget_quota_user_or_group",
            ),
            models.CheckConstraint(
                condition=Q(daily_limit_usd__gte=0) | Q(daily_limit_usd__isnull=True),
                name="ai_budget_quota_daily_not_negative",
            ),
            models.CheckConstraint(
                condition=Q(monthly_limit_usd__gte=0) | Q(monthly_limit_usd__isnull=True),
                name="ai_budget_quota_monthly_not_negative",
            ),
        ]

    def __str__(self) -> str:
        whom = self.user or self.group or _("everyone")
        return f"{whom}, {self.feature}" if self.feature else str(whom)

    def compute_key(self) -> str:
        """Name whom and what the quota is for: unique among quotas."""
        if self.user_id is not None:
            whom = f"user:{self.user_id}"
        elif self.group_id is not None:
            whom = f"group:{self.group_id}"
        else:
            whom = "everyone"
        return whom if self.feature_id is None else f"{whom},feature:{self.feature_id}"

    def clean(self) -> None:
        """Refuse a second quota for the same, which the form cannot see in its hidden key."""
        if self.user_id is not None and self.group_id is not None:
            raise ValidationError(_("A quota is for a user or for a group, not both."))
        same = type(self).objects.filter(key=self.compute_key()).exclude(pk=self.pk)
        if same.exists():
            raise ValidationError(_("There is a quota for this already."))
