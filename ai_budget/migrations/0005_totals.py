from __future__ import annotations

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("ai_budget", "0004_batches"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="TotalState",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("zone", models.CharField(blank=True, max_length=64, verbose_name="time zone")),
                ("purged_before", models.DateTimeField(null=True, verbose_name="purged before")),
                ("purged_day", models.DateField(null=True, verbose_name="first day that is kept")),
            ],
            options={
                "verbose_name": "state of the sums",
                "verbose_name_plural": "state of the sums",
            },
        ),
        migrations.CreateModel(
            name="DayTotal",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("feature", models.CharField(max_length=64, verbose_name="feature")),
                ("category", models.CharField(blank=True, max_length=64, verbose_name="category")),
                ("provider", models.CharField(max_length=32, verbose_name="provider")),
                ("model", models.CharField(max_length=128, verbose_name="model")),
                (
                    "requested_model",
                    models.CharField(max_length=128, verbose_name="requested model"),
                ),
                (
                    "kind",
                    models.CharField(
                        choices=[
                            ("ask", "Ask"),
                            ("stream", "Stream"),
                            ("batch", "Batch"),
                            ("router", "Router"),
                            ("summary", "Summary"),
                        ],
                        max_length=8,
                        verbose_name="kind",
                    ),
                ),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("reserved", "Reserved"),
                            ("settled", "Settled"),
                            ("estimated", "Estimated"),
                            ("released", "Released"),
                            ("cached", "Cached"),
                        ],
                        max_length=9,
                        verbose_name="status",
                    ),
                ),
                (
                    "saved_reason",
                    models.CharField(blank=True, max_length=32, verbose_name="saved by"),
                ),
                ("attempts", models.BigIntegerField(verbose_name="attempts")),
                ("counted", models.BigIntegerField(verbose_name="counted calls")),
                (
                    "checked",
                    models.BigIntegerField(
                        help_text="Counted calls that were looked for in the cache.",
                        verbose_name="cache checked",
                    ),
                ),
                ("input_tokens", models.BigIntegerField(verbose_name="input tokens")),
                ("cache_write_5m_tokens", models.BigIntegerField(verbose_name="5m cache writes")),
                ("cache_write_1h_tokens", models.BigIntegerField(verbose_name="1h cache writes")),
                ("cache_read_tokens", models.BigIntegerField(verbose_name="cache reads")),
                ("output_tokens", models.BigIntegerField(verbose_name="output tokens")),
                ("thinking_tokens", models.BigIntegerField(verbose_name="of which thinking")),
                ("web_searches", models.BigIntegerField(verbose_name="web searches")),
                ("max_tokens", models.BigIntegerField(verbose_name="most output tokens")),
                ("cut", models.BigIntegerField(verbose_name="answers that were cut")),
                (
                    "roomy",
                    models.BigIntegerField(
                        help_text="Answers that used less than half of what they might.",
                        verbose_name="roomy answers",
                    ),
                ),
                ("cost_nanousd", models.BigIntegerField(verbose_name="cost")),
                ("saved_nanousd", models.BigIntegerField(verbose_name="saved")),
                ("day", models.DateField(verbose_name="day")),
            ],
            options={
                "verbose_name": "spend",
                "verbose_name_plural": "spend",
                "permissions": [
                    ("view_spend", "Can see what was spent, by feature, user and model")
                ],
                "default_permissions": (),
                "indexes": [models.Index(fields=["day", "feature"], name="ai_budget_day_feature")],
            },
        ),
        migrations.CreateModel(
            name="QuarterTotal",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("feature", models.CharField(max_length=64, verbose_name="feature")),
                ("category", models.CharField(blank=True, max_length=64, verbose_name="category")),
                ("provider", models.CharField(max_length=32, verbose_name="provider")),
                ("model", models.CharField(max_length=128, verbose_name="model")),
                (
                    "requested_model",
                    models.CharField(max_length=128, verbose_name="requested model"),
                ),
                (
                    "kind",
                    models.CharField(
                        choices=[
                            ("ask", "Ask"),
                            ("stream", "Stream"),
                            ("batch", "Batch"),
                            ("router", "Router"),
                            ("summary", "Summary"),
                        ],
                        max_length=8,
                        verbose_name="kind",
                    ),
                ),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("reserved", "Reserved"),
                            ("settled", "Settled"),
                            ("estimated", "Estimated"),
                            ("released", "Released"),
                            ("cached", "Cached"),
                        ],
                        max_length=9,
                        verbose_name="status",
                    ),
                ),
                (
                    "saved_reason",
                    models.CharField(blank=True, max_length=32, verbose_name="saved by"),
                ),
                ("attempts", models.BigIntegerField(verbose_name="attempts")),
                ("counted", models.BigIntegerField(verbose_name="counted calls")),
                (
                    "checked",
                    models.BigIntegerField(
                        help_text="Counted calls that were looked for in the cache.",
                        verbose_name="cache checked",
                    ),
                ),
                ("input_tokens", models.BigIntegerField(verbose_name="input tokens")),
                ("cache_write_5m_tokens", models.BigIntegerField(verbose_name="5m cache writes")),
                ("cache_write_1h_tokens", models.BigIntegerField(verbose_name="1h cache writes")),
                ("cache_read_tokens", models.BigIntegerField(verbose_name="cache reads")),
                ("output_tokens", models.BigIntegerField(verbose_name="output tokens")),
                ("thinking_tokens", models.BigIntegerField(verbose_name="of which thinking")),
                ("web_searches", models.BigIntegerField(verbose_name="web searches")),
                ("max_tokens", models.BigIntegerField(verbose_name="most output tokens")),
                ("cut", models.BigIntegerField(verbose_name="answers that were cut")),
                (
                    "roomy",
                    models.BigIntegerField(
                        help_text="Answers that used less than half of what they might.",
                        verbose_name="roomy answers",
                    ),
                ),
                ("cost_nanousd", models.BigIntegerField(verbose_name="cost")),
                ("saved_nanousd", models.BigIntegerField(verbose_name="saved")),
                ("start", models.DateTimeField(verbose_name="start")),
            ],
            options={
                "verbose_name": "sum of a quarter-hour",
                "verbose_name_plural": "sums of quarter-hours",
                "indexes": [models.Index(fields=["start"], name="ai_budget_quarter_start")],
            },
        ),
        migrations.CreateModel(
            name="SubjectTotal",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "period",
                    models.CharField(
                        choices=[("day", "Day"), ("month", "Month")],
                        max_length=5,
                        verbose_name="period",
                    ),
                ),
                ("first_day", models.DateField(verbose_name="first day")),
                ("attempts", models.BigIntegerField(verbose_name="attempts")),
                ("calls", models.BigIntegerField(verbose_name="calls")),
                ("cost_nanousd", models.BigIntegerField(verbose_name="cost")),
                ("saved_nanousd", models.BigIntegerField(verbose_name="saved")),
                ("subject", models.CharField(max_length=100, verbose_name="subject")),
            ],
            options={
                "verbose_name": "sum of a subject",
                "verbose_name_plural": "sums of subjects",
                "indexes": [
                    models.Index(
                        fields=["subject", "period", "first_day"], name="ai_budget_subject_total"
                    ),
                    models.Index(
                        fields=["period", "first_day", "cost_nanousd"], name="ai_budget_subject_top"
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="TotalMark",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("reserved_at", models.DateTimeField(verbose_name="reserved at")),
                ("day", models.DateField(verbose_name="day")),
                ("subject", models.CharField(blank=True, max_length=100, verbose_name="subject")),
                (
                    "user",
                    models.ForeignKey(
                        db_constraint=False,
                        db_index=False,
                        null=True,
                        on_delete=django.db.models.deletion.DO_NOTHING,
                        related_name="+",
                        to=settings.AUTH_USER_MODEL,
                        verbose_name="user",
                    ),
                ),
            ],
            options={
                "verbose_name": "changed sum",
                "verbose_name_plural": "changed sums",
            },
        ),
        migrations.CreateModel(
            name="UserTotal",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "period",
                    models.CharField(
                        choices=[("day", "Day"), ("month", "Month")],
                        max_length=5,
                        verbose_name="period",
                    ),
                ),
                ("first_day", models.DateField(verbose_name="first day")),
                ("attempts", models.BigIntegerField(verbose_name="attempts")),
                ("calls", models.BigIntegerField(verbose_name="calls")),
                ("cost_nanousd", models.BigIntegerField(verbose_name="cost")),
                ("saved_nanousd", models.BigIntegerField(verbose_name="saved")),
                (
                    "user",
                    models.ForeignKey(
                        db_constraint=False,
                        db_index=False,
                        on_delete=django.db.models.deletion.DO_NOTHING,
                        related_name="+",
                        to=settings.AUTH_USER_MODEL,
                        verbose_name="user",
                    ),
                ),
            ],
            options={
                "verbose_name": "sum of a user",
                "verbose_name_plural": "sums of users",
                "indexes": [
                    models.Index(
                        fields=["user", "period", "first_day"], name="ai_budget_user_total"
                    ),
                    models.Index(
                        fields=["period", "first_day", "cost_nanousd"], name="ai_budget_user_top"
                    ),
                ],
            },
        ),
    ]
