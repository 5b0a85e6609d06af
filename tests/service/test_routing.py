"""Calls that go to the cheapest model that does the job."""

from __future__ import annotations

from typing import Any

import pytest

import ai_budget
from ai_budget.exceptions import QuotaExceeded
from ai_budget.models import UserQuota
from ai_budget.policy.routing import Question
from ai_budget.testing import AnthropicSimulator, Fail, Reply, override_budget
from ai_budget.values import Kind, Status
from tests.factories import UserFactory
from tests.guard.books import assert_balanced, in_db, only_row, rows

pytestmark = pytest.mark.django_db

HAIKU, SONNET, OPUS = "claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"
SIMPLE, HARD = Reply(text='{"level": "simple"}'), Reply(text='{"level": "hard"}')
LONG = "Why? " * 400
TOOL = {"name": "look", "input_schema": {"type": "object"}}


def asked_models(api: AnthropicSimulator) -> list[str]:
    return [str((request.body or {})["model"]) for request in api.requests]


# By length


@pytest.mark.parametrize(
    ("words", "model"), [(10, HAIKU), (1_500, SONNET), (8_000, OPUS)], ids=["short", "mid", "long"]
)
def test_a_prompt_goes_where_its_length_belongs(
    api: AnthropicSimulator, words: int, model: str
) -> None:
    with override_budget("chat", routing="length", model=OPUS):
        answer = ai_budget.ask("word " * words, feature="chat")

    row = only_row()
    assert (answer.model, answer.requested_model, answer.downgraded) == (model, model, False)
    assert row.decision.startswith("length: about ")
    assert row.decision.endswith(f"not {OPUS}" if model != OPUS else "tokens")


def test_what_routing_saved_is_booked(api: AnthropicSimulator) -> None:
    with override_budget("chat", routing="length", model=OPUS):
        answer = ai_budget.ask("Why?", feature="chat")

    row = only_row()
    dearer = ai_budget.price(OPUS, answer.message.usage)
    assert row.saved_nanousd == dearer - answer.cost_nanousd > 0
    assert row.saved_reason == "routing"


def test_the_thresholds_and_tiers_are_settings(api: AnthropicSimulator, settings: Any) -> None:
    settings.AI_BUDGET = {
        **settings.AI_BUDGET,
        "TIERS": [SONNET, OPUS],
        "ROUTING_LENGTHS": [5],
    }
    with override_budget("chat", routing="length", model=OPUS):
        models = [ai_budget.ask(text, feature="chat").model for text in ("Why?", LONG)]

    assert models == [SONNET, OPUS]


def test_a_model_that_is_named_is_not_routed(api: AnthropicSimulator) -> None:
    with override_budget("chat", routing="length", model=OPUS):
        named = ai_budget.ask("Why?", feature="chat", model=OPUS)
        off = ai_budget.ask("Why?", feature="chat", route="off")
        both = ai_budget.ask("Why?", feature="chat", model=OPUS, route="length")

    assert [answer.model for answer in (named, off, both)] == [OPUS, OPUS, HAIKU]


def test_routing_never_chooses_a_dearer_model(api: AnthropicSimulator) -> None:
    with override_budget("chat", routing="length", model=SONNET):
        answer = ai_budget.ask("word " * 9_000, feature="chat")

    assert answer.model == SONNET


def test_a_stream_and_an_estimate_are_routed_alike(api: AnthropicSimulator) -> None:
    with override_budget("chat", routing="length", model=OPUS):
        expected = ai_budget.estimate("Why?", feature="chat")
        with ai_budget.stream("Why?", feature="chat") as answer:
            "".join(answer)

    assert expected.model == answer.model == HAIKU


def test_a_tools_result_goes_back_to_the_model_that_asked_for_it(api: AnthropicSimulator) -> None:
    call = {"type": "tool_use", "id": "toolu_7", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "toolu_7", "content": "word " * 9_000}
    api.enqueue(Reply(content=[call]))
    with override_budget("chat", routing="length", model=OPUS):
        ai_budget.ask("Why?", feature="chat", tools=[TOOL])
        ai_budget.ask(
            [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": [call]},
                {"role": "user", "content": [result]},
            ],
            feature="chat",
            tools=[TOOL],
        )

    assert asked_models(api) == [HAIKU, HAIKU]


# By a classifier


@pytest.mark.parametrize(("level", "model"), [(SIMPLE, HAIKU), (HARD, OPUS)])
def test_a_classifier_says_which_model(api: AnthropicSimulator, level: Reply, model: str) -> None:
    api.enqueue(level)
    with override_budget("chat", routing="classifier", model=OPUS):
        answer = ai_budget.ask(LONG, feature="chat", max_tokens=2_000)

    router, row = rows()
    assert asked_models(api) == [HAIKU, model]
    assert answer.model == answer.requested_model == model
    assert (router.kind, row.kind) == (Kind.ROUTER, Kind.ASK)
    assert (router.call_id, router.attempt, row.attempt) == (row.call_id, 0, 1)
    assert (router.counted, row.counted) == (0, 1)
    assert answer.cost_nanousd == (router.cost_nanousd or 0) + (row.cost_nanousd or 0)
    assert (router.saved_nanousd, router.saved_reason) == (-(router.cost_nanousd or 0), "routing")
    assert row.decision.startswith("classifier: ")
    assert router.max_tokens <= 32
    assert_balanced()


@pytest.mark.django_db(transaction=True)
async def test_an_async_call_is_classified_alike(api: AnthropicSimulator) -> None:
    api.enqueue(SIMPLE)

    answer = await ai_budget.aask(
        LONG, feature="chat", model=OPUS, route="classifier", max_tokens=2_000
    )

    router, row = await in_db(rows)
    assert answer.model == HAIKU
    assert (router.kind, row.kind, row.attempt) == (Kind.ROUTER, Kind.ASK, 1)


def test_the_same_question_is_classified_once(api: AnthropicSimulator) -> None:
    ada = UserFactory.create()
    api.enqueue(SIMPLE)
    with override_budget("chat", routing="classifier", model=OPUS):
        first = ai_budget.ask(LONG, feature="chat", user=ada, max_tokens=2_000)
        again = ai_budget.ask(LONG, feature="chat", user=ada, max_tokens=2_000)

    assert [row.status for row in rows() if row.kind == Kind.ROUTER] == [
        Status.SETTLED,
        Status.CACHED,
    ]
    assert asked_models(api) == [HAIKU, HAIKU, HAIKU]
    assert again.cost_nanousd < first.cost_nanousd
    assert [row.saved_nanousd for row in rows() if row.status == Status.CACHED] == [0]
    assert not again.cached


@pytest.mark.parametrize(
    "failure", [Fail(status=500), Fail(status=400), Reply(text="I would say: simple")]
)
def test_a_classifier_that_fails_leaves_the_features_model(
    api: AnthropicSimulator, failure: Any
) -> None:
    api.enqueue(failure)
    with override_budget("chat", routing="classifier", model=OPUS):
        answer = ai_budget.ask(LONG, feature="chat", max_tokens=2_000)

    assert answer.model == OPUS
    assert len(api.requests) == 2


def test_a_classifier_that_takes_too_long_leaves_the_features_model(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai_budget.guard.routing.CLASSIFIER_SECONDS", 0.1)
    api.enqueue(Reply(text='{"level": "simple"}', delay=1.0))
    with override_budget("chat", routing="classifier", model=OPUS):
        answer = ai_budget.ask(LONG, feature="chat", max_tokens=2_000)

    router, row = rows()
    assert answer.model == OPUS
    assert router.status == Status.ESTIMATED
    assert "router failed (APITimeoutError)" in row.decision
    assert_balanced()


def test_a_classifier_that_costs_more_than_it_saves_is_not_asked(api: AnthropicSimulator) -> None:
    with override_budget("chat", routing="classifier", model="claude-haiku-4-5"):
        ai_budget.ask("Hi", feature="chat", max_tokens=1)

    assert asked_models(api) == ["claude-haiku-4-5"]
    assert "would cost what it can save" in only_row().decision


def test_a_user_without_a_call_left_pays_for_no_classifier(api: AnthropicSimulator) -> None:
    ada = UserFactory.create()
    UserQuota.objects.create(daily_calls=1)
    api.enqueue(SIMPLE)
    with override_budget("chat", routing="classifier", model=OPUS):
        ai_budget.ask(LONG, feature="chat", user=ada, max_tokens=2_000)
        with pytest.raises(QuotaExceeded):
            ai_budget.ask(LONG + "Once more", feature="chat", user=ada, max_tokens=2_000)

    assert len(api.requests) == 2
    assert_balanced()


# By a callable


def test_a_callable_says_which_model(api: AnthropicSimulator) -> None:
    asked: list[Question] = []

    def router(question: Question) -> str:
        asked.append(question)
        return SONNET

    answer = ai_budget.ask("Why?", feature="chat", model=OPUS, route=router, system="Be brief.")

    (question,) = asked
    assert answer.model == SONNET
    assert (question.text, question.feature, question.system) == ("Why?", "chat", "Be brief.")
    assert question.choices == (HAIKU, SONNET, OPUS)
    assert only_row().decision.startswith(f"callable: {SONNET}")


def test_a_callable_that_fails_leaves_the_features_model(
    api: AnthropicSimulator, caplog: pytest.LogCaptureFixture
) -> None:
    def router(question: Question) -> str:
        raise KeyError(question.text)

    answer = ai_budget.ask("the secret plan", feature="chat", model=OPUS, route=router)

    assert answer.model == OPUS
    assert "router failed (KeyError)" in only_row().decision
    assert "secret" not in caplog.text


# Together with the ladder and the cache


def test_a_routed_call_may_still_be_downgraded(api: AnthropicSimulator) -> None:
    ladder: Any = [(1, HAIKU)]
    api.enqueue(Reply(output_tokens=900))
    with override_budget("chat", routing="length", model=OPUS, daily_limit_usd=1, rungs=ladder):
        ai_budget.ask("Spend", feature="chat", model=OPUS, max_tokens=1_000)
        answer = ai_budget.ask("word " * 1_500, feature="chat")

    row = rows()[-1]
    assert (answer.requested_model, answer.model, answer.downgraded) == (SONNET, HAIKU, True)
    assert row.saved_reason == "routing, downgrade"
    assert row.saved_nanousd == ai_budget.price(OPUS, answer.message.usage) - answer.cost_nanousd


def test_a_routed_answer_is_found_again(api: AnthropicSimulator) -> None:
    with override_budget("chat", routing="length", model=OPUS, cache_scope="shared"):
        ai_budget.ask("Why?", feature="chat")
        again = ai_budget.ask("Why?", feature="chat")

    assert again.cached
    assert again.model == HAIKU


def test_a_classifier_that_finds_nothing_simple_is_asked_no_more(api: AnthropicSimulator) -> None:
    asked: dict[str, Any] = {"feature": "chat", "max_tokens": 40}
    with override_budget("chat", routing="classifier", model=SONNET):
        for number in range(40):
            api.enqueue(*[HARD] * (number < 20))
            ai_budget.ask(f"Why {number}?", **asked)

    routers = [row for row in rows() if row.kind == Kind.ROUTER]
    assert 3 <= len(routers) < 20
    assert "would cost what it can save" in rows()[-1].decision


def test_answers_that_are_short_are_not_worth_a_classifier(api: AnthropicSimulator) -> None:
    with override_budget("chat", model="claude-haiku-4-5"):
        for number in range(5):
            api.enqueue(Reply(text="No."))
            ai_budget.ask(f"Is {number} prime?", feature="chat")
    with override_budget("chat", routing="classifier", model="claude-haiku-4-5"):
        ai_budget.ask("Is 9 prime?", feature="chat")

    assert not [row for row in rows() if row.kind == Kind.ROUTER]
