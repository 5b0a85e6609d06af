"""What the installed SDK can ask for and report, against what somebody has classified.

A new parameter, block, tool, count or endpoint fails here by its name, until it is given a rule.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import unquote

import anthropic
import pytest
from anthropic import types
from anthropic.types import beta, message_create_params
from anthropic.types.beta import message_create_params as beta_message_create_params
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ai_budget.guard.endpoints import BATCH, ENDPOINTS, FREE, PRICED, UNPRICED, classify, normalize
from ai_budget.pricing.bound import BLOCKS, CLIENT_TOOLS, PARAMETERS, SERVER_TOOLS
from ai_budget.pricing.usage import FIELDS, ITERATION_TYPES, SERVICE_TIERS, SPEEDS
from tests.depth import deep

SDK = Path(anthropic.__file__).parent


def sdk_type(name: str) -> Any:
    """A type of the SDK; None where the installed one is older."""
    return getattr(beta, name, None) or getattr(types, name, None)


def members(annotation: Any) -> Iterator[type]:
    """The classes in an annotation, whatever wraps them."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from members(part)


def literals(annotation: Any) -> set[str]:
    """The texts of an annotation's literals, whatever wraps them."""
    parts = get_args(annotation)
    found = {part for part in parts if isinstance(part, str)}
    return found.union(*(literals(part) for part in parts))


def hints(annotated: Any) -> dict[str, Any]:
    """The fields of a typed dict or a model, each with its annotation."""
    if annotated is None:
        return {}
    fields = getattr(annotated, "model_fields", None)
    if fields is not None:
        return {name: field.annotation for name, field in fields.items()}
    return get_type_hints(annotated)


def type_names(union: Any) -> set[str]:
    """The values of ``type`` that tell the members of a union apart."""
    return set().union(*(literals(hints(one).get("type")) for one in members(union)))


def unclassified(found: set[str], known: set[str], what: str, table: str) -> str:
    """The message of a failure: what is new in the SDK, and where it wants a line."""
    return (
        f"{what} of anthropic {anthropic.__version__} that nobody has classified:"
        f" {', '.join(sorted(found - known))}. Find out what each costs, then add it to {table}."
    )


BOUND = "ai_budget/pricing/bound.py"
USAGE = "ai_budget/pricing/usage.py"


# Requests ----------------------------------------------------------------------------------------


def create_parameters() -> set[str]:
    found: set[str] = set()
    for module in (message_create_params, beta_message_create_params):
        for name in ("MessageCreateParamsNonStreaming", "MessageCreateParamsStreaming"):
            found |= hints(getattr(module, name)).keys()
    return found


def test_every_parameter_of_a_message_is_classified() -> None:
    found = create_parameters()

    assert {"model", "messages", "max_tokens", "stream"} <= found
    assert found <= PARAMETERS.keys(), unclassified(
        found, set(PARAMETERS), "Parameters", f"PARAMETERS in {BOUND}"
    )


def content_block_types() -> set[str]:
    results = [
        hints(sdk_type(name)).get("content")
        for name in ("ToolResultBlockParam", "BetaToolResultBlockParam", "BetaSystemMessageParam")
    ]
    unions = [sdk_type("ContentBlockParam"), sdk_type("BetaContentBlockParam"), *results]
    return set().union(*(type_names(union) for union in unions))


def test_every_content_block_is_classified() -> None:
    found = content_block_types()

    assert {"text", "image", "document", "tool_result"} <= found
    assert found <= BLOCKS.keys(), unclassified(
        found, set(BLOCKS), "Content blocks", f"BLOCKS in {BOUND}"
    )


def tool_types() -> set[str]:
    unions = (sdk_type("ToolUnionParam"), sdk_type("BetaToolUnionParam"))
    return set().union(*(type_names(union) for union in unions)) - {"custom"}


def test_every_tool_is_classified() -> None:
    found = tool_types()
    known = {
        name for name in found if name.startswith((*CLIENT_TOOLS.keys(), *SERVER_TOOLS.keys()))
    }

    assert any(name.startswith("web_search_") for name in found)
    assert found == known, unclassified(
        found, known, "Tools", f"CLIENT_TOOLS or SERVER_TOOLS in {BOUND}"
    )


def test_every_server_tool_is_known_as_one() -> None:
    """A tool's result that the API makes by itself shows that the tool runs there."""
    names = {
        name.removesuffix("_tool_result")
        for name in content_block_types()
        if name.endswith("_tool_result") and name not in {"mcp_tool_result", "tool_result"}
    }
    for name in names - {"bash_code_execution", "text_editor_code_execution"}:
        server = [prefix for prefix in SERVER_TOOLS if prefix.startswith(name)]
        assert server, f"The API answers for the tool {name}, which is not in SERVER_TOOLS."


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("CacheControlEphemeralParam", {"5m", "1h"}),
        ("BetaCacheControlEphemeralParam", {"5m", "1h"}),
    ],
)
def test_every_lifetime_of_a_cache_write_is_classified(name: str, known: set[str]) -> None:
    found = literals(hints(sdk_type(name)).get("ttl"))

    assert found <= known, unclassified(found, known, "Lifetimes", f"the writes in {BOUND}")


def test_every_speed_that_can_be_asked_for_is_classified() -> None:
    found: set[str] = set()
    for params in (
        message_create_params.MessageCreateParamsNonStreaming,
        beta_message_create_params.MessageCreateParamsNonStreaming,
        sdk_type("BetaFallbackParam"),
    ):
        found |= literals(hints(params).get("speed"))

    assert found <= SPEEDS, unclassified(found, set(SPEEDS), "Speeds", f"SPEEDS in {USAGE}")


def test_every_field_of_a_fallback_is_classified() -> None:
    found = set(hints(sdk_type("BetaFallbackParam")))
    known = {"model", "max_tokens", "output_config", "speed", "thinking"}

    assert found <= known, unclassified(
        found, known, "Fields of a fallback", f"the fallbacks in {BOUND}"
    )


def test_every_kind_of_thread_is_classified() -> None:
    found = type_names(sdk_type("BetaMessageThreadParam"))
    known = {"create", "continue"}

    assert found <= known, unclassified(found, known, "Kinds of thread", f"the threads in {BOUND}")


def test_every_edit_of_the_context_is_classified() -> None:
    found = type_names(hints(sdk_type("BetaContextManagementConfigParam")).get("edits"))
    known = {name for name in found if name.startswith(("clear_", "compact_"))}

    assert found == known, unclassified(
        found, known, "Edits of the context", f"the edits in {BOUND}"
    )


def test_every_way_to_bring_a_tool_in_a_message_is_classified() -> None:
    found = type_names(hints(sdk_type("BetaRequestToolAdditionBlockParam")).get("tool"))
    known = {"tool_reference", "mcp_tool_reference", "mcp_toolset_reference", "tool_definition"}

    assert found <= known, unclassified(found, known, "Ways to add a tool", f"the tools in {BOUND}")


# Usage -------------------------------------------------------------------------------------------

OBJECTS_THAT_ARE_ONE_FIELD = {"iterations", "fallback_credit"}
USAGES = ("Usage", "MessageDeltaUsage", "BetaUsage", "BetaMessageDeltaUsage")


def usage_fields(name: str) -> set[str]:
    """The fields of a usage, and behind a dot those of the objects in it."""
    found: set[str] = set()
    for field, annotation in hints(sdk_type(name)).items():
        found.add(field)
        if field not in OBJECTS_THAT_ARE_ONE_FIELD:
            for one in members(annotation):
                found |= {f"{field}.{part}" for part in getattr(one, "model_fields", {})}
    return found


@pytest.mark.parametrize("name", USAGES)
def test_every_field_of_usage_is_classified(name: str) -> None:
    found = usage_fields(name)

    assert "output_tokens" in found
    assert found <= FIELDS.keys(), unclassified(
        found, set(FIELDS), f"Fields of {name}", f"FIELDS in {USAGE}"
    )


def test_every_type_of_iteration_has_a_rule() -> None:
    entries = sdk_type("BetaIterationsUsage")
    found = type_names(entries)

    assert found <= ITERATION_TYPES, unclassified(
        found, set(ITERATION_TYPES), "Iterations", f"ITERATION_TYPES in {USAGE}"
    )


def test_every_field_of_an_iteration_is_classified() -> None:
    known = {*FIELDS, "type", "model"}
    for entry in members(sdk_type("BetaIterationsUsage")):
        found = set(hints(entry))
        assert found <= known, unclassified(
            found, known, f"Fields of {entry.__name__}", f"FIELDS in {USAGE}"
        )


@pytest.mark.parametrize("name", USAGES)
def test_every_speed_and_tier_that_usage_reports_is_classified(name: str) -> None:
    usage = hints(sdk_type(name))
    speeds, tiers = literals(usage.get("speed")), literals(usage.get("service_tier"))

    assert speeds <= SPEEDS, unclassified(speeds, set(SPEEDS), "Speeds", f"SPEEDS in {USAGE}")
    assert tiers <= SERVICE_TIERS, unclassified(
        tiers, set(SERVICE_TIERS), "Service tiers", f"SERVICE_TIERS in {USAGE}"
    )


# Endpoints ---------------------------------------------------------------------------------------

CALL = re.compile(r"self\._(?:post|put|patch)\(")
PATH = re.compile(r'self\._(?:post|put|patch)\(\s*(?:path_template\(\s*)?f?"([^"]+)"')


def posted_paths() -> set[str]:
    """Every path that the SDK's resources write to, {id} for the variable parts."""
    found = set()
    for source in [*SDK.glob("resources/**/*.py"), *SDK.glob("lib/**/*.py")]:
        text = source.read_text()
        paths = PATH.findall(text)
        assert len(paths) == len(CALL.findall(text)), f"{source} posts in a way not seen before"
        found |= {re.sub(r"\{[^}]+\}", "{id}", path.partition("?")[0]) for path in paths}
    return found


def test_every_endpoint_that_is_written_to_is_classified() -> None:
    found = posted_paths()

    assert "/v1/messages" in found
    assert found <= ENDPOINTS.keys(), unclassified(
        found, set(ENDPOINTS), "Endpoints", "ENDPOINTS in ai_budget/guard/endpoints.py"
    )


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "post"])
def test_every_path_of_the_sdk_is_found_in_the_table(method: str) -> None:
    for path, kind in ENDPOINTS.items():
        filled = path.replace("{id}", "msgbatch_01-Ab.c:d@e~f")
        assert classify(method, f"{filled}?beta=true") == kind
        assert classify(method, f"https://api.anthropic.com{filled}") == kind


def test_what_only_reads_or_deletes_is_free() -> None:
    for method in ("GET", "get", "HEAD", "OPTIONS", "DELETE"):
        assert classify(method, "/v1/sessions/sesn_1/events") == FREE


@pytest.mark.parametrize(
    "path", ["/v1/complete", "/v2/messages", "/v1/messages/batch", "/v1/models", "/", "", "/v1"]
)
def test_a_path_that_nobody_has_classified_has_no_class(path: str) -> None:
    assert classify("POST", path) is None


@pytest.mark.parametrize(
    "url",
    [
        "/v1/messages",
        "v1/messages",
        "/v1/messages/",
        "/v1/messages//",
        "/v1//messages",
        "///v1/messages",
        "/v1/./messages",
        "/v1/files/../messages",
        "/v1/messages/count_tokens/..",
        "/v1/messages/count_tokens/../",
        "/v1/%6dessages",
        "/v1/files/%2e%2e/messages",
        "/v1%2Fmessages",
        "/v1/messages?beta=true",
        "/v1/messages?to=/v1/files",
        "/v1/messages#/../files",
        "https://api.anthropic.com/v1/messages",
        "https://gateway.example.com/anthropic/v1/messages?beta=true",
        "https://api.anthropic.com//v1/messages/",
        "HTTPS://API.ANTHROPIC.COM/v1/messages",
        "/gateway/v1/messages",
        "/v1/mess\tages",
    ],
)
def test_every_way_to_write_the_address_of_messages_is_priced(url: str) -> None:
    for method in ("POST", "post", "Post"):
        assert classify(method, url) == PRICED
    assert normalize(url) == "/v1/messages"


@pytest.mark.parametrize(
    "url",
    [
        "/v1/messages/batches",
        "/v1/messages/batches/",
        "/v1/messages/batches?beta=true",
        "/v1/messages/count_tokens/../batches",
    ],
)
def test_every_way_to_write_the_address_of_batches_is_a_batch(url: str) -> None:
    assert classify("POST", url) == BATCH


@pytest.mark.parametrize(
    "url",
    [
        "/v1/sessions",
        "/v1/sessions/",
        "/v1/agents/../sessions",
        "/v1/sessions/sesn_1/events?beta=true",
        "/v1/sessions/sesn_1/../sesn_2/events",
    ],
)
def test_every_way_to_write_an_unpriced_address_is_unpriced(url: str) -> None:
    assert classify("POST", url) == UNPRICED


@pytest.mark.parametrize(
    "url",
    [
        "//v1/messages",
        "/V1/messages",
        "/v1/messages;v=1",
        "/v1/messages\\",
        "/v1/agents/x\\..\\..\\messages",
        "/v1/agents/..%252fmessages",
        "/v1/agents/x%00/archive",
        "/v1/agents/a;b",
        "/v1/agents/a b",
        "/v1/agents/ä",
    ],
)
def test_an_odd_address_is_never_free(url: str) -> None:
    assert classify("POST", url) != FREE


SEGMENTS = st.sampled_from(
    [
        *["v1", "messages", "count_tokens", "batches", "agents", "files", "sessions", "events"],
        *["x", "..", ".", "", "%2e%2e", "%2E", "..%2f", "%2fmessages", "%252e%252e", "%5c.."],
        *["..\\", "..\\..\\messages", "messages;a", ";", "m%65ssages", "V1", "a%20b", "\u2025"],
    ]
)


def readings(path: str) -> Iterator[str]:
    """The paths that one server or another may route by."""
    for text in (path, unquote(path), unquote(unquote(path))):
        for slashed in (text, text.replace("\\", "/")):
            for cut in (slashed, re.sub(r";[^/]*", "", slashed)):
                yield cut
                yield posixpath.normpath("/" + re.sub(r"/+", "/", cut).lstrip("/"))
                yield _without_dots(cut)


def _without_dots(path: str) -> str:
    """Remove dot segments as RFC 3986 says, where empty segments are segments."""
    kept: list[str] = []
    for segment in path.split("/")[1:]:
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    return "/" + "/".join(kept)


def costs_money(path: str) -> bool:
    path = path.rstrip("/").lower()
    places = [match.start() for match in re.finditer(r"/v1/", path)]
    return any(_PAID.fullmatch(path[place:]) for place in places)


_PAID = re.compile(
    "|".join(
        re.escape(path).replace(r"\{id\}", "[^/]+")
        for path, kind in ENDPOINTS.items()
        if kind != FREE
    )
)


@settings(max_examples=deep(1500, else_=300))
@given(segments=st.lists(SEGMENTS, min_size=2, max_size=7), prefix=st.sampled_from(["/v1/", "/"]))
@example(segments=["agents", "x\\..\\..\\messages"], prefix="/v1/")
@example(segments=["agents", "%252e%252e", "messages"], prefix="/v1/")
def test_no_address_that_some_server_may_charge_for_is_free(
    segments: list[str], prefix: str
) -> None:
    path = prefix + "/".join(segments)
    paid = [reading for reading in readings(path) if costs_money(reading)]

    if paid:
        assert classify("POST", path) != FREE, f"{path} may be routed as {paid[0]}"


# The price library -------------------------------------------------------------------------------


def claude_models() -> Iterator[Any]:
    from genai_prices import data_snapshot

    for provider in data_snapshot.get_snapshot().providers:
        if provider.id in {"anthropic", "aws", "google", "azure"}:
            yield from (info for info in provider.models if "claude" in info.id)


def all_prices(info: Any) -> Iterator[Mapping[str, Any]]:
    conditional = info.prices if isinstance(info.prices, list) else []
    yield from (vars(one.prices) for one in conditional)
    if not conditional:
        yield vars(info.prices)
    yield from (vars(variant.prices) for variant in info.price_variants or ())


def test_every_price_that_the_library_knows_for_claude_is_read() -> None:
    known = {
        "input_mtok",
        "output_mtok",
        "cache_write_mtok",
        "cache_write_1h_mtok",
        "cache_read_mtok",
        "web_searches_kcount",
    }
    found = {
        name
        for info in claude_models()
        for prices in all_prices(info)
        for name, value in prices.items()
        if value is not None
    }

    assert found <= known, f"Prices that nobody reads: {', '.join(sorted(found - known))}"


def test_every_variant_that_the_library_knows_for_claude_is_read() -> None:
    known = [{"speed": "fast"}, {"processing": "batch"}]
    for info in claude_models():
        for variant in info.price_variants or ():
            assert variant.when in known, f"{info.id} has prices for {variant.when}"


def test_a_batch_is_half_in_the_library_too() -> None:
    for info in claude_models():
        for variant in info.price_variants or ():
            if variant.when == {"processing": "batch"}:
                whole = list(all_prices(info))[-1 - len(info.price_variants)]
                for name, value in vars(variant.prices).items():
                    assert getattr(value, "base", value) * 2 == getattr(
                        whole[name], "base", whole[name]
                    ), f"{info.id} {name}"
