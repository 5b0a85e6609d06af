from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Note",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("text", models.TextField(max_length=2000)),
                ("left_at", models.DateTimeField()),
                (
                    "kind",
                    models.CharField(
                        blank=True,
                        choices=[
                            ("lending", "Lending"),
                            ("hours", "Opening hours"),
                            ("wish", "A book to buy"),
                            ("repair", "Something broken"),
                            ("thanks", "Thanks"),
                            ("other", "Something else"),
                        ],
                        max_length=16,
                    ),
                ),
            ],
            options={"ordering": ("-left_at", "-id")},
        ),
    ]
