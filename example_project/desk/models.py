"""What readers leave at the desk."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class Note(models.Model):
    """A note from the box at the desk. What it is about is found out at night."""

    class Kind(models.TextChoices):
        LENDING = "lending", "Lending"
        HOURS = "hours", "Opening hours"
        WISH = "wish", "A book to buy"
        REPAIR = "repair", "Something broken"
        THANKS = "thanks", "Thanks"
        OTHER = "other", "Something else"

    text = models.TextField(max_length=2_000)
    left_at = models.DateTimeField()
    kind = models.CharField(max_length=16, choices=Kind, blank=True)

    objects: ClassVar[models.Manager[Note]] = models.Manager()

    class Meta:
        app_label = "desk"
        ordering = ("-left_at", "-id")

    def __str__(self) -> str:
        return self.text
