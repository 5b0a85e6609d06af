"""Batches in the admin: what is shown of them, and what a person decides."""

from __future__ import annotations

import re
import uuid
from datetime import timedelta
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.admin.utils import flatten_fieldsets
from django.contrib.messages import get_messages
from django.db import connection
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from ai_budget import batches
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallLog, CallText
from ai_budget.testing import AnthropicSimulator, Errored, Pace, override_budget
from tests.admin.batches import (
    BatchFactory,
    BatchItemFactory,
    BatchSubmissionFactory,
    submit_and_end,
    submit_unheard,
    work,
)
from tests.admin.conftest import NOW
from tests.factories import HAIKU, OPUS, CallLogFactory, FeatureBudgetFactory, UserFactory
from tests.queries import statements

pytestmark = pytest.mark.django_db

BATCHES = "/admin/ai_budget/batch/"
ITEMS = "/admin/ai_budget/batchitem/"
CALLS = "/admin/ai_budget/calllog/"


def listed(client: Client, page: str = BATCHES, **query: str) -> list[Any]:
    response: Any = client.get(page, query)
    assert response.status_code == 200
    return list(response.context["cl"].result_list)


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup)).strip()


def row_text(client: Client, page: str = BATCHES, **query: str) -> str:
    """The text of the first row, without markup."""
    content = client.get(page, query).content.decode()
    return text_of(content.partition("<tbody>")[2].partition("</tr>")[0])


def detail(client: Client, row: Batch | BatchItem | CallLog) -> str:
    page = reverse(f"admin:ai_budget_{row._meta.model_name}_change", args=[row.pk])
    return client.get(page).content.decode()


def page_of(batch: Batch, name: str) -> str:
    return f"{BATCHES}{batch.pk}/{name}/"


def resolve_page(submission: BatchSubmission, choice: str) -> str:
    return page_of(submission.batch, f"submissions/{submission.number}/{choice}")


def told(response: Any) -> list[str]:
    return [str(message) for message in get_messages(response.wsgi_request)]


# The list ---------------------------------------------------------------------------------------


def test_a_row_says_how_far_a_batch_is_and_what_it_holds_and_spent(root: Client) -> None:
    BatchFactory.create(
        user=UserFactory.create(username="anna"),
        total=2_000,
        succeeded=900,
        cached=60,
        errored=40,
        reserved_nanousd=3_512_345_678,
        held_nanousd=2_500_000_000,
        spent_nanousd=812_345_678,
    )

    batch = Batch.objects.get()
    assert row_text(root) == (
        f"#{batch.pk} nightly anna Open 1,000 of 2,000 items are over: 50 % "
        "1,000 of 2,000 1,000 open, 900 succeeded, 60 from the cache, 40 errored "
        "$3.5123 $2.5000 $0.8123 2026-10-15 12:00"
    )


def test_the_bar_shows_what_is_answered_and_what_is_over_without(root: Client) -> None:
    BatchFactory.create(total=1000, succeeded=400, cached=100, errored=125)

    content = root.get(BATCHES).content.decode()

    assert '<rect class="ai-budget-unanswered" width="62.5"' in content
    assert '<rect class="ai-budget-answered" width="50.0"' in content


def test_a_batch_that_is_prepared_has_no_bar_yet(root: Client) -> None:
    BatchFactory.create(status="preparing", reserved_at=None, day=None)

    assert " Preparing – $0.0000 " in row_text(root)


def test_a_finished_batch_says_since_when(root: Client) -> None:
    BatchFactory.create(status="finished", finished_at=NOW - timedelta(minutes=5))

    assert " Finished 2026-10-15 11:55 " in row_text(root)


def test_submissions_that_are_uncertain_are_pointed_out(root: Client) -> None:
    batch = BatchFactory.create()
    for number, status in enumerate(["done", "uncertain", "sent", "uncertain"]):
        BatchSubmissionFactory.create(batch=batch, number=number, status=status)

    assert " Open 2 uncertain " in row_text(root)


def test_queries_do_not_grow_with_the_batches(root: Client) -> None:
    def create(number: int) -> None:
        for index in range(number):
            user = UserFactory.create()
            batch = BatchFactory.create(user=user, feature__name=f"feature-{index}")
            BatchSubmissionFactory.create(batch=batch, status="uncertain")
            if index % 2:
                user.delete()

    def queries() -> int:
        return len(statements(lambda: root.get(BATCHES)))

    create(2)
    few = queries()
    create(20)

    assert queries() == few


def test_batches_are_filtered_by_feature_status_time_and_user(root: Client) -> None:
    anna = UserFactory.create()
    FeatureBudgetFactory.create(name="other")
    old = BatchFactory.create(status="finished", user=anna, created_at=NOW - timedelta(days=30))
    new = BatchFactory.create()

    assert listed(root) == [new, old]
    assert listed(root, created="week") == [new]
    assert listed(root, status__exact="finished") == [old]
    assert listed(root, user=str(anna.pk)) == [old]
    assert listed(root, feature="nightly") == [new, old]
    assert listed(root, feature="other") == []


def test_a_batch_is_found_by_each_of_its_ids(root: Client) -> None:
    wanted = BatchFactory.create(idempotency_key="tickets-2026-10-15")
    BatchSubmissionFactory.create(batch=wanted, api_id="msgbatch_wanted")
    item = BatchItemFactory.create(batch=wanted)
    other = BatchFactory.create(idempotency_key="tickets")
    BatchSubmissionFactory.create(batch=other)
    BatchItemFactory.create(batch=other)

    for term in (
        " tickets-2026-10-15 ",
        "msgbatch_wanted",
        str(wanted.pk),
        str(wanted.call_id),
        str(item.call_id),
    ):
        assert listed(root, q=term) == [wanted], term
    for term in ("ticket", "msgbatch", str(uuid.uuid4()), "9" * 30):
        assert listed(root, q=term) == [], term


# One batch --------------------------------------------------------------------------------------


def test_amounts_are_exact(root: Client) -> None:
    batch = BatchFactory.create(
        reserved_nanousd=2_000_000_001, held_nanousd=1_234_567_891, spent_nanousd=5
    )

    content = detail(root, batch)

    for amount in ("$2.000000001", "$1.234567891", "$0.000000005"):
        assert amount in content


def test_submissions_are_shown_in_words(root: Client) -> None:
    batch = BatchFactory.create()
    BatchSubmissionFactory.create(
        batch=batch, status="waiting", sent_at=None, items_count=20_000, tries=3, error="HTTP 529"
    )
    BatchSubmissionFactory.create(batch=batch, number=1, api_id="msgbatch_1", cancel_requested=True)

    text = text_of(detail(root, batch))

    assert "0 Waiting to be sent - 20,000 – 2026-10-15 12:00 3 HTTP 529" in text
    assert "1 At the API (cancel requested) msgbatch_1 1 2026-10-15 12:00" in text


def test_each_state_leads_to_its_items(root: Client) -> None:
    batch = BatchFactory.create(total=3, succeeded=1, errored=2)
    BatchItemFactory.create(batch=batch, status="succeeded")
    failed = BatchItemFactory.create_batch(2, batch=batch, status="errored")
    BatchItemFactory.create(status="errored")
    link = f"{ITEMS}?batch={batch.pk}&amp;status__exact=errored"

    assert f'<a href="{link}">2 errored</a>' in detail(root, batch)
    assert listed(root, ITEMS, batch=str(batch.pk), status__exact="errored") == failed


def test_what_was_submitted_again_is_linked_both_ways(root: Client) -> None:
    first = BatchFactory.create(status="finished", total=1, errored=1)
    second = BatchFactory.create(resubmits=first)

    assert f'<a href="{BATCHES}{second.pk}/change/">#{second.pk}</a>' in detail(root, first)
    assert f'<a href="{BATCHES}{first.pk}/change/">' in detail(root, second)


def test_a_user_who_is_gone_is_named_by_the_key_that_is_left(root: Client) -> None:
    user = UserFactory.create()
    key, batch = user.pk, BatchFactory.create(user=user)
    user.delete()

    assert f"user {key} (deleted)" in row_text(root)
    assert f"user {key} (deleted)" in detail(root, batch)


@pytest.mark.parametrize(
    ("model", "stand_ins", "others"),
    [
        (
            Batch,
            {
                "user": "caller_with_batches",
                "reserved_nanousd": "exact_reserved",
                "held_nanousd": "exact_held",
                "spent_nanousd": "exact_spent",
                "total": "progress",
                "succeeded": "by_state",
                "cached": "by_state",
                "errored": "by_state",
                "canceled": "by_state",
                "expired": "by_state",
                "refused": "by_state",
                "resubmitted_as": "resubmitted_as_links",
                "items": "by_state_with_links",
            },
            {"calls_link"},
        ),
        (BatchItem, {"reserved_nanousd": "exact_reserved"}, {"call"}),
    ],
)
def test_every_field_is_on_the_page(
    model: Any, stand_ins: dict[str, str], others: set[str]
) -> None:
    shown = set(flatten_fieldsets(admin.site.get_model_admin(model).fieldsets or ()))
    inlines = {"submissions"}
    fields = {field.name for field in model._meta.get_fields()} - {"id"} - inlines

    assert {stand_ins.get(name, name) for name in fields} == shown - others


def test_what_was_asked_and_answered_is_on_no_page(
    root: Client, anthropic_api: AnthropicSimulator, settings: Any
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "LOG_PROMPTS": True}
    batch = submit_and_end("a secret question")
    item = batch.items.get()
    assert "secret" in CallText.objects.get(call_id=item.call_id).request

    pages = detail(root, batch), detail(root, item), root.get(ITEMS).content.decode()

    assert not any("secret" in page for page in pages)
    assert not admin.site.is_registered(CallText)


# Its items --------------------------------------------------------------------------------------


def test_an_item_says_how_it_ended(root: Client) -> None:
    batch = BatchFactory.create()
    BatchItemFactory.create(
        batch=batch, position=7, key="ticket-7", status="errored", error="api_error",
        requested_model=OPUS, model=HAIKU,
    )  # fmt: skip

    assert row_text(root, ITEMS, batch=str(batch.pk)) == (
        f"7 ticket-7 Errored {HAIKU} asked for {OPUS} $0.001000 api_error –"
    )


def test_items_of_a_batch_come_in_their_order(root: Client) -> None:
    batch = BatchFactory.create()
    second = BatchItemFactory.create(batch=batch, position=1)
    first = BatchItemFactory.create(batch=batch, position=0)
    other = BatchItemFactory.create()

    assert listed(root, ITEMS, batch=str(batch.pk)) == [first, second]
    assert listed(root, ITEMS) == [other, first, second]


def test_an_item_is_found_by_its_call_and_in_its_batch_by_its_key(root: Client) -> None:
    item = BatchItemFactory.create(key="ticket-9")
    BatchItemFactory.create(key="ticket-9")
    batch = str(item.batch_id)

    assert listed(root, ITEMS, q=str(item.call_id)) == [item]
    assert listed(root, ITEMS, batch=batch, q="ticket-9") == [item]
    assert listed(root, ITEMS, q="ticket-9") == []


def test_items_are_not_in_the_index_of_the_admin(root: Client) -> None:
    index = root.get(reverse("admin:index")).content.decode()

    assert BATCHES in index
    assert ITEMS not in index


def test_nothing_reads_all_items(root: Client) -> None:
    BatchItemFactory.create_batch(51, batch=BatchFactory.create())
    with CaptureQueriesContext(connection) as captured:
        root.get(ITEMS)

    over_items = [query["sql"] for query in captured if "ai_budget_batchitem" in query["sql"]]
    assert over_items
    assert all("LIMIT" in query for query in over_items)


# Its calls --------------------------------------------------------------------------------------


def test_the_calls_of_a_batch_are_one_link_away(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    anthropic_api.batches.enqueue(Errored())
    batch = submit_and_end("one", "two", "three")
    other = submit_and_end("four")
    answered = batch.items.filter(status="succeeded").values_list("call_id", flat=True)
    expected = {batch.call_id, *answered}

    assert f'<a href="{CALLS}?batch={batch.pk}">Calls of this batch</a>' in detail(root, batch)
    found = listed(root, CALLS, batch=str(batch.pk))
    assert {call.call_id for call in found} == expected
    assert len(found) == 3
    assert other.call_id not in expected


def test_calls_of_a_batch_are_found_however_old(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    batch = submit_and_end("one")
    Batch.objects.update(reserved_at=NOW - timedelta(days=60))
    CallLog.objects.update(reserved_at=NOW - timedelta(days=60))

    assert len(listed(root, CALLS, batch=str(batch.pk))) == 2
    assert listed(root, CALLS, batch=str(batch.pk), reserved="today") == []


@pytest.mark.parametrize("value", ["0", "nonsense", "9" * 30, ""])
def test_a_batch_that_does_not_exist_has_neither_calls_nor_items(root: Client, value: str) -> None:
    CallLogFactory.create()
    BatchItemFactory.create()

    assert listed(root, CALLS, batch=value) == []
    assert listed(root, ITEMS, batch=value) == []


def test_a_batch_that_is_prepared_has_no_calls(root: Client) -> None:
    CallLogFactory.create()
    batch = BatchFactory.create(status="preparing", reserved_at=None, day=None)

    assert listed(root, CALLS, batch=str(batch.pk)) == []


def test_the_call_that_holds_an_open_batch_has_neither_user_nor_cost(root: Client) -> None:
    call = CallLogFactory.create(kind="batch", status="reserved")

    text = text_of(detail(root, call))

    assert "User: – " in text
    assert "Cost: – " in text


def test_an_answered_item_leads_to_its_call(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    item = submit_and_end("one").items.get()

    assert f'<a href="{CALLS}?q={item.call_id}">Call</a>' in detail(root, item)
    (call,) = listed(root, CALLS, q=str(item.call_id))
    assert call.cost_nanousd == Batch.objects.get().spent_nanousd


# Canceling --------------------------------------------------------------------------------------


def test_a_batch_is_canceled_once_it_is_confirmed(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    anthropic_api.batches.pace = Pace.never()
    batch = batches.submit_batch(["one", "two"], feature="nightly", max_tokens=50)
    page = page_of(batch, "cancel")
    assert page in detail(root, batch)

    asked = root.get(page).content.decode()
    assert "Open items: 2. Held for them: $0.00" in asked
    assert not BatchSubmission.objects.get().cancel_requested

    response = root.post(page)

    assert response.headers["Location"] == f"{BATCHES}{batch.pk}/change/"
    assert told(response) == ["1 batch is being canceled."]
    assert LogEntry.objects.get().get_change_message() == "Asked to cancel it."
    work()
    batch.refresh_from_db()
    assert (batch.status, batch.canceled, batch.held_nanousd) == ("finished", 2, 0)


def test_several_batches_are_canceled_from_the_list(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    wanted = [batches.submit_batch([text], feature="nightly", max_tokens=50) for text in "ab"]
    finished = BatchFactory.create(status="finished")
    chosen = {
        "action": "cancel",
        "_selected_action": [batch.pk for batch in [*wanted, finished]],
    }

    asked = root.post(BATCHES, chosen).content.decode()
    assert f"<li>nightly #{wanted[0].pk}</li>" in asked
    assert f"<li>nightly #{finished.pk}</li>" not in asked
    assert not BatchSubmission.objects.filter(cancel_requested=True).exists()

    response = root.post(BATCHES, {**chosen, "confirmed": "yes"})

    assert told(response) == ["2 batches are being canceled."]
    assert BatchSubmission.objects.filter(cancel_requested=True).count() == 2
    assert LogEntry.objects.count() == 2


def test_what_is_finished_cannot_be_canceled(root: Client) -> None:
    batch = BatchFactory.create(status="finished")

    assert page_of(batch, "cancel") not in detail(root, batch)
    assert told(root.post(page_of(batch, "cancel"))) == [f"{batch}: It is finished already."]
    response = root.post(BATCHES, {"action": "cancel", "_selected_action": [batch.pk]})
    assert told(response)[-1] == "They are finished already."
    assert not LogEntry.objects.exists()


# Submitting again -------------------------------------------------------------------------------


def failed_batch(api: AnthropicSimulator) -> Batch:
    api.batches.enqueue(Errored(), Errored())
    return submit_and_end("one", "two", "three")


def test_what_was_not_answered_is_submitted_again_once_it_is_confirmed(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    batch = failed_batch(anthropic_api)
    page = page_of(batch, "resubmit")
    assert page in detail(root, batch)

    assert "Items without an answer: 2." in root.get(page).content.decode()
    assert Batch.objects.count() == 1

    response: Any = root.post(page)

    again = Batch.objects.get(resubmits=batch)
    assert again.total == 2
    assert response.headers["Location"] == f"{BATCHES}{again.pk}/change/"
    (message,) = told(response)
    assert text_of(message) == f"Items of {batch} submitted again as #{again.pk} : 2."
    entries = [(entry.object_id, entry.get_change_message()) for entry in LogEntry.objects.all()]
    assert sorted(entries) == [
        (str(batch.pk), f"Submitted again as {again}."),
        (str(again.pk), f"Submits {batch} again."),
    ]


def test_a_second_click_pays_for_nothing(root: Client, anthropic_api: AnthropicSimulator) -> None:
    batch = failed_batch(anthropic_api)
    root.post(page_of(batch, "resubmit"))
    again = Batch.objects.get(resubmits=batch)

    response = root.post(page_of(batch, "resubmit"))

    assert told(response)[-1] == f"{batch}: It was submitted again as {again} already."
    assert Batch.objects.count() == 2
    assert page_of(batch, "resubmit") not in detail(root, batch)


def test_the_budget_says_why_it_refuses(root: Client, anthropic_api: AnthropicSimulator) -> None:
    batch = failed_batch(anthropic_api)

    with override_budget("nightly", daily_limit_usd="0.000001"):
        response = root.post(page_of(batch, "resubmit"))

    (message,) = told(response)
    assert message.startswith(f"{batch}: The daily limit of feature:nightly is ")
    assert "items would fit" in message
    assert response.headers["Location"] == f"{BATCHES}{batch.pk}/change/"
    assert Batch.objects.count() == 1
    assert not LogEntry.objects.exists()


def test_a_missing_key_is_told(
    root: Client, anthropic_api: AnthropicSimulator, settings: Any
) -> None:
    batch = failed_batch(anthropic_api)
    settings.AI_BUDGET = {**settings.AI_BUDGET, "API_KEY": None}

    (message,) = told(root.post(page_of(batch, "resubmit")))

    assert "API_KEY" in message


def test_several_batches_are_submitted_again_from_the_list(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    failed, good = failed_batch(anthropic_api), submit_and_end("four")
    chosen = {"action": "resubmit", "_selected_action": [failed.pk, good.pk]}

    asked = root.post(BATCHES, chosen).content.decode()
    assert f"<li>{failed}</li>" in asked
    assert f"<li>{good}</li>" not in asked
    assert Batch.objects.count() == 2

    root.post(BATCHES, {**chosen, "confirmed": "yes"})

    assert [batch.resubmits for batch in Batch.objects.exclude(resubmits=None)] == [failed]


def test_what_is_not_over_or_all_answered_cannot_be_submitted_again(root: Client) -> None:
    rows = [
        BatchFactory.create(total=2, errored=1),
        BatchFactory.create(status="finished", total=1, succeeded=1),
    ]

    for batch in rows:
        assert page_of(batch, "resubmit") not in detail(root, batch)
    response = root.post(
        BATCHES, {"action": "resubmit", "_selected_action": [batch.pk for batch in rows]}
    )
    assert told(response) == ["None of them is finished with items that are unanswered."]
    assert told(root.post(page_of(rows[0], "resubmit")))[-1] == (
        f"{rows[0]}: The batch is not over: resubmit it once it is finished."
    )


# What is uncertain ------------------------------------------------------------------------------


def test_an_uncertain_submission_is_explained_with_what_can_be_done(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    submission = submit_unheard(anthropic_api, taken=True)

    content = detail(root, submission.batch)

    assert "Submission 0 (items: 2) was sent at 2026-10-15 12:00" in content
    for choice in ("accept", "send-again", "release"):
        assert resolve_page(submission, choice) in content


def test_a_batch_of_the_api_is_accepted_for_it(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    submission = submit_unheard(anthropic_api, taken=True)
    (api_id,) = anthropic_api.batches.ids
    page = resolve_page(submission, "accept")
    assert root.get(page).status_code == 200

    response = root.post(page, {"api_id": api_id})

    assert told(response) == [f"The submission is the API's batch {api_id} now."]
    entry = LogEntry.objects.get()
    assert entry.object_id == str(submission.batch_id)
    assert api_id in entry.get_change_message()
    work(after=timedelta(minutes=1))
    batch = Batch.objects.get()
    assert (batch.status, batch.succeeded) == ("finished", 2)


def test_an_id_that_the_api_does_not_know_is_refused_on_the_form(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    submission = submit_unheard(anthropic_api, taken=True)
    page = resolve_page(submission, "accept")

    unknown = root.post(page, {"api_id": "msgbatch_unknown"}).content.decode()
    missing = root.post(page, {}).content.decode()

    assert "The API does not tell of" in unknown
    assert "This field is required." in missing
    assert BatchSubmission.objects.get().status == "uncertain"
    assert not LogEntry.objects.exists()


def test_it_is_sent_again(root: Client, anthropic_api: AnthropicSimulator) -> None:
    submission = submit_unheard(anthropic_api, taken=False)
    page = resolve_page(submission, "send-again")
    root.get(page)
    assert BatchSubmission.objects.get().status == "uncertain"

    response = root.post(page)

    assert told(response) == ["The submission is sent again."]
    work()
    assert BatchSubmission.objects.get().api_id in anthropic_api.batches.ids


def test_it_is_given_up(root: Client, anthropic_api: AnthropicSimulator) -> None:
    submission = submit_unheard(anthropic_api, taken=False)
    page = resolve_page(submission, "release")
    assert Batch.objects.get().held_nanousd > 0
    root.get(page)
    assert BatchSubmission.objects.get().status == "uncertain"

    root.post(page)

    batch = Batch.objects.get()
    assert (batch.status, batch.canceled, batch.held_nanousd) == ("finished", 2, 0)


def test_a_decision_that_came_too_late_is_told(
    root: Client, anthropic_api: AnthropicSimulator
) -> None:
    submission = submit_unheard(anthropic_api, taken=False)
    batches.release(submission)

    response = root.post(resolve_page(submission, "send-again"))

    assert told(response) == ["Submission 0 is not uncertain any more."]
    assert BatchSubmission.objects.get().status == "done"


def test_a_page_of_no_batch_no_submission_or_no_choice_is_not_found(root: Client) -> None:
    submission = BatchSubmissionFactory.create(status="uncertain")
    batch = submission.batch

    for page in (
        f"{BATCHES}0/cancel/",
        f"{BATCHES}0/resubmit/",
        page_of(batch, "submissions/7/accept"),
        page_of(batch, "submissions/0/forget"),
    ):
        assert root.get(page).status_code == 404, page


# Every page -------------------------------------------------------------------------------------


@pytest.fixture
def pages() -> list[str]:
    batch = BatchFactory.create(total=2, errored=1)
    BatchSubmissionFactory.create(batch=batch, status="uncertain")
    item = BatchItemFactory.create(batch=batch)
    return [
        BATCHES,
        ITEMS,
        f"{ITEMS}{item.pk}/change/",
        f"{CALLS}?batch={batch.pk}",
        *(page_of(batch, name) for name in ("change", "history", "cancel", "resubmit")),
        *(
            page_of(batch, f"submissions/0/{choice}")
            for choice in ("accept", "send-again", "release")
        ),
    ]


def test_no_page_needs_more_than_a_strict_content_security_policy(
    root: Client, pages: list[str]
) -> None:
    for page in pages:
        content = root.get(page).content.decode()
        scripts = re.findall(r"<script\b([^>]*)>", content)
        assert " style=" not in content, page
        assert "<style" not in content, page
        assert all("src=" in attributes or "data-" in attributes for attributes in scripts), page
        assert not re.search(r"\son[a-z]+=", content), page


def test_every_page_can_be_read_in_another_language(root: Client, pages: list[str]) -> None:
    with override_settings(LANGUAGE_CODE="de", USE_THOUSAND_SEPARATOR=True):
        for page in pages:
            assert root.get(page).status_code == 200, page


def test_names_are_escaped(root: Client) -> None:
    batch = BatchFactory.create(subject="<script>x</script>", on_result="<b>")
    item = BatchItemFactory.create(batch=batch, key="<i>", requested_model="<u>", model="<s>")
    contents = [
        root.get(BATCHES).content.decode(),
        root.get(ITEMS).content.decode(),
        detail(root, batch),
        detail(root, item),
    ]

    for content in contents:
        assert not re.search("<script>x|<b>|<i>|<u>|<s>", content)
