"""The response cache: what is kept where, who finds it, who asks, and what a bad cache costs."""

from __future__ import annotations

import binascii
import json
import logging
import os
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches
from django.core.management import call_command
from django.test import override_settings
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.conf import Settings
from ai_budget.savings import response_cache
from ai_budget.savings.digest_keys import apart
from ai_budget.savings.response_cache import (
    Busy,
    Claim,
    Kept,
    Place,
    claim,
    forget_owner,
    look_up,
    place_of,
)
from tests.contention.redis_server import BINARY, RedisServer
from tests.depth import deep
from tests.processes import start
from tests.savings import askers
from tests.savings.askers import PATIENCE, django_redis

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
QUESTION = {
    "model": "claude-haiku-5-5",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "Where does Agnes live?"}],
}
MESSAGE = '{"type": "message", "content": [{"type": "text", "text": "In Zürich.\\n"}]}'
ANSWER = Kept(message=MESSAGE, cost_nanousd=12_345, model="claude-haiku-5-5", kept_at=NOON)
HOUR = 3600
ANNA, BERT = ("user", "1"), ("user", "2")
LOCMEM = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "LOCATION": "answers"}


def named(name: str) -> dict[str, Any]:
    return {"default": {"BACKEND": f"tests.savings.backends.{name}", "LOCATION": "answers"}}


def shared(question: Mapping[str, Any] = QUESTION, **given: Any) -> Place:
    return somewhere(question, **{"scope": "shared", "owner": (), **given})


def private(owner: Sequence[str] = ANNA, question: Mapping[str, Any] = QUESTION) -> Place:
    return somewhere(question, scope="private", owner=owner)


def somewhere(question: Mapping[str, Any], **given: Any) -> Place:
    place = place_of(question, **{"feature": "faq", "versions": (1, 1), **given})
    assert place is not None
    return place


def the_right(place: Place, *, at: datetime = NOON, seconds: float = 30) -> Claim:
    right = claim(place, at=at, seconds=seconds)
    assert isinstance(right, Claim)
    return right


def keep(place: Place, answer: Kept = ANSWER, *, seconds: float = HOUR) -> None:
    the_right(place).store(answer, seconds=seconds)


def found(place: Place, *, at: datetime = NOON, ttl: float | None = HOUR) -> Kept | None:
    return look_up(place, at=at, ttl=ttl)


def later(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


@pytest.fixture(autouse=True)
def a_site_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(response_cache, "_quiet_until", float("-inf"))
    with override_settings(CACHES={"default": LOCMEM}), apart():
        yield
        caches["default"].clear()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    one = RedisServer(tmp_path_factory.mktemp("redis"))
    yield one
    one.stop()


@pytest.fixture
def redis(server: RedisServer) -> RedisServer:
    if BINARY is None:
        pytest.skip("there is no redis-server to start")
    server.make_ready()
    return server


@pytest.fixture(
    params=[
        "locmem",
        "elsewhere",
        "file",
        pytest.param("database", marks=pytest.mark.django_db),
        "django-redis",
        "json",
        "django",
    ]
)
def any_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each kind of cache, empty."""
    kind = request.param
    if kind == "locmem":
        yield kind
        return
    if kind == "elsewhere":
        chosen = named("Elsewhere")
    elif kind == "file":
        file = "django.core.cache.backends.filebased.FileBasedCache"
        chosen = {"default": {"BACKEND": file, "LOCATION": str(tmp_path)}}
    elif kind == "database":
        table = "django.core.cache.backends.db.DatabaseCache"
        chosen = {"default": {"BACKEND": table, "LOCATION": "answers"}}
    else:
        url = request.getfixturevalue("redis").url
        own = {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": url}
        as_json = "django_redis.serializers.json.JSONSerializer"
        chosen = {
            "django-redis": django_redis(url),
            "json": django_redis(url, SERIALIZER=as_json),
            "django": {"default": {**own, "KEY_PREFIX": "shop"}},
        }[kind]
    with override_settings(CACHES=chosen):
        if kind == "database":
            call_command("createcachetable", verbosity=0)
        yield kind
        caches["default"].clear()
        caches["default"].close()


# Keeping and finding ------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_cache")
def test_in_every_cache_an_answer_is_found_as_it_was() -> None:
    for place in (shared(), private(), private(("user", "1", "subject", "acme"))):
        assert found(place) is None
        keep(place)
        assert found(place) == ANSWER


@pytest.mark.usefixtures("any_cache")
def test_in_every_cache_one_asks_and_the_others_wait_for_the_answer() -> None:
    for place in (shared(), private()):
        right = the_right(place)
        assert claim(place, at=NOON, seconds=30) == Busy()
        right.store(ANSWER, seconds=HOUR)
        assert claim(place, at=NOON, seconds=30) == Busy()  # it looked before the answer was there
        assert found(place) == ANSWER


@pytest.mark.usefixtures("any_cache")
def test_in_every_cache_who_gives_up_lets_another_ask() -> None:
    the_right(shared()).release()
    the_right(shared())
    assert claim(shared(), at=NOON, seconds=30) == Busy()


@pytest.mark.usefixtures("any_cache")
def test_in_every_cache_an_owner_is_forgotten_in_every_feature_and_nobody_else() -> None:
    features = [somewhere(QUESTION, scope="private", owner=ANNA, feature=f) for f in ("a", "b")]
    for place in (*features, private(BERT), shared()):
        keep(place)
    assert forget_owner(ANNA)
    assert [found(place) for place in features] == [None, None]
    assert found(private(BERT)) == found(shared()) == ANSWER


@pytest.mark.usefixtures("any_cache")
def test_in_every_cache_what_was_claimed_before_forgetting_is_not_found_after_it() -> None:
    right = the_right(private())
    forget_owner(ANNA)
    right.store(ANSWER, seconds=HOUR)
    assert found(private()) is None
    keep(private())  # and nobody waits for it
    assert found(private()) == ANSWER


@pytest.mark.usefixtures("any_cache")
def test_in_every_cache_a_long_answer_is_compressed_and_found_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Settings, "CACHE_COMPRESS_ABOVE", 100)
    long = replace(ANSWER, message=json.dumps({"text": "Zürich " * 1000}, ensure_ascii=False))
    keep(shared(), long)
    assert len(caches["default"].get(shared().key)) < 1000
    assert found(shared()) == long


def test_a_short_answer_is_kept_as_text_that_one_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "CACHE_COMPRESS_ABOVE", 10_000)
    keep(shared())
    header, _, message = caches["default"].get(shared().key).partition("\n")
    assert message == MESSAGE
    assert json.loads(header)[1:] == [1, NOON.isoformat(), HOUR, 12_345, ANSWER.model, "", None]


def test_a_subject_is_forgotten_whichever_user_asked() -> None:
    both = private(("user", "1", "subject", "acme"))
    keep(private(BERT))
    for forgotten in (("subject", "acme"), ANNA):
        keep(both)
        assert found(both) == ANSWER
        forget_owner(forgotten)
        assert found(both) is None
    assert found(private(BERT)) == ANSWER


def test_an_answer_is_found_up_to_the_age_that_is_asked_for() -> None:
    keep(shared())
    assert found(shared(), at=later(600), ttl=600) == ANSWER
    assert found(shared(), at=later(600.001), ttl=600) is None


def test_an_answer_is_found_no_longer_than_it_was_kept_for() -> None:
    keep(shared(), seconds=60.5)
    assert found(shared(), at=later(60.5)) == ANSWER
    assert found(shared(), at=later(60.501)) is None


@pytest.mark.parametrize("ttl", [None, 0, -1, float("nan")])
def test_without_a_life_nothing_is_found(ttl: float | None) -> None:
    keep(shared())
    assert found(shared(), ttl=ttl) is None


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_without_a_life_nothing_is_kept_and_nobody_waits(seconds: float) -> None:
    keep(shared(), seconds=seconds)
    assert found(shared()) is None
    the_right(shared())


@pytest.mark.parametrize("seconds", [0.01, 31 * 24 * HOUR, 1e12, float("inf")])
def test_every_other_life_is_one_that_caches_take(seconds: float) -> None:
    keep(shared(), seconds=seconds)
    assert found(shared()) == ANSWER


def test_an_answer_of_the_future_is_not_found_but_for_what_clocks_differ() -> None:
    keep(shared())
    assert found(shared(), at=later(-60)) == ANSWER
    assert found(shared(), at=later(-60.001)) is None


@pytest.mark.parametrize(
    "answer",
    [
        replace(ANSWER, cost_nanousd=-1),
        replace(ANSWER, message="\ud800"),
        replace(ANSWER, kept_at=NOON.replace(tzinfo=None)),
    ],
)
def test_what_is_no_answer_is_not_found(answer: Kept) -> None:
    keep(shared(), answer)
    assert found(shared()) is None


def test_a_message_too_long_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_cache, "MOST_BYTES", len(MESSAGE.encode()) - 1)
    keep(shared())
    assert found(shared()) is None
    the_right(shared())


def test_an_answer_is_found_again_from_every_moment_of_a_cache_in_memory() -> None:
    """Reading it once must not outlive the entry."""
    keep(shared())
    assert found(shared()) == ANSWER
    keep_again = replace(ANSWER, message='"another"', cost_nanousd=1)
    the_right(shared(), at=later(60)).store(keep_again, seconds=HOUR)
    assert found(shared()) == keep_again
    caches["default"].clear()
    assert found(shared()) is None


# Whose ------------------------------------------------------------------------------------------


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"x": value}
    return value


@pytest.mark.parametrize("owner", [(), []])
def test_nobody_has_no_private_answers(owner: Sequence[str]) -> None:
    assert place_of(QUESTION, scope="private", feature="f", owner=owner, versions=()) is None


@pytest.mark.parametrize("scope", ["off", "", "Shared", "public"])
def test_of_another_scope_nothing_is_kept(scope: str) -> None:
    assert place_of(QUESTION, scope=scope, feature="f", owner=ANNA, versions=()) is None


@pytest.mark.parametrize(
    "question",
    [
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": b"bytes"},
        {"x": {1, 2}},
        {"x": NOON},
        {"x": "\ud83d\ude00"},  # two halves, which a request cannot carry
        {("a", "b"): 1},
        {1: "x", "1": "y"},
        nested(200_000),
    ],
    ids=["nan", "inf", "bytes", "set", "datetime", "halves", "tuple", "mixed", "deep"],
)
def test_what_is_no_json_is_not_kept(question: Mapping[str, Any]) -> None:
    assert place_of(question, scope="shared", feature="f", owner=(), versions=()) is None


def test_what_contains_itself_is_not_kept() -> None:
    question: dict[str, Any] = {}
    question["x"] = question
    assert place_of(question, scope="shared", feature="f", owner=(), versions=()) is None


def test_the_order_of_keys_is_no_difference() -> None:
    assert shared({"a": {"x": 1, "y": 2}, "b": 3}) == shared({"b": 3, "a": {"y": 2, "x": 1}})


def test_shared_answers_are_one_whoever_asks() -> None:
    assert shared(owner=ANNA) == shared(owner=BERT) == shared()


def test_another_secret_is_another_place() -> None:
    before = private()
    with override_settings(SECRET_KEY="another"):
        assert not {private().key, *private().owner_keys} & {before.key, *before.owner_keys}
    with override_settings(SECRET_KEY=b"bytes " * 50):
        assert private() != before


# Few letters, and those that might be taken for another, so that many pairs nearly meet.
texts = st.text('1u,"[\\é', max_size=3) | st.sampled_from(
    ["null", "e\u0301", "\u00e9", "\U0001f600", "private", "true"]
)
atoms = (
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.sampled_from([0.0, -0.0, 1.0, 1e22, 10**22])
    | texts
)
values = st.recursive(
    atoms, lambda v: st.lists(v, max_size=2) | st.dictionaries(texts, v, max_size=2), max_leaves=4
)
inputs = st.fixed_dictionaries(
    {
        "question": st.dictionaries(texts, values, max_size=2),
        "scope": st.sampled_from(["private", "shared"]),
        "feature": texts,
        "owner": st.lists(texts, min_size=1, max_size=4).map(tuple),
        "versions": st.lists(st.integers(0, 2), max_size=2).map(tuple),
    }
)


def strictly(value: Any) -> Any:
    """What a value is, and of which kind: Python has 1 == 1.0 == True."""
    if isinstance(value, dict):
        return "object", frozenset((key, strictly(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return "array", tuple(strictly(one) for one in value)
    return type(value).__name__, repr(value)


def place_with(given: Mapping[str, Any]) -> Place:
    return somewhere(**given)


@given(one=inputs, other=inputs, data=st.data())
@hypothesis_settings(max_examples=deep(500, else_=120))
def test_two_questions_have_one_place_only_if_they_are_the_same(
    one: dict[str, Any], other: dict[str, Any], data: st.DataObject
) -> None:
    # Mostly the same, or hardly any pair would meet but for one part.
    kept = data.draw(st.sets(st.sampled_from(sorted(one))))
    other = {name: one[name] if name in kept else value for name, value in other.items()}
    mine, yours = place_with(one), place_with(other)
    asked = [
        strictly({**given, "owner": given["owner"] if given["scope"] == "private" else ()})
        for given in (one, other)
    ]
    assert (mine == yours) == (mine.key == yours.key) == (asked[0] == asked[1])


@given(one=inputs, other=inputs)
def test_what_is_moved_to_another_place_is_not_found(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    mine, yours = place_with(one), place_with(other)
    assume(mine != yours)
    for place in (mine, yours):
        keep(place)
        caches["default"].delete(place.key + ":ask")
    caches["default"].set(yours.key, caches["default"].get(mine.key))
    assert found(yours) is None
    assert found(mine) == ANSWER


@given(value=st.dictionaries(texts, values, max_size=3))
def test_the_canonical_text_is_that_of_json(value: dict[str, Any]) -> None:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert response_cache._canonical(value) == text.encode()


def test_it_is_the_same_where_python_has_no_encoder_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    question = {"b": ["Zürich", 1, 1.0, None], "a": {"é": True}}
    before = shared(question)
    monkeypatch.setattr(response_cache, "_chunks", None)
    assert shared(question) == before
    nan = {"x": float("nan")}
    assert place_of(nan, scope="shared", feature="f", owner=(), versions=()) is None
    monkeypatch.setattr("json.encoder.c_make_encoder", None)
    assert response_cache._make_chunks() is None


def test_a_key_fits_every_cache_and_tells_nothing() -> None:
    place = private(("user", "agnes@example.com"))
    for key in (place.key, *place.owner_keys):
        assert 20 <= len(key) <= 30
        assert key.isascii()
        assert key.isprintable()
        assert " " not in key
    assert "agnes" not in repr(place).lower()
    assert repr(place.seal) not in repr(place)
    assert "Zürich" not in repr(ANSWER)


def test_no_text_reaches_the_keys_of_the_cache_or_its_locks() -> None:
    with override_settings(CACHES=named("Elsewhere")):
        keep(private(("user", "agnes")))
        the_right(private(("user", "agnes"), {"x": "Agnes"}))
        kept: Any = caches["default"]
        everything = [key.lower() for key in kept._cache]
        assert len(everything) == 4  # an answer, a generation, a note, a lock
        assert not [key for key in everything if "agnes" in key]
        kept.clear()


# What is not sound --------------------------------------------------------------------------------

junk = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary()
    | st.text()
    | st.lists(st.text())
    | st.dictionaries(st.text(), st.integers())
)


@given(value=junk, generation=junk, lock=junk)
@pytest.mark.parametrize("backend", ["Elsewhere", "locmem"])
def test_whatever_is_in_the_cache_is_at_worst_a_miss(
    backend: str, value: Any, generation: Any, lock: Any
) -> None:
    place = private()
    with override_settings(CACHES={"default": LOCMEM} if backend == "locmem" else named(backend)):
        caches["default"].set(place.key, value)
        caches["default"].set(place.owner_keys[0], generation)
        caches["default"].set(place.key + ":ask", lock)
        assert found(place) is None
        right = claim(place, at=NOON, seconds=30)
        assert isinstance(right, Claim | Busy)
        if isinstance(right, Claim):
            right.store(ANSWER, seconds=HOUR)
            assert found(place) == ANSWER
        caches["default"].clear()


def entry(place: Place) -> str:
    keep(place)
    caches["default"].delete(place.key + ":ask")
    return str(caches["default"].get(place.key))


@given(data=st.data())
@hypothesis_settings(max_examples=deep(300, else_=80))
def test_an_entry_that_was_changed_anywhere_is_a_miss(data: st.DataObject) -> None:
    place = shared()
    value = entry(place)
    start = data.draw(st.integers(0, len(value) - 1))
    end = data.draw(st.integers(start, min(len(value), start + 3)))
    changed = value[:start] + data.draw(st.text(max_size=3)) + value[end:]
    assume(changed != value)
    caches["default"].set(place.key, changed)
    assert found(place) is None


headers = st.lists(
    atoms | st.floats() | st.sampled_from([1, NOON.isoformat(), HOUR, 12_345, "m", "", None]),
    max_size=9,
)


@given(header=headers | values, body=st.text())
def test_a_header_that_says_something_else_is_a_miss(header: Any, body: str) -> None:
    """Sealed as ours are: of a version to come, or of a mistake of ours."""
    place = shared()
    rest = json.dumps(header)[1:] + "\n" + body
    assume(_encodes(rest))
    caches["default"].set(place.key, f'["{response_cache._seal(rest, place)}",{rest}')
    assert found(place) is None


def _encodes(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


@pytest.mark.parametrize(
    ("position", "value"),
    [
        *((0, value) for value in (2, 0, None, "1")),
        *((1, value) for value in ("x", None, "2026-11-22T12:00:00", 1_795_000_000)),
        *((2, value) for value in (0, -1, float("nan"), "x", None)),
        *((3, value) for value in (-1, 1.5, True, "1", None)),
        (4, None),
        (5, "another"),
        *((6, value) for value in (1, "x", True)),
    ],
)
def test_each_part_of_the_header_counts(position: int, value: Any) -> None:
    place = shared()
    good: list[Any] = [1, NOON.isoformat(), HOUR, 12_345, ANSWER.model, "", None]
    for header, answer in (
        (good, ANSWER),
        ([*good[:position], value, *good[position + 1 :]], None),
    ):
        rest = json.dumps(header)[1:] + "\n" + MESSAGE
        caches["default"].set(place.key, f'["{response_cache._seal(rest, place)}",{rest}')
        assert found(place) == answer


@pytest.mark.parametrize(
    "size", [-1, 0, 999, 1001, 64 * 1024 * 1024 + 1, 10**30], ids=lambda size: f"{size}"
)
def test_an_entry_unfolds_to_the_size_it_says_and_no_further(size: int) -> None:
    place = shared()
    body = binascii.b2a_base64(zlib.compress(b" " * 1000), newline=False).decode()
    for said, sound in ((1000, True), (size, False)):
        header = [1, NOON.isoformat(), HOUR, 1, "m", "", said]
        rest = json.dumps(header)[1:] + "\n" + body
        caches["default"].set(place.key, f'["{response_cache._seal(rest, place)}",{rest}')
        assert (found(place) is not None) == sound


def test_an_entry_unfolds_to_no_more_than_a_message_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Settings, "CACHE_COMPRESS_ABOVE", 0)
    keep(shared())
    monkeypatch.setattr(response_cache, "MOST_BYTES", len(MESSAGE.encode()) - 1)
    assert found(shared()) is None


def test_a_compressed_message_that_was_cut_is_a_miss() -> None:
    place = shared()
    whole = zlib.compress(b" " * 1000)
    for folded, sound in ((whole, True), (whole[:-4], False)):
        header = [1, NOON.isoformat(), HOUR, 1, "m", "", 1000]
        body = binascii.b2a_base64(folded, newline=False).decode()
        rest = json.dumps(header)[1:] + "\n" + body
        caches["default"].set(place.key, f'["{response_cache._seal(rest, place)}",{rest}')
        assert (found(place) is not None) == sound


# Owners' generations ------------------------------------------------------------------------------


def test_a_generation_that_was_evicted_takes_its_answers_with_it_for_ever() -> None:
    with override_settings(CACHES=named("Elsewhere")):
        place = private()
        keep(place)
        caches["default"].delete(place.owner_keys[0])
        assert found(place) is None
        # The next who asks begins another generation.
        caches["default"].delete(place.key + ":ask")
        the_right(place).release()
        assert caches["default"].get(place.owner_keys[0]) is not None
        assert found(place) is None


def test_a_generation_lives_on_while_answers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with override_settings(CACHES=named("Elsewhere")):
        kept: Any = caches["default"]
        place = private()
        right = the_right(place)
        monkeypatch.setattr(time, "time", lambda real=time.time: real() + 20 * 24 * HOUR)
        right.store(ANSWER, seconds=HOUR)
        expires = kept._expire_info[kept.make_key(place.owner_keys[0])]
        assert expires > time.time() + 29 * 24 * HOUR
        right = the_right(private(question={"x": 1}))
        right.store(ANSWER, seconds=90 * 24 * HOUR)
        expires = kept._expire_info[kept.make_key(place.owner_keys[0])]
        assert expires > time.time() + 89 * 24 * HOUR


def test_who_begins_a_generation_at_the_same_time_shares_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with override_settings(CACHES=named("Elsewhere")):
        cache, one, two = caches["default"], private(), private(question={"x": 1})
        add = cache.add

        def add_after_another(key: str, *args: Any, **kwargs: Any) -> bool:
            if key in one.owner_keys:
                monkeypatch.setattr(cache, "add", add)
                keep(two)
            return add(key, *args, **kwargs)

        monkeypatch.setattr(cache, "add", add_after_another)
        keep(one)
        assert found(one) == found(two) == ANSWER


def test_more_owners_than_memory_has_room_for_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(response_cache, "_MOST_OWNERS", 2)
    response_cache._generations_here.clear()
    places = [private(("user", str(number))) for number in range(8)]
    for place in places:
        keep(place)
        assert found(place) == ANSWER
    assert len(response_cache._generations_here) <= 3
    assert found(places[0]) is None
    the_right(places[0]).release()
    assert found(places[0]) is None


def test_more_entries_than_memory_has_room_for_are_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(response_cache, "_MOST_HERE", 2)
    monkeypatch.setattr(response_cache, "_LONGEST_HERE", 500)
    response_cache._entries_here.clear()
    places = [shared({"x": number}) for number in range(8)]
    long = replace(ANSWER, message=" " * 500)
    for place in places:
        keep(place)
    keep(shared({"long": 1}), long)
    for _ in range(2):
        assert [found(place) for place in places] == [ANSWER] * 8
        assert found(shared({"long": 1})) == long
        assert shared({"long": 1}).key not in response_cache._entries_here
        assert len(response_cache._entries_here) <= 2


def test_what_was_read_is_of_its_whole_place() -> None:
    """Of two questions whose keys are the same by chance, only one finds the answer."""
    keep(shared())
    assert found(shared()) == ANSWER
    assert found(replace(shared(), seal=b"another")) is None


def test_what_is_forgotten_is_not_in_memory_either() -> None:
    keep(private())
    assert found(private()) == ANSWER
    forget_owner(ANNA)
    assert not [kept for *_, kept in response_cache._entries_here.values() if ANSWER in kept]


# Claims -------------------------------------------------------------------------------------------


def test_the_end_of_a_claim_that_comes_first_counts() -> None:
    right = the_right(shared())
    right.release()
    right.store(ANSWER, seconds=HOUR)
    right.release(uncacheable=True)
    assert found(shared()) is None
    right = the_right(shared())
    right.store(ANSWER, seconds=HOUR)
    right.release(uncacheable=True)
    assert found(shared()) == ANSWER
    assert claim(shared(), at=NOON, seconds=30) == Busy()


def test_who_lost_the_lock_does_not_take_it_from_another() -> None:
    late = the_right(shared())
    caches["default"].delete(shared().key + ":ask")  # its seconds are over
    the_right(shared())
    late.release()
    assert claim(shared(), at=NOON, seconds=30) == Busy()


def test_an_answer_that_may_not_be_kept_lets_all_go_ahead_for_a_moment() -> None:
    right = the_right(shared())
    assert claim(shared(), at=NOON, seconds=30) == Busy()
    right.release(uncacheable=True)
    rights = [the_right(shared()) for _ in range(3)]
    assert found(shared()) is None
    rights[0].release()  # gives back what it does not have
    the_right(shared())
    rights[1].store(ANSWER, seconds=HOUR)
    assert found(shared()) == ANSWER


def test_who_finds_nothing_later_does_not_wait_for_what_was_kept_before() -> None:
    keep(shared(), seconds=60)
    assert found(shared(), at=later(61)) is None
    the_right(shared(), at=later(61))


def test_a_claim_is_no_longer_there_than_it_was_taken_for(monkeypatch: pytest.MonkeyPatch) -> None:
    the_right(shared(), seconds=7.5)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7)
    assert claim(shared(), at=NOON, seconds=30) == Busy()
    monkeypatch.setattr(time, "time", lambda: real() + 8.1)
    the_right(shared())


def test_a_claim_is_there_for_a_moment_at_least() -> None:
    the_right(shared(), seconds=0)
    assert claim(shared(), at=NOON, seconds=30) == Busy()


def test_a_claim_that_ends_between_two_looks_is_free_to_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = the_right(shared())
    cache = caches["default"]
    get = cache.get

    def get_after_its_end(key: str, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(cache, "get", get)
        right.release()
        return get(key, *args, **kwargs)

    monkeypatch.setattr(cache, "get", get_after_its_end)
    the_right(shared())
    assert claim(shared(), at=NOON, seconds=30) == Busy()


# A cache that fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Down", "Silent"])
def test_a_cache_that_is_down_is_a_miss_and_everybody_asks(kind: str) -> None:
    with override_settings(CACHES=named(kind)):
        for place in (shared(), private()):
            for _ in range(2):
                assert found(place) is None
                right = the_right(place)
            right.store(ANSWER, seconds=HOUR)
            the_right(place).release()
            the_right(place).release(uncacheable=True)
        forgotten = forget_owner(ANNA)
    assert forgotten == (kind == "Silent")


def test_a_dummy_cache_makes_nobody_wait() -> None:
    dummy = {"default": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}}
    with override_settings(CACHES=dummy):
        for place in (shared(), private()):
            for _ in range(3):
                the_right(place).store(ANSWER, seconds=HOUR)
            assert found(place) is None


def test_a_failing_cache_is_told_once_in_a_while_by_the_kind_of_its_error_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with override_settings(CACHES=named("Down")), caplog.at_level(logging.DEBUG):
        for now in (1000.0, 1009.9, 1010.0):
            monkeypatch.setattr(periods, "monotonic", lambda at=now: at)
            found(private())
            the_right(private()).release()
    assert caplog.messages == ["The response cache fails: ConnectionError"] * 2
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert not [record for record in caplog.records if record.exc_info]


def test_an_answer_that_cannot_be_kept_lets_another_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    right = the_right(shared())
    cache = caches["default"]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(cache, "set", fail)
        right.store(ANSWER, seconds=HOUR)
    the_right(shared())


def test_a_cache_that_goes_down_meanwhile_leaves_the_lock_to_lapse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = the_right(shared())
    with override_settings(CACHES=named("Down")):
        right.release()
    assert claim(shared(), at=NOON, seconds=30) == Busy()


def test_to_forget_whom_no_answer_can_be_kept_for_is_done_at_once() -> None:
    nobody = ("subject", "\ud800")
    assert place_of(QUESTION, scope="private", feature="f", owner=nobody, versions=()) is None
    assert forget_owner(nobody)


@pytest.mark.parametrize("note", ["kept", "kept then x", "kept 2026-11-22T12:00:00 "])
def test_for_a_note_that_says_nothing_nobody_waits(note: str) -> None:
    caches["default"].set(shared().key + ":ask", note)
    the_right(shared())


# Tests of a site ----------------------------------------------------------------------------------


def test_apart_nothing_is_found_that_was_kept_outside_nor_outside_what_was_kept_inside() -> None:
    question = {"x": "inside"}
    keep(shared())
    keep(private())
    with apart():
        assert found(shared()) is None
        assert found(private()) is None
        keep(shared(question))
        with apart():
            assert found(shared(question)) is None
        assert found(shared(question)) == ANSWER
    assert found(shared(question)) is None
    assert found(shared()) == found(private()) == ANSWER


def test_apart_is_apart_in_all_threads() -> None:
    seen: list[Place] = []
    with apart():
        thread = threading.Thread(target=lambda: seen.append(shared()))
        thread.start()
        thread.join()
        assert seen == [shared()]


# Many processes -----------------------------------------------------------------------------------


@contextmanager
def process(work: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Run a process that is told, and tells, over a pipe."""
    one, ours = start(work, *arguments, daemon=True)
    ours.pid = one.pid  # type: ignore[attr-defined]
    try:
        yield ours
    finally:
        one.kill()
        one.join(PATIENCE)
        ours.close()


def heard(pipe: Any) -> Any:
    assert pipe.poll(PATIENCE)
    return pipe.recv()


@pytest.mark.contention
def test_a_hundred_equal_questions_of_eight_processes_are_asked_once(redis: RedisServer) -> None:
    processes, threads = 8, 13
    with ExitStack() as stack:
        pipes = [
            stack.enter_context(process(askers.ask_together, redis.url, threads))
            for _ in range(processes)
        ]
        assert [heard(pipe) for pipe in pipes] == ["ready"] * processes
        for pipe in pipes:
            pipe.send("go")
        told = [one for pipe in pipes for one in heard(pipe)]
    assert len(told) == processes * threads
    did = Counter(what for what, _ in told)
    assert did["asked"] == 1
    assert did["waited"] > 0
    assert len({message for _, message in told}) == 1


@pytest.mark.contention
def test_where_who_asks_is_killed_one_other_takes_over(redis: RedisServer) -> None:
    lease = 2.0
    with override_settings(CACHES=django_redis(redis.url)):
        place = somewhere_in(askers.QUESTION)
        with process(askers.claim_and_hang, redis.url, lease) as pipe:
            began = time.monotonic()
            assert heard(pipe) == "Claim"
            os.kill(pipe.pid, signal.SIGKILL)
            assert claim(place, at=periods.now(), seconds=30) == Busy()
            rights = from_threads(lambda: claimed_or_seen_claimed(place), 8)
            assert time.monotonic() - began >= lease
        assert sorted(type(right).__name__ for right in rights) == ["Busy"] * 7 + ["Claim"]
        caches["default"].close()


def somewhere_in(question: Mapping[str, Any]) -> Place:
    """The place of the other processes, which are not apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ai_budget.savings.digest_keys._room", b"")
        return somewhere(question, scope="shared", owner=(), versions=(1,))


def claimed_or_seen_claimed(place: Place) -> Claim | Busy:
    """Wait for the dead one's lock to go, and then say what this thread got."""
    dead = caches["default"].get(place.key + ":ask")
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        right = claim(place, at=periods.now(), seconds=30)
        if isinstance(right, Claim) or caches["default"].get(place.key + ":ask") != dead:
            return right
        time.sleep(0.005)
    raise AssertionError("nobody takes over")


def from_threads(work: Callable[[], Any], count: int) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return [one.result() for one in [pool.submit(work) for _ in range(count)]]
