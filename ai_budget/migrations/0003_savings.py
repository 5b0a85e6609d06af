from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("ai_budget", "0002_rate_buckets"),
    ]

    operations = [
        migrations.AddField(
            model_name="calllog",
            name="cache_checked",
            field=models.BooleanField(
                default=False,
                help_text="Whether the answer was looked for in the response cache.",
                verbose_name="cache checked",
            ),
        ),
        migrations.AddField(
            model_name="featurebudget",
            name="cache_counts",
            field=models.BooleanField(
                default=False,
                help_text="On: an answer from the cache takes a call from a user's quota.",
                verbose_name="cached answers count as calls",
            ),
        ),
        migrations.AddField(
            model_name="featurebudget",
            name="cache_version",
            field=models.PositiveIntegerField(
                default=0,
                help_text="Answers of another version are not found. Raise it when a prompt's meaning changes.",
                verbose_name="version of the cached answers",
            ),
        ),
        migrations.AlterField(
            model_name="featurebudget",
            name="cache_scope",
            field=models.CharField(
                choices=[
                    ("off", "Off"),
                    ("private", "Private: per user"),
                    ("shared", "Shared between all users"),
                ],
                default="off",
                help_text="A question that was asked before is answered for nothing. Private: each user has answers of their own, and calls without a user none. Shared: everybody gets the same answer, so never for prompts with a user's data. Off leaves it to the code.",
                max_length=8,
                verbose_name="response cache",
            ),
        ),
        migrations.AlterField(
            model_name="featurebudget",
            name="cache_ttl",
            field=models.PositiveIntegerField(
                default=3600,
                help_text="The longer, the more calls are free, and the older an answer may be.",
                verbose_name="cache lifetime (seconds)",
            ),
        ),
        migrations.AlterField(
            model_name="featurebudget",
            name="prompt_cache",
            field=models.CharField(
                choices=[
                    ("off", "Off"),
                    ("5m", "5 minutes"),
                    ("1h", "1 hour"),
                    ("auto", "Automatic"),
                ],
                default="off",
                help_text="The API keeps the beginning of a prompt: reading it again costs a tenth or less, keeping it a quarter more (5 minutes) or twice the price (1 hour). Automatic keeps only what is seen to come again, and costs at most 1 % more than none.",
                max_length=4,
                verbose_name="prompt cache",
            ),
        ),
        migrations.AlterField(
            model_name="featurebudget",
            name="routing",
            field=models.CharField(
                choices=[
                    ("off", "Off"),
                    ("length", "By length"),
                    ("classifier", "By a classifier"),
                ],
                default="off",
                help_text="Sends what a cheaper model can answer to a cheaper model, never to a dearer one. By length costs nothing; a classifier is a small call of its own before the call.",
                max_length=10,
                verbose_name="routing",
            ),
        ),
    ]
