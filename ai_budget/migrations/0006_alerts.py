from __future__ import annotations

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("ai_budget", "0005_totals"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="Alert",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "kind",
                    models.CharField(
                        choices=[
                            ("plan", "Plan"),
                            ("limit", "Limit"),
                            ("off", "Limit used up"),
                            ("forecast", "Forecast"),
                            ("ladder", "Cheaper model"),
                            ("spike", "Spike"),
                            ("unpriced", "Unpriced model"),
                            ("bound", "Bound too low"),
                            ("batch", "Batch failed"),
                            ("uncertain", "Batch uncertain"),
                            ("stuck", "Batch stuck"),
                            ("aside", "Set aside"),
                        ],
                        max_length=9,
                        verbose_name="kind",
                    ),
                ),
                ("budget", models.CharField(max_length=64, verbose_name="budget")),
                (
                    "period",
                    models.CharField(
                        choices=[("day", "Day"), ("month", "Month")],
                        max_length=5,
                        verbose_name="period",
                    ),
                ),
                ("first_day", models.DateField(verbose_name="first day")),
                ("threshold", models.PositiveIntegerField(default=0, verbose_name="threshold (%)")),
                (
                    "about",
                    models.CharField(
                        blank=True,
                        help_text="A model, a batch, a row, or the amount of a limit: raised, it is another limit.",
                        max_length=200,
                        verbose_name="about",
                    ),
                ),
                (
                    "effect",
                    models.CharField(
                        choices=[
                            ("alerts", "Only alerts"),
                            ("downgrades", "Downgrades"),
                            ("refuses", "Refuses"),
                            ("shadow", "Shadow mode: would refuse or downgrade"),
                        ],
                        default="alerts",
                        max_length=10,
                        verbose_name="effect",
                    ),
                ),
                ("spent_nanousd", models.BigIntegerField(default=0, verbose_name="spent")),
                (
                    "of_nanousd",
                    models.BigIntegerField(
                        blank=True,
                        help_text="The plan, the limit, what was held, or what is usual.",
                        null=True,
                        verbose_name="compared with",
                    ),
                ),
                (
                    "forecast_nanousd",
                    models.BigIntegerField(blank=True, null=True, verbose_name="forecast"),
                ),
                ("percent", models.BigIntegerField(blank=True, null=True, verbose_name="percent")),
                (
                    "count",
                    models.PositiveBigIntegerField(
                        default=0, help_text="Calls, refusals or items.", verbose_name="count"
                    ),
                ),
                ("model", models.CharField(blank=True, max_length=128, verbose_name="model")),
                (
                    "rung",
                    models.PositiveSmallIntegerField(
                        blank=True, null=True, verbose_name="rung (%)"
                    ),
                ),
                ("since", models.DateTimeField(blank=True, null=True, verbose_name="since")),
                ("until", models.DateTimeField(blank=True, null=True, verbose_name="resets at")),
                (
                    "covered",
                    models.BooleanField(
                        default=False,
                        help_text="Passed together with a higher threshold, which was told instead.",
                        verbose_name="covered",
                    ),
                ),
                ("raised_at", models.DateTimeField(db_index=True, verbose_name="raised at")),
                (
                    "acknowledged_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="acknowledged at"),
                ),
                (
                    "acknowledged_by",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="+",
                        to=settings.AUTH_USER_MODEL,
                        verbose_name="acknowledged by",
                    ),
                ),
            ],
            options={
                "verbose_name": "alert",
                "verbose_name_plural": "alerts",
                "ordering": ["-id"],
                "permissions": [("acknowledge_alert", "Can acknowledge alerts")],
                "default_permissions": ("view",),
                "constraints": [
                    models.UniqueConstraint(
                        fields=["first_day", "budget", "period", "kind", "threshold", "about"],
                        name="ai_budget_alert_once",
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="AlertDelivery",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("notifier", models.CharField(max_length=200, verbose_name="notifier")),
                ("tries", models.PositiveIntegerField(default=0, verbose_name="tries")),
                ("due_at", models.DateTimeField(blank=True, null=True, verbose_name="due at")),
                (
                    "delivered_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="delivered at"),
                ),
                ("error", models.CharField(blank=True, max_length=64, verbose_name="error")),
                (
                    "alert",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="deliveries",
                        to="ai_budget.alert",
                        verbose_name="alert",
                    ),
                ),
            ],
            options={
                "verbose_name": "delivery of an alert",
                "verbose_name_plural": "deliveries of alerts",
                "ordering": ["alert", "id"],
                "default_permissions": (),
                "indexes": [models.Index(fields=["due_at"], name="ai_budget_delivery_due")],
                "constraints": [
                    models.UniqueConstraint(
                        fields=["alert", "notifier"], name="ai_budget_delivery_once_a_notifier"
                    )
                ],
            },
        ),
    ]
