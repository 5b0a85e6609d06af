"""The notes that are in the box when the demo begins."""

from __future__ import annotations

from datetime import datetime, timedelta

from example_project.desk import samples
from example_project.desk.models import Note

_APART = timedelta(minutes=23)


def create_notes(*, now: datetime) -> None:
    """Fill the box, unless there ever was a note in it."""
    if Note.objects.exists():
        return
    Note.objects.bulk_create(
        Note(text=text, left_at=now - rank * _APART)
        for rank, text in enumerate(samples.NOTES, start=1)
    )
