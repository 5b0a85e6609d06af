"""Answers that are not asked for twice: which questions may be kept, and what becomes of one.

The store itself is ``savings.response_cache``; what is decided here is whose answers are whose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.guard import endpoints
from ai_budget.guard.charge import HELPERS, OpenCall
from ai_budget.policy.limits import Budget, Rules
from ai_budget.savings import response_cache
from ai_budget.savings.response_cache import Claim, Kept, Place
from ai_budget.values import Charge

SHORTEST_LEASE = 10.0
"""Seconds that the others wait at least for whoever asks, before one of them takes over."""

TOKENS_A_SECOND = 40
"""What a slow model writes: the longer an answer may be, the longer it is waited for."""

LONGEST_LEASE = 300.0

FIRST_LOOK_SECONDS = 0.02
LONGEST_LOOK_SECONDS = 0.25
"""How soon a waiting call looks again whether the answer is there: soon at first, then rarely."""

_WITH_A_STATE = frozenset({"container", "mcp_servers", "thread"})
"""Parameters by which an answer depends on more than the request, or changes more than it says."""

_WITHOUT_EFFECT = frozenset({"stream"})
"""Parameters that change how an answer arrives, and not what it says."""

_OF_THE_WIRE = ("x-stainless-", "accept", "idempotency-key", "user-agent")
"""How headers begin that say nothing of the answer. Whose key it is may say something."""


_OF_THE_ACCOUNT = ("x-api-key", "authorization", "anthropic-workspace-id")
"""Headers that say who calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How the answers of a call are kept: whose they are, and for how many seconds."""

    scope: str
    ttl: float


def setting_of(call: OpenCall | None, feature: Budget) -> Setting | None:
    """Return how a call's answer is kept, by what it says itself and by its feature's budget.

    What the call says wins over a feature that says nothing ("off"); a feature that says
    "private" is not made "shared" by a call. What only helps a call is kept if it says so.
    """
    asked = call.cache if call is not None else None
    if asked is None:
        asked = "off" if call is not None and call.kind in HELPERS else feature.cache_scope
    scope = asked
    if scope == "shared" and feature.cache_scope == "private":
        scope = "private"
    ttl = feature.cache_ttl if call is None or call.ttl is None else call.ttl
    return None if scope == "off" or ttl <= 0 else Setting(scope=scope, ttl=ttl)


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What beside its body decides what a request is answered."""

    url: str
    base_url: str
    provider: str
    region: str
    headers: Mapping[str, Any] = field(repr=False)
    client_headers: Mapping[str, Any] = field(repr=False)
    query: Mapping[str, Any] = field(repr=False)

    @property
    def account(self) -> str:
        """Whose prompt caches the API reads and writes: those of an account at an address."""
        sent = _sent(self.client_headers, self.headers)
        return json.dumps([self.base_url, *(sent.get(name, "") for name in _OF_THE_ACCOUNT)])

    def named(self) -> dict[str, Any]:
        """Return it as a part of a question."""
        return {
            "path": endpoints.normalize(self.url),
            "base_url": self.base_url,
            "provider": self.provider,
            "region": self.region,
            "headers": _sent(self.client_headers, self.headers),
            "query": {name: str(value) for name, value in self.query.items()},
            "query_of_path": urlsplit(self.url).query,
        }


def surroundings_of(client: Any) -> Surroundings:
    """Return what an ordinary message of a client is sent with."""
    return Surroundings(
        url="/v1/messages",
        base_url=str(client.base_url),
        provider="anthropic",
        region="",
        headers={},
        client_headers=client.default_headers,
        query=client.default_query,
    )


def _sent(*layers: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers that are sent; later layers win, and what is no text takes one away."""
    named = {name.lower(): value for headers in layers for name, value in headers.items()}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, str) and not name.startswith(_OF_THE_WIRE)
    }


def place_of(
    body: Mapping[str, Any],
    around: Surroundings,
    charge: Charge,
    rules: Rules,
    *,
    scope: str,
    stream: bool,
) -> Place | None:
    """Return where the answer to a request is kept; None where it must not be.

    A caller without an account or a subject has no private answers. The frames that Bedrock
    streams in are not replayed.
    """
    if body.keys() & _WITH_A_STATE or (stream and around.provider == "bedrock"):
        return None
    question = {
        "body": {name: value for name, value in body.items() if name not in _WITHOUT_EFFECT},
        "around": around.named(),
    }
    return response_cache.place_of(
        question,
        scope=scope,
        feature=charge.feature,
        owner=owner_of(charge.user_id, charge.subject),
        # By name: a feature that moves to another category must not find what was forgotten.
        versions=[f"{budget.name} {budget.cache_version}" for budget in rules.budgets],
    )


def owner_of(user_id: Any, subject: str) -> tuple[str, ...]:
    """Return whose private answers are kept, and forgotten; () for nobody's."""
    user = () if user_id is None else ("user", str(user_id))
    return (*user, "subject", subject) if subject else user


class Asking:
    """One question on its way through the cache: found, waited for, or claimed and asked.

    ``asker`` is the thread or the task that asks.
    """

    def __init__(
        self, place: Place, setting: Setting, *, max_tokens: int, at: datetime, asker: int
    ) -> None:
        self.setting = setting
        self._asker = asker
        self.place = place
        self._at, self._since = at, periods.monotonic()
        self._lease = min(LONGEST_LEASE, SHORTEST_LEASE + max_tokens / TOKENS_A_SECOND)
        self._look_again = FIRST_LOOK_SECONDS
        self._claim: Claim | None = None

    @property
    def claimed(self) -> bool:
        """Whether it is ours to ask, and others wait for what we get."""
        return self._claim is not None

    def answer(self) -> Kept | float | None:
        """Return the answer, or in how many seconds to look again; None says to ask for it.

        Nobody waits longer than two of those who ask could take.
        """
        if self._claim is not None:
            return None
        waited = periods.monotonic() - self._since
        at = self._at + timedelta(seconds=waited)
        kept = response_cache.look_up(self.place, at=at, ttl=self.setting.ttl)
        if kept is not None:
            return kept
        if waited > 2 * self._lease or _asked_by.get(self.place) == self._asker:
            return None
        claim = response_cache.claim(self.place, at=at, seconds=self._lease)
        if not isinstance(claim, Claim):
            pause, self._look_again = self._look_again, self._look_again * 1.5
            return min(pause, LONGEST_LOOK_SECONDS)
        self._claim = claim
        if len(_asked_by) >= _MOST_ASKED:
            _asked_by.clear()  # of streams that were dropped unread, mostly
        _asked_by[self.place] = self._asker
        # Whoever had the claim before may have kept the answer just now.
        kept = response_cache.look_up(self.place, at=at, ttl=self.setting.ttl)
        if kept is not None:
            self.give_up()
        return kept

    def keep(self, message: Mapping[str, Any], kept_for: float, *, cost: int, model: str) -> None:
        """Keep an answer that came, if it is one to keep, for at most so many seconds."""
        if self._claim is None:
            return
        if message.get("stop_reason") not in conf.CACHE_STOP_REASONS or message.get("container"):
            self.cannot_keep()
            return
        at = self._at + timedelta(seconds=periods.monotonic() - self._since)
        text = json.dumps(message, separators=(",", ":"))
        kept = Kept(message=text, cost_nanousd=cost, model=model, kept_at=at)
        _asked_by.pop(self.place, None)
        self._claim.store(kept, seconds=min(kept_for, self.setting.ttl))

    def cannot_keep(self) -> None:
        """Let all who wait ask for themselves, at once: there is an answer that is not kept."""
        if self._claim is not None:
            _asked_by.pop(self.place, None)
            self._claim.release(uncacheable=True)

    def give_up(self) -> None:
        """Let another ask, if nothing was kept. Asked again, it is found, waited for or claimed."""
        if self._claim is not None:
            _asked_by.pop(self.place, None)
            self._claim.release()
            self._claim = None


_asked_by: dict[Place, int] = {}
"""Who asks what in this process: nobody waits for an answer that only they can read on."""

_MOST_ASKED = 10_000
