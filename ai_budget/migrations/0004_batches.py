from __future__ import annotations

import uuid

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("ai_budget", "0003_savings"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="CallText",
            fields=[
                (
                    "call_id",
                    models.UUIDField(primary_key=True, serialize=False, verbose_name="call"),
                ),
                ("request", models.TextField(blank=True, verbose_name="request")),
                ("message", models.TextField(blank=True, verbose_name="message")),
                ("kept_at", models.DateTimeField(db_index=True, verbose_name="kept since")),
            ],
            options={
                "verbose_name": "text of a call",
                "verbose_name_plural": "texts of calls",
            },
        ),
        migrations.AlterField(
            model_name="calllog",
            name="counted",
            field=models.PositiveIntegerField(
                default=1,
                help_text="1 where this attempt counts as a call in quotas, 0 for its repeats. A batch counts one for each item that is still open.",
                verbose_name="counted calls",
            ),
        ),
        migrations.CreateModel(
            name="Batch",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "call_id",
                    models.UUIDField(
                        default=uuid.uuid4, editable=False, unique=True, verbose_name="call"
                    ),
                ),
                (
                    "idempotency_key",
                    models.CharField(
                        blank=True,
                        max_length=200,
                        null=True,
                        unique=True,
                        verbose_name="idempotency key",
                    ),
                ),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("preparing", "Preparing"),
                            ("open", "Open"),
                            ("finished", "Finished"),
                        ],
                        db_index=True,
                        default="preparing",
                        max_length=9,
                        verbose_name="status",
                    ),
                ),
                ("category", models.CharField(blank=True, max_length=64, verbose_name="category")),
                ("subject", models.CharField(blank=True, max_length=100, verbose_name="subject")),
                ("tags", models.JSONField(blank=True, default=dict, verbose_name="tags")),
                (
                    "rates",
                    models.JSONField(
                        blank=True,
                        default=dict,
                        help_text="The prices of each model, as they were when the batch was reserved.",
                        verbose_name="rates",
                    ),
                ),
                (
                    "on_result",
                    models.CharField(
                        blank=True,
                        help_text="The dotted path of a callable that is handed every result.",
                        max_length=200,
                        verbose_name="callback",
                    ),
                ),
                ("total", models.PositiveIntegerField(default=0, verbose_name="items")),
                ("succeeded", models.PositiveIntegerField(default=0, verbose_name="succeeded")),
                ("cached", models.PositiveIntegerField(default=0, verbose_name="from the cache")),
                ("errored", models.PositiveIntegerField(default=0, verbose_name="errored")),
                ("canceled", models.PositiveIntegerField(default=0, verbose_name="canceled")),
                ("expired", models.PositiveIntegerField(default=0, verbose_name="expired")),
                ("refused", models.PositiveIntegerField(default=0, verbose_name="refused")),
                ("reserved_nanousd", models.BigIntegerField(default=0, verbose_name="reserved")),
                ("held_nanousd", models.BigIntegerField(default=0, verbose_name="held")),
                ("spent_nanousd", models.BigIntegerField(default=0, verbose_name="spent")),
                ("created_at", models.DateTimeField(db_index=True, verbose_name="created at")),
                ("touched_at", models.DateTimeField(verbose_name="touched at")),
                (
                    "reserved_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="reserved at"),
                ),
                ("day", models.DateField(blank=True, null=True, verbose_name="day")),
                ("deadline", models.DateTimeField(blank=True, null=True, verbose_name="deadline")),
                (
                    "finished_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="finished at"),
                ),
                (
                    "told_at",
                    models.DateTimeField(
                        blank=True,
                        help_text="When the signal batch_finished had been sent.",
                        null=True,
                        verbose_name="told at",
                    ),
                ),
                (
                    "feature",
                    models.ForeignKey(
                        db_constraint=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="batches",
                        to="ai_budget.featurebudget",
                        to_field="name",
                        verbose_name="feature",
                    ),
                ),
                (
                    "resubmits",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="resubmitted_as",
                        to="ai_budget.batch",
                        verbose_name="resubmits",
                    ),
                ),
                (
                    "user",
                    models.ForeignKey(
                        blank=True,
                        db_constraint=False,
                        null=True,
                        on_delete=django.db.models.deletion.DO_NOTHING,
                        related_name="+",
                        to=settings.AUTH_USER_MODEL,
                        verbose_name="user",
                    ),
                ),
            ],
            options={
                "verbose_name": "batch",
                "verbose_name_plural": "batches",
                "ordering": ["-id"],
            },
        ),
        migrations.CreateModel(
            name="BatchSubmission",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("number", models.PositiveIntegerField(verbose_name="number")),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("waiting", "Waiting to be sent"),
                            ("sending", "Being sent"),
                            ("uncertain", "Uncertain: sent, and nobody heard the answer"),
                            ("sent", "At the API"),
                            ("canceling", "Being canceled"),
                            ("ended", "Ended, results to be read"),
                            ("done", "Done"),
                        ],
                        default="waiting",
                        max_length=9,
                        verbose_name="status",
                    ),
                ),
                (
                    "api_id",
                    models.CharField(
                        blank=True,
                        max_length=128,
                        null=True,
                        unique=True,
                        verbose_name="id at the API",
                    ),
                ),
                ("items_count", models.PositiveIntegerField(default=0, verbose_name="items")),
                ("request_bytes", models.PositiveBigIntegerField(default=0, verbose_name="bytes")),
                (
                    "cancel_requested",
                    models.BooleanField(default=False, verbose_name="cancel requested"),
                ),
                ("sent_at", models.DateTimeField(blank=True, null=True, verbose_name="sent at")),
                ("ended_at", models.DateTimeField(blank=True, null=True, verbose_name="ended at")),
                (
                    "next_look_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="next look at"),
                ),
                ("tries", models.PositiveSmallIntegerField(default=0, verbose_name="tries")),
                ("error", models.CharField(blank=True, max_length=64, verbose_name="error")),
                (
                    "batch",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="submissions",
                        to="ai_budget.batch",
                        verbose_name="batch",
                    ),
                ),
            ],
            options={
                "verbose_name": "submission",
                "verbose_name_plural": "submissions",
                "ordering": ["batch", "number"],
            },
        ),
        migrations.CreateModel(
            name="BatchItem",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("position", models.PositiveIntegerField(verbose_name="position")),
                (
                    "key",
                    models.CharField(
                        help_text="The item's id, as it was submitted.",
                        max_length=200,
                        verbose_name="key",
                    ),
                ),
                ("custom_id", models.CharField(max_length=64, verbose_name="id at the API")),
                ("call_id", models.UUIDField(default=uuid.uuid4, verbose_name="call")),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("open", "Open"),
                            ("succeeded", "Succeeded"),
                            ("cached", "Answered from the cache"),
                            ("errored", "Errored"),
                            ("canceled", "Canceled"),
                            ("expired", "Expired"),
                            ("refused", "Refused: did not fit the budget"),
                        ],
                        default="open",
                        max_length=9,
                        verbose_name="status",
                    ),
                ),
                (
                    "requested_model",
                    models.CharField(max_length=128, verbose_name="requested model"),
                ),
                ("model", models.CharField(max_length=128, verbose_name="model")),
                (
                    "max_tokens",
                    models.PositiveIntegerField(default=0, verbose_name="most output tokens"),
                ),
                (
                    "inference_geo",
                    models.CharField(blank=True, max_length=32, verbose_name="inference geography"),
                ),
                (
                    "may_fall_back",
                    models.BooleanField(
                        default=False,
                        help_text="Whether another model may answer instead.",
                        verbose_name="may fall back",
                    ),
                ),
                ("decision", models.CharField(blank=True, max_length=200, verbose_name="decision")),
                ("reserved_nanousd", models.BigIntegerField(default=0, verbose_name="reserved")),
                ("error", models.CharField(blank=True, max_length=64, verbose_name="error")),
                (
                    "handed",
                    models.BooleanField(
                        default=False,
                        help_text="Whether the callback has had the result.",
                        verbose_name="handed on",
                    ),
                ),
                (
                    "batch",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="items",
                        to="ai_budget.batch",
                        verbose_name="batch",
                    ),
                ),
                (
                    "submission",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="items",
                        to="ai_budget.batchsubmission",
                        verbose_name="submission",
                    ),
                ),
            ],
            options={
                "verbose_name": "item of a batch",
                "verbose_name_plural": "items of batches",
                "ordering": ["batch", "position"],
            },
        ),
        migrations.AddIndex(
            model_name="batchsubmission",
            index=models.Index(fields=["next_look_at"], name="ai_budget_submission_due"),
        ),
        migrations.AddConstraint(
            model_name="batchsubmission",
            constraint=models.UniqueConstraint(
                fields=("batch", "number"), name="ai_budget_submission_number_unique"
            ),
        ),
        migrations.AddIndex(
            model_name="batchitem",
            index=models.Index(fields=["batch", "status"], name="ai_budget_item_status"),
        ),
        migrations.AddIndex(
            model_name="batchitem",
            index=models.Index(fields=["call_id"], name="ai_budget_item_call"),
        ),
        migrations.AddIndex(
            model_name="batchitem",
            index=models.Index(fields=["submission", "custom_id"], name="ai_budget_item_custom_id"),
        ),
        migrations.AddConstraint(
            model_name="batchitem",
            constraint=models.UniqueConstraint(
                fields=("batch", "position"), name="ai_budget_item_position_unique"
            ),
        ),
    ]
