"""What the simulated API does with one request: answer it, refuse it, or fail it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """Answers with a message, as the model would.

    text: the answer; None writes one from the prompt, of `output_tokens` tokens if that is given.
    output_tokens: the total to report, thinking included; None counts the answer. Never more than
        the request's `max_tokens`: a longer answer is cut, with stop reason "max_tokens".
    thinking_tokens: above 0, a thinking block comes first and these are part of the output.
    stop_reason: None chooses "end_turn", or "tool_use" when `content` asks for a tool.
    content: the content blocks to send in place of `text`; sent whole even when `max_tokens`
        cuts their count.
    usage: laid over the computed usage as it is, past `max_tokens` too (`iterations`,
        `server_tool_use`, `inference_geo`, a wrong `output_tokens` ...).
    start_usage: laid over the usage of a stream's `message_start` alone, for the streams whose
        input side grows before `message_delta`.
    model: the model that answers, when it is not the one that was asked.
    delay: seconds before the response begins; who gives up before is billed all the same.
    chunk_delay: seconds between two deltas of a stream.
    headers: laid over the response's own, such as `anthropic-ratelimit-requests-remaining`.
    """

    text: str | None = None
    output_tokens: int | None = None
    thinking_tokens: int = 0
    stop_reason: str | None = None
    content: Sequence[Mapping[str, Any]] | None = None
    usage: Mapping[str, Any] | None = None
    start_usage: Mapping[str, Any] | None = None
    model: str | None = None
    delay: float = 0.0
    chunk_delay: float = 0.0
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fail:
    """Refuses with an HTTP error in the API's shape; nothing is billed.

    status: 400 and above.
    error_type, message: None take the API's own for that status.
    retry_after: seconds, sent as `retry-after`; the SDK honours fractions and ignores 0.
    details: `error.details`, such as {"error_code": "enforced_spend_limit_reached"}.
    delay: seconds before the response.
    headers: laid over the response's own.
    """

    status: int
    error_type: str | None = None
    message: str | None = None
    retry_after: float | None = None
    details: Mapping[str, Any] | None = None
    delay: float = 0.0
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """Accepts the request and says nothing for `seconds`, then closes the connection.

    billed: an answer was made all the same and the provider charges for it, as can happen when a
        client gives up on a request that runs.
    """

    seconds: float
    billed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CutBeforeResponse:
    """Closes the connection once the request is read, without a byte of response.

    billed: as in `Hang`.
    """

    billed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CutStream:
    """Closes the connection in the middle of a stream, after `after_events` events.

    Every event counts: message_start is 1, content_block_start 2, ping 3, then the deltas. A
    request that does not stream gets half a body under a content-length for the whole of it.
    """

    after_events: int = 4
    reply: Reply = Reply()


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamError:
    """Sends an `error` event inside a 200 stream, after `after_events` events.

    They count as in `CutStream`. A request that does not stream gets the HTTP error of that type.
    """

    after_events: int = 4
    error_type: str = "overloaded_error"
    message: str | None = None
    reply: Reply = Reply()


@dataclass(frozen=True, kw_only=True, slots=True)
class TruncateCleanly:
    """Ends a stream properly at the HTTP level, but with neither message_delta nor message_stop.

    after_events: as `CutStream` counts; None sends all the content first. A request that does not
    stream is answered in full.
    """

    after_events: int | None = None
    reply: Reply = Reply()


Step: TypeAlias = (
    Reply | Fail | Hang | CutBeforeResponse | CutStream | StreamError | TruncateCleanly
)
"""One scripted behaviour."""

StepSource: TypeAlias = Step | Callable[[dict[str, Any]], Step]
"""A step, or a function of the request's body that chooses one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Errored:
    """Fails one item of a batch, which costs nothing.

    message: None takes the API's own for that type.
    """

    error_type: str = "api_error"
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Canceled:
    """Cancels one item of a batch, whatever becomes of the others."""


@dataclass(frozen=True, slots=True)
class Expired:
    """Leaves one item of a batch without an answer until it expires."""


Outcome: TypeAlias = Reply | Errored | Canceled | Expired
"""What becomes of one item of a batch. The delays and headers of a Reply mean nothing there."""

OutcomeSource: TypeAlias = Outcome | Callable[[str, dict[str, Any]], Outcome]
"""An outcome, or a function of the item's custom id and params that chooses one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Sends the results of a batch, a line for each item.

    shuffled: whether in an order of their own; False keeps the order in which the items were sent.
    times: how often each line comes; the copies are shuffled too.
    omit: custom ids whose lines are missing.
    line_delay: seconds before each line.
    """

    shuffled: bool = True
    times: int = 1
    omit: Collection[str] = ()
    line_delay: float = 0.0


BatchStep: TypeAlias = (
    Reply | Results | Fail | Hang | CutBeforeResponse | CutStream | TruncateCleanly
)
"""What one request to the endpoints of batches meets."""

BatchStepSource: TypeAlias = BatchStep | Callable[[dict[str, Any]], BatchStep]
"""A step, or a function of the request's body that chooses one."""
