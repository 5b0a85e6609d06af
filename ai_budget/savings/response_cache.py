"""Answers that are kept: where, for whom and for how long; and one asks while others wait.

A question is kept under a keyed digest of all that it is, so neither its text nor its owner's
name is in the cache's keys. An entry is sealed with the whole digest: moved to another key, cut
or written by a stranger, it is a miss. So is whatever the cache cannot do: it never fails a call.

A private answer is kept under its owners' *generation*, a random token in the same cache. To
forget an owner is to drop the token; a token that is lost is lost for ever, so that an eviction
never brings back what was forgotten.

Nothing here reads the clock: ``at`` is the one reading of the attempt, aware, in UTC.
"""

from __future__ import annotations

import binascii
import functools
import hmac
import json
import logging
import math
import secrets
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import blake2b
from json import encoder as json_encoder
from typing import Any

from django.core.cache import caches
from django.core.cache.backends.locmem import LocMemCache

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.savings.digest_keys import digest_key

log = logging.getLogger("ai_budget")

FORMAT = 1
"""What an entry says of its own form; of another it is a miss."""

AFTERWARDS_SECONDS = 5
"""How long the end of a claim is remembered for those who were about to claim."""

SKEW_SECONDS = 60
"""How far in the future an entry may be of: clocks of two hosts differ."""

GENERATION_SECONDS = 30 * 24 * 3600
"""The least that an owner's generation is kept since an answer was."""

MOST_BYTES = 64 * 1024 * 1024
"""The longest message that is kept, and the most that an entry may unfold to."""

_LONGEST_SECONDS = 365 * 24 * 3600
_NOTED_SECONDS = 2
"""How much later than the end of a claim an attempt may have begun, by another host's clock, and
still not have seen what was kept."""

_QUIET_SECONDS = 10.0
_MOST_OWNERS = 10_000
_MOST_HERE = 1024
_LONGEST_HERE = 16 * 1024

_PURPOSE = "answer"
_KEPT, _ALONE = "kept", "alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the answer to one question is kept: no text of the question is in it."""

    key: str
    """The key in Django's cache: short, and fit for every backend."""
    owner_keys: tuple[str, ...]
    """The keys of the generations of its user and its subject; none where it is shared."""
    seal: bytes = field(repr=False)
    """The whole digest, which entries are sealed with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """An answer from the cache."""

    message: str = field(repr=False)
    """The JSON text of the API's message, as it was."""
    cost_nanousd: int
    """What it cost when it was made, in nano-dollars."""
    model: str
    """What answered."""
    kept_at: datetime
    """When it was made, aware, in UTC."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Somebody else is asking, or has just kept the answer: wait a little, and look again."""


class Claim:
    """The right to ask for an answer that others wait for, until ``store`` or ``release``.

    Exactly one of the two ends it, and the first that is called; what comes after does nothing.
    Whoever does neither is taken for dead when the claim's seconds are over.
    """

    __slots__ = ("_at", "_began", "_ended", "_generation", "_place", "_token")

    def __init__(self, place: Place, *, at: datetime, generation: str | None, token: str) -> None:
        self._place = place
        self._generation = generation
        self._token = token  # "" where no lock stands behind it
        self._at = at
        self._began = periods.monotonic()
        self._ended = threading.Lock()

    def store(self, kept: Kept, *, seconds: float) -> None:
        """Keep the answer for at most so many seconds; all who wait will find it."""
        if not self._end():
            return
        if not seconds > 0 or self._generation is None:
            self._unlock()
            return
        value = _sealed(kept, self._place, generation=self._generation, seconds=seconds)
        if value is None:
            self._unlock()
            return
        try:
            cache = caches[conf.CACHE_ALIAS]
            life = _whole(seconds)
            if type(cache) is not LocMemCache:
                for key in self._place.owner_keys:
                    cache.touch(key, max(life, GENERATION_SECONDS))
            cache.set(self._place.key, value, life)
            note = self._note(_KEPT, self._generation)
            # Not deleted: who looked before the answer was there would ask once more.
            cache.set(_lock_key(self._place), note, min(life, AFTERWARDS_SECONDS))
        except Exception as error:
            _warn(error)
            self._unlock()

    def release(self, *, uncacheable: bool = False) -> None:
        """Give the right back, so that another may ask.

        Where there is an answer that may not be kept (``uncacheable``), all who wait, and who
        come in the next few seconds, go ahead by themselves, at once.
        """
        if not self._end():
            return
        if not uncacheable:
            self._unlock()
            return
        try:
            cache = caches[conf.CACHE_ALIAS]
            cache.set(_lock_key(self._place), self._note(_ALONE, ""), AFTERWARDS_SECONDS)
        except Exception as error:
            _warn(error)

    def _end(self) -> bool:
        return self._ended.acquire(blocking=False)

    def _note(self, word: str, generation: str) -> str:
        ended = self._at + timedelta(seconds=periods.monotonic() - self._began)
        return f"{word} {ended.isoformat()} {generation}"

    def _unlock(self) -> None:
        """Drop the lock, unless it lapsed and is another's by now."""
        if not self._token:
            return
        try:
            cache = caches[conf.CACHE_ALIAS]
            key = _lock_key(self._place)
            if cache.get(key) == self._token:
                cache.delete(key)
        except Exception as error:
            _warn(error)


def place_of(
    question: Mapping[str, Any],
    *,
    scope: str,
    feature: str,
    owner: Sequence[str],
    versions: Sequence[int | str],
) -> Place | None:
    """Return where the answer is kept; None where it may not be.

    ``scope`` is "private", to the ``owner`` (pairs of kind and name, flat: ``("user", "42",
    "subject", "acme")``), or "shared" by all. Two questions have one place if they are the same
    JSON but for the order of keys. None for a private question of nobody, for what is no JSON,
    and for any other scope.
    """
    private = scope == "private"
    if not (owner if private else scope == "shared"):
        return None
    owner = tuple(owner) if private else ()
    try:
        asked = _canonical((scope, feature, owner, versions, question))
        digests = _digests(digest_key(_PURPOSE))
        digest = digests.question.copy()
        digest.update(asked)
        seal = digest.digest()
        owner_keys = _owner_keys(owner, digests) if private else ()
    except (TypeError, ValueError, RecursionError):
        return None
    # The rest of the seal is in no key, so whoever sees the keys can seal nothing.
    return Place(key="aib:" + seal[:12].hex(), owner_keys=owner_keys, seal=seal)


def look_up(place: Place, *, at: datetime, ttl: float | None) -> Kept | None:
    """Return the answer that is kept there and no older than ``ttl`` seconds, if there is one."""
    if ttl is None or not ttl > 0:
        return None
    read = _read
    found: Mapping[str, Any] = {}
    try:
        cache = caches[conf.CACHE_ALIAS]
        if type(cache) is LocMemCache:
            value, found, read = cache.get(place.key), _generations_here, _read_here
        elif not place.owner_keys:
            value = cache.get(place.key)
        else:
            found = cache.get_many((place.key, *place.owner_keys))
            value = found.get(place.key)
    except Exception as error:
        _warn(error)
        return None
    generation = _together(found, place.owner_keys)
    if generation is None or not isinstance(value, str):
        return None
    entry = read(value, place, generation)
    if entry is None:
        return None
    kept, life = entry
    age = (at - kept.kept_at).total_seconds()
    return kept if -SKEW_SECONDS <= age <= ttl and age <= life else None


def claim(place: Place, *, at: datetime, seconds: float) -> Claim | Busy:
    """Take the right to ask, for so many seconds, unless somebody has it.

    Where the cache fails, or answers to this question were not to be kept a moment ago, the
    claim has no lock behind it: nobody waits for it, and others ask as well.
    """
    generation: str | None = None if place.owner_keys else ""
    try:
        cache = caches[conf.CACHE_ALIAS]
        generation = _generation(cache, place.owner_keys)
        token = secrets.token_hex(8)
        # Twice, because a lock may end between the two looks at it. A cache that then still
        # neither takes a lock nor has one does not answer, and hides it.
        for _ in range(2):
            if cache.add(_lock_key(place), token, _whole(seconds)):
                return Claim(place, at=at, generation=generation, token=token)
            lock = cache.get(_lock_key(place))
            if lock is not None:
                break
        if _is_busy(lock, generation=generation, at=at):
            return Busy()
    except Exception as error:
        _warn(error)
    return Claim(place, at=at, generation=generation, token="")


def forget_owner(owner: Sequence[str]) -> bool:
    """Forget all private answers of this user or subject, in every feature, also those on the way.

    Several pairs are each forgotten. Says whether the cache took it: where it did not answer,
    what it keeps may be found again.
    """
    try:
        keys = _owner_keys(tuple(owner), _digests(digest_key(_PURPOSE)))
    except (TypeError, ValueError):
        return True  # nothing can be kept for such a name
    for key in keys:
        _generations_here.pop(key, None)
    _entries_here.clear()
    try:
        caches[conf.CACHE_ALIAS].delete_many(keys)
    except Exception as error:
        _warn(error)
        return False
    return True


def generation_of(owner: Sequence[str]) -> str:
    """Return what changes when the owner's answers are forgotten, for what else is kept of them.

    "" for nobody. Where the cache fails it is another one each time, and nothing is found.
    """
    try:
        keys = _owner_keys(tuple(owner), _digests(digest_key(_PURPOSE)))
        return _generation(caches[conf.CACHE_ALIAS], keys)
    except Exception as error:
        _warn(error)
        return secrets.token_hex(8)


# Places


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Digests:
    """The beginnings of the keyed digests, one for each purpose; one object for each secret."""

    question: blake2b
    owner: blake2b


@functools.lru_cache(maxsize=64)
def _digests(key: bytes) -> _Digests:
    return _Digests(
        question=blake2b(key=key, digest_size=32, person=b"question"),
        owner=blake2b(key=key, digest_size=9, person=b"owner"),
    )


@functools.lru_cache(maxsize=4096)
def _owner_keys(owner: tuple[str, ...], digests: _Digests) -> tuple[str, ...]:
    """Return the key of each pair's generation; of equal digests they only forget together."""
    keys = []
    for start in range(0, len(owner), 2):
        digest = digests.owner.copy()
        digest.update(_canonical(owner[start : start + 2]))
        keys.append("aib:" + digest.hexdigest())
    return tuple(keys)


_encoder = json.JSONEncoder(
    sort_keys=True,
    separators=(",", ":"),
    # ASCII would write two lone surrogates as it writes the character that they are not.
    ensure_ascii=False,
    allow_nan=False,
    check_circular=False,  # is a RecursionError, and faster
)


def _make_chunks() -> Any:
    """Return what turns values into parts of their JSON, made once; None where it cannot be.

    A JSONEncoder makes one for every text, which takes a third of its time.
    """
    make: Any = getattr(json_encoder, "c_make_encoder", None)
    text = json_encoder.encode_basestring
    try:
        return make(None, _encoder.default, text, None, ":", ",", True, False, False)
    except TypeError:  # another Python, with other arguments or without it
        return None


_chunks = _make_chunks()


def _canonical(value: Any) -> bytes:
    """Return the JSON that equal values have in common, and others do not."""
    text = "".join(_chunks(value, 0)) if _chunks else _encoder.encode(value)
    # Lone surrogates, which no request can carry, raise UnicodeEncodeError.
    return text.encode()


# Entries
#
# One line of JSON, the header, then the message. The header begins with the seal of all that
# comes after it, and has a fixed length up to there.

_SEAL_END = len('["') + 32
_SEAL_LENGTH = _SEAL_END + len('",')
_blank_seal = blake2b(digest_size=16)
_header_of = json.JSONDecoder().raw_decode


def _sealed(kept: Kept, place: Place, *, generation: str, seconds: float) -> str | None:
    """Return the text of an entry; None where the answer cannot be kept."""
    above = conf.CACHE_COMPRESS_ABOVE
    body, size = kept.message, None
    try:
        plain = body.encode()
        if len(plain) > MOST_BYTES:
            return None
        if above is not None and len(plain) > above:
            # Text again: not every serializer of every backend takes bytes.
            body = binascii.b2a_base64(zlib.compress(plain), newline=False).decode()
            size = len(plain)
        header = [
            FORMAT,
            kept.kept_at.isoformat(),
            min(seconds, _LONGEST_SECONDS),
            kept.cost_nanousd,
            kept.model,
            generation,
            size,
        ]
        rest = json.dumps(header, separators=(",", ":"))[1:] + "\n" + body
        return f'["{_seal(rest, place)}",{rest}'
    except (TypeError, ValueError) as error:
        _warn(error)
        return None


def _read(value: str, place: Place, generation: str) -> tuple[Kept, float] | None:
    """Return what an entry keeps, and for how many seconds, if it is sound, and from here."""
    try:
        if not hmac.compare_digest(_seal(value[_SEAL_LENGTH:], place), value[2:_SEAL_END]):
            return None
        header, end = _header_of(value)
        _, form, since, life, cost, model, of, size = header
        kept_at = datetime.fromisoformat(since)
        if form != FORMAT or of != generation or kept_at.tzinfo is None or not life > 0:
            return None
        if type(cost) is not int or cost < 0 or not isinstance(model, str):
            return None
        message = value[end + 1 :] if size is None else _unfolded(value[end + 1 :], size)
        kept = Kept(message=message, cost_nanousd=cost, model=model, kept_at=kept_at)
        return kept, float(life)
    except (TypeError, ValueError, OverflowError, RecursionError, zlib.error):
        return None


_entries_here: dict[str, tuple[str, bytes, str, tuple[Kept, float]]] = {}
"""What was last read, and from what, of a cache in this process's own memory: to check it and to
take it to pieces takes as long as to get it."""


def _read_here(value: str, place: Place, generation: str) -> tuple[Kept, float] | None:
    """Do as ``_read``, once for each entry."""
    known = _entries_here.get(place.key)
    if known is not None:
        of, seal, under, entry = known
        if of == value and seal == place.seal and under == generation:
            return entry
    read = _read(value, place, generation)
    if read is not None and len(value) <= _LONGEST_HERE:
        if len(_entries_here) >= _MOST_HERE:
            _entries_here.clear()
        _entries_here[place.key] = (value, place.seal, generation, read)
    return read


def _seal(rest: str, place: Place) -> str:
    # A copy is made faster than a keyed digest, and a secret of fixed length at the end does
    # the same for a digest without collisions.
    seal = _blank_seal.copy()
    seal.update(rest.encode())
    seal.update(place.seal)
    return seal.hexdigest()


def _unfolded(body: str, size: int) -> str:
    """Return the text of a compressed message of so many bytes. Raises ValueError for another."""
    if not 0 <= size <= MOST_BYTES:
        raise ValueError("no size of a message")
    unfolding = zlib.decompressobj()
    plain = unfolding.decompress(binascii.a2b_base64(body), size + 1)
    if len(plain) != size or not unfolding.eof:
        raise ValueError("another size than it says")
    return plain.decode()


# Generations

_generations_here: dict[str, str] = {}
"""Those of a cache in this process's own memory, beside it: they need no second look into it, and
no place of its few hundred."""


def _together(found: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return the generation of all the owners together; None where one has none."""
    if not keys:
        return ""
    tokens = [token for key in keys if isinstance(token := found.get(key), str)]
    return " ".join(tokens) if len(tokens) == len(keys) else None


def _generation(cache: Any, keys: tuple[str, ...]) -> str:
    """Return the generation of all the owners together, and begin one where there is none."""
    if not keys:
        return ""
    if type(cache) is LocMemCache:
        if len(_generations_here) > _MOST_OWNERS:
            _generations_here.clear()
        return " ".join(_generations_here.setdefault(key, secrets.token_hex(8)) for key in keys)
    found = cache.get_many(keys)
    return " ".join(_begun(cache, key, found.get(key)) for key in keys)


def _begun(cache: Any, key: str, found: object) -> str:
    if isinstance(found, str):
        return found
    token = secrets.token_hex(8)
    if cache.add(key, token, GENERATION_SECONDS):
        return token
    other = cache.get(key)
    if isinstance(other, str):  # another began it at the same time
        return other
    cache.set(key, token, GENERATION_SECONDS)  # what is there is nothing of ours
    return token


# Claims


def _lock_key(place: Place) -> str:
    return place.key + ":ask"


def _is_busy(lock: object, *, generation: str, at: datetime) -> bool:
    """Say whether to wait for whoever left this lock or this note in its place."""
    if not isinstance(lock, str):
        return False  # nothing of ours
    word, _, rest = lock.partition(" ")
    if word == _ALONE:
        return False
    if word != _KEPT:
        return True
    # An answer that was kept after this attempt began may have come after it looked. Who begins
    # later has looked in vain, because it is too old for it, or gone.
    ended, _, of = rest.partition(" ")
    try:
        later = (at - datetime.fromisoformat(ended)).total_seconds()
    except (TypeError, ValueError):
        return False
    return of == generation and -SKEW_SECONDS <= later <= _NOTED_SECONDS


def _whole(seconds: float) -> int:
    """Return seconds as every cache takes them: at least one, and not for ever."""
    return math.ceil(min(max(1.0, seconds), _LONGEST_SECONDS))


# Failures

_quiet_until = float("-inf")


def _warn(error: Exception) -> None:
    """Say that the cache fails, by the error's kind alone, and not for every call."""
    global _quiet_until
    now = periods.monotonic()
    if now < _quiet_until:
        return
    _quiet_until = now + _QUIET_SECONDS
    log.warning("The response cache fails: %s", type(error).__name__)
