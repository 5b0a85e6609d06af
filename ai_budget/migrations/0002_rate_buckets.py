from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("ai_budget", "0001_initial")]

    operations = [
        migrations.CreateModel(
            name="RateBucket",
            fields=[
                (
                    "key",
                    models.CharField(
                        editable=False, max_length=32, primary_key=True, serialize=False
                    ),
                ),
                (
                    "used",
                    models.BigIntegerField(
                        default=0,
                        help_text="Requests or tokens, times the bucket's milliseconds.",
                        verbose_name="used",
                    ),
                ),
                (
                    "at_ms",
                    models.BigIntegerField(
                        default=0,
                        help_text="When that was so: milliseconds since 1970, in UTC.",
                        verbose_name="at",
                    ),
                ),
            ],
            options={
                "verbose_name": "rate bucket",
                "verbose_name_plural": "rate buckets",
                "indexes": [models.Index(fields=["at_ms"], name="ai_budget_bucket_time")],
            },
        ),
    ]
