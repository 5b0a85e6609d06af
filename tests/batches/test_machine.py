"""Any sequence of what can happen to batches: never over, nothing lost, nothing sent twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ai_budget import batches, money
from ai_budget.exceptions import AIBudgetError, BudgetExceeded
from ai_budget.guard.batch import api as api_of_batches
from ai_budget.guard.batch import results
from ai_budget.ledger import base as ledgers
from ai_budget.models import (
    Batch,
    BatchItem,
    BatchSubmission,
    CallLog,
    CallText,
    FeatureBudget,
    SpendWindow,
)
from ai_budget.periods import Period
from ai_budget.testing import (
    AnthropicSimulator,
    Canceled,
    CutBeforeResponse,
    CutStream,
    Errored,
    Expired,
    Fail,
    Pace,
    Reply,
    Results,
)
from ai_budget.testing.batches import Endpoint
from ai_budget.testing.steps import BatchStep, Outcome
from ai_budget.values import BalanceKey, Balances
from tests.batches.given import (
    DAY,
    FEATURE,
    HOUR,
    MINUTE,
    OVER,
    TAKE,
    assert_counted,
    bill,
    standing_still,
    submit,
    work,
)
from tests.batches.test_twice import killed_at
from tests.depth import deep

Found = TypeVar("Found")

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("emptied_row_by_row"),
]

LIMIT = 1_500_000
"""Nano-dollars a month: room for a few batches at a time."""

LONGEST = 9 * DAY
"""So long at most everything takes: the API has all results for longer."""

OUTCOMES: dict[str, Outcome] = {
    "answer": Reply(),
    "answer at length": Reply(output_tokens=45),
    "fail": Errored(),
    "be canceled": Canceled(),
    "expire": Expired(),
}
TROUBLES: list[tuple[Endpoint, BatchStep]] = [
    ("create", CutBeforeResponse(billed=True)),
    ("create", CutBeforeResponse()),
    ("create", Fail(status=429)),
    ("create", Fail(status=500)),
    ("create", Fail(status=400)),
    ("retrieve", Fail(status=404)),
    ("list", Fail(status=500)),
    ("cancel", CutBeforeResponse(billed=True)),
    ("results", CutStream(after_events=1)),
    ("results", Results(times=2)),
]
WHICH = st.integers(0, 50)
TIMES = st.sampled_from([timedelta(seconds=11), 6 * MINUTE, HOUR, 7 * HOUR, DAY, 2 * DAY])


class Machine(RuleBasedStateMachine):
    """A site that submits, workers that die, an API that fails, and people who decide."""

    api: AnthropicSimulator

    @initialize()
    def begin(self) -> None:
        for model in (BatchItem, BatchSubmission, Batch, CallText, CallLog, SpendWindow):
            model._default_manager.all().delete()
        forget_balances()
        FeatureBudget.objects.update_or_create(
            name=FEATURE, defaults={"monthly_limit_usd": money.to_usd(LIMIT)}
        )
        self.api.reset()
        self.api.batches.pace = Pace(seconds=1_000_000, canceling=1_000_000, done=0.5)
        self.api.batches.default = self.outcome
        self.taken = Counter[str]()
        self.standing = standing_still()
        self.clock = self.standing.__enter__()
        self.began = self.clock.at

    def outcome(self, custom_id: str, params: Any) -> Outcome:
        """Be asked by the API for every item that it takes."""
        self.taken[custom_id] += 1
        return OUTCOMES[params["messages"][0]["content"]]

    def teardown(self) -> None:
        """Whatever happened: in the end all is over, at what the provider charges."""
        if not hasattr(self, "standing"):
            return
        try:
            for _ in range(len(TROUBLES)):
                self.api.batches.end()
                self.clock.at += 8 * HOUR
                work()
            assert {batch.status for batch in self.batches()} <= {"finished"}
            assert {it.status for it in BatchSubmission.objects.all()} <= {"done"}
            self.the_books_are_right()
            assert sum(batch.spent_nanousd for batch in self.batches()) == bill(self.api)
            assert not any(batch.held_nanousd for batch in self.batches())
        finally:
            self.standing.__exit__(None, None, None)

    def batches(self) -> list[Batch]:
        return list(Batch.objects.order_by("pk"))

    # A site

    @rule(
        prompts=st.lists(st.sampled_from(sorted(OUTCOMES)), min_size=1, max_size=3),
        partly=st.booleans(),
    )
    def submit(self, prompts: list[str], partly: bool) -> None:
        with suppress(BudgetExceeded):
            submit(*prompts, on_result=TAKE, allow_partial=partly)

    @precondition(lambda self: self.batches())
    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        one_of(self.batches(), which).cancel()

    @precondition(lambda self: self.batches())
    @rule(which=WHICH)
    def resubmit(self, which: int) -> None:
        """What can be submitted again, if there is anything and it fits."""
        with suppress(AIBudgetError, ValueError):
            one_of(self.batches(), which).resubmit()

    # Workers

    @rule()
    def work(self) -> None:
        work()

    @precondition(lambda self: self.clock.at < self.began + LONGEST)
    @rule(by=TIMES)
    def wait(self, by: timedelta) -> None:
        self.clock.at += by
        work()

    @precondition(lambda self: self.clock.at < self.began + LONGEST)
    @rule(point=st.integers(1, 150), after=TIMES)
    def die(self, point: int, after: timedelta) -> None:
        """And be followed by another."""
        self.clock.at += after
        killed_at(point, work)
        self.clock.at += OVER
        work()
        ledgers.current().tidy()

    @rule()
    def read_results_once_more(self) -> None:
        for submission in BatchSubmission.objects.exclude(api_id=None).select_related("batch"):
            with suppress(api_of_batches.Unavailable):
                results.settle_results(
                    submission, list(api_of_batches.results(str(submission.api_id)))
                )

    # The API

    @precondition(lambda self: self.api.batches.ids)
    @rule(which=WHICH, expire=st.booleans())
    def end(self, which: int, expire: bool) -> None:
        end = self.api.batches.expire if expire else self.api.batches.end
        end(one_of(self.api.batches.ids, which))

    @rule(trouble=st.sampled_from(TROUBLES))
    def fail(self, trouble: tuple[Endpoint, BatchStep]) -> None:
        self.api.batches.script(*trouble)

    # People, who know what the API never had

    @precondition(lambda self: self.never_taken())
    @rule(which=WHICH, again=st.booleans())
    def decide(self, which: int, again: bool) -> None:
        decide = batches.send_again if again else batches.release
        decide(one_of(self.never_taken(), which))

    def never_taken(self) -> list[BatchSubmission]:
        uncertain = BatchSubmission.objects.filter(status="uncertain")
        return [
            submission
            for submission in uncertain.select_related("batch")
            if not any(item.custom_id in self.taken for item in submission.items.all())
        ]

    # What must hold

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "clock"):
            return
        for batch in self.batches():
            assert_counted(batch)
        assert set(self.taken.values()) <= {1}
        first = self.began.date().replace(day=1)
        key = BalanceKey(f"feature:{FEATURE}", Period.MONTH, first)
        balance = ledgers.current().balances([key]).get(key, Balances())
        assert balance.spent_nanousd + balance.held_nanousd <= LIMIT


def forget_balances() -> None:
    """Forget what is kept elsewhere than in the database."""
    ledger: Any = ledgers.current()
    if ledger.needs_redis:
        for key in ledger.client.scan_iter(match=f"{ledger.prefix}:*", count=1_000):
            ledger.client.unlink(key)


def one_of(found: Sequence[Found], which: int) -> Found:
    return found[which % len(found)]


def test_whatever_happens_nothing_is_lost_or_sent_twice(api: AnthropicSimulator) -> None:
    class OfTest(Machine):
        pass

    OfTest.api = api
    run_state_machine_as_test(
        OfTest,
        settings=settings(
            max_examples=deep(200, else_=5),
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
