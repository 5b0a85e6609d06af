"""What the simulated API refuses, in the API's own error types and wording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ai_budget.testing.catalogue import is_claude, limits_of

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_MESSAGES = {
    "authentication_error": "invalid x-api-key",
    "rate_limit_error": "This request would exceed your organization's rate limit.",
    "api_error": "Internal server error",
    "overloaded_error": "Overloaded",
    "not_found_error": "Not Found",
    "timeout_error": "Request timed out",
}
_STATUSES = {error_type: status for status, error_type in reversed(_ERROR_TYPES.items())}
_ROLES = ("user", "assistant", "system")
_REMOVED_PARAMETERS = ("temperature", "top_p", "top_k")
# Token counting sees one prompt: it refuses what the model itself would go and fetch.
_UNCOUNTABLE_TOOLS = ("web_search", "web_fetch", "code_execution", "tool_search", "advisor", "mcp")
_UNCOUNTABLE_SOURCES = ("url", "file")


class ApiError(Exception):
    """An HTTP error in the API's shape. `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str | None = None,
        *,
        error_type: str | None = None,
        retry_after: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.status = status
        self.error_type = error_type or _default_error_type(status)
        self.message = message or default_message(self.error_type)
        self.retry_after = retry_after
        self.details = details
        super().__init__(self.message)

    @property
    def retryable(self) -> bool:
        """What the `x-should-retry` header says."""
        return self.status in (408, 409, 429) or self.status >= 500

    def payload(self, request_id: str) -> dict[str, Any]:
        """The response's JSON."""
        error: dict[str, Any] = {"type": self.error_type, "message": self.message}
        if self.details is not None:
            error["details"] = dict(self.details)
        return {"type": "error", "error": error, "request_id": request_id}


def default_message(error_type: str) -> str:
    """What the API says with `error_type`."""
    return _MESSAGES.get(error_type, "The simulated API was told to refuse this request.")


def status_of(error_type: str) -> int:
    """The HTTP status that goes with `error_type`."""
    return _STATUSES.get(error_type, 500)


def check_prompt(
    body: Mapping[str, Any] | None, *, required: Sequence[str] = ("model", "messages")
) -> Mapping[str, Any]:
    """`body`, if it has the required fields and a well-formed prompt. Raises ApiError."""
    if body is None:
        raise ApiError(400, "The request body is not a valid JSON object.")
    for field in required:
        if body.get(field) is None:
            raise ApiError(400, f"{field}: Field required")
    model = body["model"]
    if not isinstance(model, str):
        raise ApiError(400, "model: Input should be a valid string")
    if not is_claude(model):
        raise ApiError(404, f"model: {model}")
    for field in ("thinking", "output_config"):
        _check_object(body.get(field) or {}, field)
    _check_messages(body["messages"])
    _check_blocks(body.get("tools") or [], "tools")
    system = body.get("system")
    if system is not None and not isinstance(system, str):
        _check_blocks(system, "system")
    return body


def check_message_request(body: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """`body`, if a message can be made of it. Raises ApiError."""
    checked = check_prompt(body, required=("model", "max_tokens", "messages"))
    max_tokens = checked["max_tokens"]
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool):
        raise ApiError(400, "max_tokens: Input should be a valid integer")
    if max_tokens < 0:
        raise ApiError(400, "max_tokens: Input should be greater than or equal to 0")
    if not isinstance(checked.get("stream", False), bool):
        raise ApiError(400, "stream: Input should be a valid boolean")
    if max_tokens == 0 and checked.get("stream"):
        raise ApiError(400, "max_tokens: 0 only warms the prompt cache and cannot be streamed")
    return checked


def check_version(body: Mapping[str, Any], version: str) -> None:
    """Refuses what the API version of the request no longer takes. Raises ApiError.

    The rules are those of platform.claude.com/docs/en/api/migration-2026-10-21.
    """
    if version < "2026-10-21":  # versions are dates, and sort as such
        return
    for field in _REMOVED_PARAMETERS:
        if field in body:
            raise ApiError(400, f"{field}: Extra inputs are not permitted")
    for number, message in enumerate(body["messages"]):
        content = message["content"]
        kinds = [block.get("type") for block in content] if isinstance(content, list) else []
        if message["role"] == "assistant" and "document" in kinds:
            raise ApiError(
                400, f"messages.{number}: document blocks are not permitted in assistant messages"
            )


def check_countable(body: Mapping[str, Any]) -> None:
    """Refuses what token counting does not support. Raises ApiError."""
    if body.get("mcp_servers"):
        raise ApiError(400, "mcp_servers: token counting does not support MCP")
    for index, tool in enumerate(body.get("tools") or ()):
        if str(tool.get("type") or "").startswith(_UNCOUNTABLE_TOOLS):
            raise ApiError(400, f"tools.{index}: token counting does not support server tools")
    for number, message in enumerate(body["messages"]):
        content = message["content"]
        for block in content if isinstance(content, list) else ():
            source = block.get("source")
            if isinstance(source, Mapping) and source.get("type") in _UNCOUNTABLE_SOURCES:
                kind = source["type"]
                raise ApiError(
                    400, f"messages.{number}: token counting does not support {kind} sources"
                )


def check_fits(tokens: int, model: str) -> None:
    """Refuses a prompt of more tokens than the model's window. Raises ApiError."""
    window = limits_of(model).context_window
    if tokens > window:
        raise ApiError(400, f"prompt is too long: {tokens} tokens > {window} maximum")


def _default_error_type(status: int) -> str:
    return _ERROR_TYPES.get(status) or ("api_error" if status >= 500 else "invalid_request_error")


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list):
        raise ApiError(400, "messages: Input should be a valid list")
    if not messages:
        raise ApiError(400, "messages: at least one message is required")
    for number, message in enumerate(messages):
        path = f"messages.{number}"
        _check_object(message, path)
        if message.get("role") not in _ROLES:
            raise ApiError(400, f"{path}.role: Input should be 'user' or 'assistant'")
        if message.get("content") is None:
            raise ApiError(400, f"{path}.content: Field required")
        if not isinstance(message["content"], str):
            _check_blocks(message["content"], f"{path}.content")


def _check_blocks(blocks: object, path: str) -> None:
    if not isinstance(blocks, list):
        raise ApiError(400, f"{path}: Input should be a valid list")
    for index, block in enumerate(blocks):
        _check_object(block, f"{path}.{index}")
        _check_object(block.get("source") or {}, f"{path}.{index}.source")
        if isinstance(block.get("content"), list):
            _check_blocks(block["content"], f"{path}.{index}.content")


def _check_object(value: object, path: str) -> None:
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{path}: Input should be a valid dictionary")
