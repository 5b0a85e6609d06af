"""Every name that OpenTelemetry is told, in one place: its conventions for GenAI still change.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics
"""

from __future__ import annotations

from collections.abc import Mapping

SCOPE = "ai_budget"
"""The instrumentation scope, by which a view can choose or drop our metrics."""

# Conventions

OPERATION_NAME = "gen_ai.operation.name"
PROVIDER_NAME = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
TOKEN_TYPE = "gen_ai.token.type"  # noqa: S105
CACHE_CREATION_INPUT_TOKENS = "gen_ai.usage.cache_creation.input_tokens"
ERROR_TYPE = "error.type"

CHAT = "chat"
INPUT, OUTPUT = "input", "output"

PROVIDERS: Mapping[str, str] = {
    "bedrock": "aws.bedrock",
    "vertex": "gcp.vertex_ai",
    "foundry": "azure.ai.inference",
}
"""What the conventions call a provider, where they have another word than we."""

TOKEN_USAGE = "gen_ai.client.token.usage"  # noqa: S105
OPERATION_DURATION = "gen_ai.client.operation.duration"

TOKEN_BUCKETS = tuple(4**power for power in range(14))
"""What the conventions advise for a histogram of tokens: 1 to 67,108,864."""

SECOND_BUCKETS = tuple(2**power / 100 for power in range(14))
"""What the conventions advise for a histogram of seconds: 0.01 to 81.92."""

# Our own

COST = "ai_budget.cost"
CALLS = "ai_budget.calls"
REFUSALS = "ai_budget.refusals"

CALL_ID = "ai_budget.call_id"
FEATURE = "ai_budget.feature"
KIND = "ai_budget.kind"
STATUS = "ai_budget.status"
MODEL = "ai_budget.model"
DECISION = "ai_budget.decision"
DOWNGRADED = "ai_budget.downgraded"
CACHED = "ai_budget.cached"
COST_USD = "ai_budget.cost_usd"
SAVED_USD = "ai_budget.saved_usd"
REFUSED = "ai_budget.refused"
