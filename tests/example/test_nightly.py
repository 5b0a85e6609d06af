"""The night at the desk: from the notes in the box to the kind of each, over the local API."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.migrations.state import ProjectState
from django.test import Client
from pytest_django import DjangoDbBlocker

import ai_budget
from ai_budget import money, periods
from ai_budget.models import Batch, CallLog, FeatureBudget, SpendWindow
from ai_budget.testing import AnthropicSimulator, Errored, Reply
from example_project.desk import nightly, samples, stand_in
from example_project.desk.management.commands import demo
from example_project.desk.models import Note
from example_project.desk.seed.notes import create_notes
from tests.example.pages import violations
from tests.whole.clocks import Clock

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("notes_table", "budgets")]

DAY = timedelta(days=1)
LAMP, ATLAS, CAT = "The lamp flickers.", "May I keep the atlas?", "Is the cat yours?"


@pytest.fixture(scope="module")
def notes_table(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """The table of the example, which the suite's own settings know nothing of."""
    module = import_module("example_project.desk.migrations.0001_notes")
    migration = module.Migration("0001_notes", "desk")
    with django_db_blocker.unblock():
        with connection.schema_editor() as editor:
            migration.apply(ProjectState(), editor)
        yield
        with connection.schema_editor() as editor:
            migration.unapply(ProjectState(), editor)


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    clock = Clock()
    with periods.override_clock(lambda: clock.at):
        yield clock


@pytest.fixture(autouse=True)
def sorting(api: AnthropicSimulator) -> None:
    """The local API sorts notes as it does in the demo."""
    api.batches.default = stand_in.item_reply


def leave(*texts: str) -> list[Note]:
    return [Note.objects.create(text=text, left_at=periods.now()) for text in texts]


def kinds() -> dict[str, str]:
    return dict(Note.objects.values_list("text", "kind"))


def pass_the_night(clock: Clock) -> None:
    """Have the tick run as cron would: to send what waits, and to bring what was answered."""
    call_command("ai_budget_tick")
    clock.at += timedelta(minutes=1)
    call_command("ai_budget_tick")


def held() -> list[str]:
    return list(SpendWindow.objects.filter(held_nanousd__gt=0).values_list("scope", flat=True))


def run(*arguments: str) -> str:
    out = StringIO()
    call_command("sort_notes", *arguments, stdout=out)
    return out.getvalue()


def test_in_the_morning_every_note_has_its_kind(clock: Clock) -> None:
    leave(LAMP, ATLAS, CAT)

    nightly.sort_notes()
    pass_the_night(clock)

    assert kinds() == {LAMP: "repair", ATLAS: "lending", CAT: "other"}


def test_the_night_costs_what_its_answers_do_at_half_the_price(
    clock: Clock, api: AnthropicSimulator
) -> None:
    leave(LAMP, ATLAS, CAT)

    batch = nightly.sort_notes()
    assert batch is not None
    assert batch.held_nanousd > 0
    assert "feature:nightly" in held()
    assert api.batches.ids == []
    pass_the_night(clock)

    batch.refresh_from_db()
    full = [ai_budget.price(bill.model, {**bill.usage, "service_tier": ""}) for bill in api.billed]
    assert (batch.status, batch.succeeded) == ("finished", 3)
    assert batch.spent_nanousd == sum(full) // 2 > 0
    assert sum(result.cost_nanousd for result in batch.results()) == batch.spent_nanousd
    assert sum(row.cost_nanousd or 0 for row in CallLog.objects.all()) == batch.spent_nanousd
    assert held() == []


def test_a_night_that_is_begun_twice_is_one(clock: Clock, api: AnthropicSimulator) -> None:
    leave(LAMP)

    first, second = nightly.sort_notes(), nightly.sort_notes()
    pass_the_night(clock)

    assert first == second
    assert len(api.batches.ids) == 1


def test_an_empty_box_makes_no_batch() -> None:
    assert nightly.sort_notes() is None
    assert not Batch.objects.exists()


def test_what_has_a_kind_is_not_sorted_again(clock: Clock) -> None:
    leave(LAMP)
    nightly.sort_notes()
    pass_the_night(clock)
    [late] = leave(ATLAS)
    clock.at += DAY

    batch = nightly.sort_notes()

    assert batch is not None
    assert list(batch.items.values_list("key", flat=True)) == [str(late.pk)]


def test_what_was_not_answered_waits_for_the_next_night(
    clock: Clock, api: AnthropicSimulator
) -> None:
    api.batches.enqueue(Errored())
    leave(LAMP, ATLAS)
    nightly.sort_notes()
    pass_the_night(clock)
    assert kinds() == {LAMP: "", ATLAS: "lending"}

    clock.at += DAY
    nightly.sort_notes()
    pass_the_night(clock)

    assert kinds() == {LAMP: "repair", ATLAS: "lending"}


@pytest.mark.parametrize(
    ("said", "kind"), [("Repair.", "repair"), (" hours\n", "hours"), ("I could not say", "other")]
)
def test_an_answer_is_taken_for_a_kind_as_well_as_it_can(
    clock: Clock, api: AnthropicSimulator, said: str, kind: str
) -> None:
    api.batches.default = Reply(text=said)
    leave(CAT)

    nightly.sort_notes()
    pass_the_night(clock)

    assert kinds() == {CAT: kind}


def test_as_many_are_sorted_as_the_budget_has_room_for(clock: Clock) -> None:
    leave(LAMP, ATLAS, CAT)
    room_for(2)

    assert "no room for 1 note;" in run()
    pass_the_night(clock)

    assert kinds() == {LAMP: "repair", ATLAS: "lending", CAT: ""}


def test_a_budget_without_room_is_one_line_of_error() -> None:
    leave(LAMP)
    FeatureBudget.objects.filter(name="nightly").update(daily_limit_usd=0)

    with pytest.raises(CommandError, match="nightly"):
        run()

    assert not Batch.objects.exists()


def room_for(count: int) -> None:
    """Give the night what the first so many notes can cost, and a little."""
    batch = nightly.sort_notes()
    assert batch is not None
    costs = list(batch.items.order_by("position").values_list("reserved_nanousd", flat=True))
    room = sum(costs[:count]) + min(costs) // 2
    batch.cancel()
    call_command("ai_budget_tick")
    Batch.objects.update(idempotency_key=None)
    FeatureBudget.objects.filter(name="nightly").update(daily_limit_usd=money.to_usd(room))


def test_the_command_says_what_it_holds_and_then_what_came_of_it(clock: Clock) -> None:
    [lamp] = leave(LAMP)

    submitted = run()
    pass_the_night(clock)
    results = run("--results")

    assert ": 1 note, $0.0000" in submitted
    assert " held, $0.00 spent." in submitted
    assert f"{lamp.pk}  succeeded  $0.0000" in results
    assert "repair\n1 of 1 sorted for $0.0000" in results


def test_the_command_has_a_word_for_nothing() -> None:
    assert run() == "There is no note to sort.\n"
    assert run("--results") == "There was no night yet.\n"


# The page


def test_a_reader_leaves_a_note_and_finds_it_in_the_box(reader: Client) -> None:
    page = reader.post("/notes/", {"text": "<b>Open</b> the window!"}, follow=True)

    assert "&lt;b&gt;Open&lt;/b&gt; the window!" in page.text
    assert "tonight" in page.text
    assert kinds() == {"<b>Open</b> the window!": ""}


def test_an_empty_note_is_told(reader: Client) -> None:
    assert "This field is required." in reader.post("/notes/", {"text": ""}).text
    assert kinds() == {}


def test_the_page_shows_the_night_and_what_it_found(reader: Client, clock: Clock) -> None:
    leave(LAMP)
    nightly.sort_notes()
    pass_the_night(clock)

    page = reader.get("/notes/").text

    assert "Something broken" in page
    assert "1 of 1 notes" in page
    assert "Finished" in page
    assert violations(page) == []


def test_the_staff_need_not_wait_for_the_night(reader: Client, ada: Any) -> None:
    leave(LAMP)
    ada.is_staff = True
    ada.save()

    page = reader.post("/notes/sort/", follow=True).text

    assert "Sort them now" in page
    assert "0 of 1 notes" in page
    assert violations(page) == []


def test_the_library_pays_whoever_starts_the_night(reader: Client, ada: Any) -> None:
    leave(LAMP)
    ada.is_staff = True
    ada.save()

    reader.post("/notes/sort/")
    run()

    assert Batch.objects.get().user is None
    assert f"user:{ada.pk}" not in held()


def test_a_reader_cannot_start_the_night(reader: Client) -> None:
    leave(LAMP)

    assert "Sort them now" not in reader.get("/notes/").text
    assert reader.post("/notes/sort/").status_code == 302
    assert not Batch.objects.exists()


# The demo


def test_the_box_of_the_demo_is_filled_once() -> None:
    create_notes(now=periods.now())
    create_notes(now=periods.now())

    texts = Note.objects.values_list("text", flat=True)
    assert sorted(texts) == sorted(samples.NOTES)


def test_the_notes_of_the_demo_are_of_every_kind(clock: Clock) -> None:
    create_notes(now=periods.now())

    nightly.sort_notes()
    pass_the_night(clock)

    assert set(kinds().values()) == set(Note.Kind.values)


def test_the_demo_does_what_is_due_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = threading.Semaphore(0)

    def tick(name: str, **options: Any) -> None:
        ticks.release()
        raise CommandError("the first time it cannot")

    monkeypatch.setattr(demo, "call_command", tick)
    monkeypatch.setattr(demo, "_TICK_SECONDS", 0.01)

    with demo.ticking():
        assert ticks.acquire(timeout=5)
        assert ticks.acquire(timeout=5)

    assert "tick" not in [thread.name for thread in threading.enumerate()]


def test_no_migration_of_the_example_is_missing() -> None:
    call_command("makemigrations", "desk", check_changes=True, dry_run=True, verbosity=0)
