"""What each endpoint of the API costs: priced, a batch, free, or unpriced.

Requests that only read or delete cost nothing. Every other request must be in the table, or a
guarded client refuses it: a new endpoint of the SDK is no way around the budget.
"""

from __future__ import annotations

import posixpath
import re
from urllib.parse import unquote, urlsplit

PRICED = "priced"
BATCH = "batch"
FREE = "free"
UNPRICED = "unpriced"

ENDPOINTS = {
    "/v1/agents": FREE,
    "/v1/agents/{id}": FREE,
    "/v1/agents/{id}/archive": FREE,
    "/v1/compliance/review/cases/{id}/respond": FREE,
    "/v1/deployments": UNPRICED,
    "/v1/deployments/{id}": UNPRICED,
    "/v1/deployments/{id}/archive": FREE,
    "/v1/deployments/{id}/pause": FREE,
    "/v1/deployments/{id}/run": UNPRICED,
    "/v1/deployments/{id}/unpause": UNPRICED,
    "/v1/dreams": UNPRICED,
    "/v1/dreams/{id}/archive": FREE,
    "/v1/dreams/{id}/cancel": FREE,
    "/v1/environments": FREE,
    "/v1/environments/{id}": FREE,
    "/v1/environments/{id}/archive": FREE,
    "/v1/environments/{id}/work/{id}": FREE,
    "/v1/environments/{id}/work/{id}/ack": FREE,
    "/v1/environments/{id}/work/{id}/heartbeat": FREE,
    "/v1/environments/{id}/work/{id}/stop": FREE,
    "/v1/files": FREE,
    "/v1/memory_stores": FREE,
    "/v1/memory_stores/{id}": FREE,
    "/v1/memory_stores/{id}/archive": FREE,
    "/v1/memory_stores/{id}/memories": FREE,
    "/v1/memory_stores/{id}/memories/{id}": FREE,
    "/v1/memory_stores/{id}/memory_versions/{id}/redact": FREE,
    "/v1/messages": PRICED,
    "/v1/messages/batches": BATCH,
    "/v1/messages/batches/{id}/cancel": FREE,
    "/v1/messages/count_tokens": FREE,
    "/v1/organizations/api_keys/{id}": FREE,
    "/v1/organizations/claude_code/managed_settings/configuration": FREE,
    "/v1/organizations/claude_code/managed_settings/rbac_group_default": FREE,
    "/v1/organizations/claude_code/managed_settings/rbac_groups/{id}": FREE,
    "/v1/organizations/claude_tag/bundles/{id}": FREE,
    "/v1/organizations/claude_tag/bundles/{id}/targets": FREE,
    "/v1/organizations/claude_tag/slack_channels": FREE,
    "/v1/organizations/claude_tag/slack_channels/{id}": FREE,
    "/v1/organizations/claude_tag/slack_workspaces/{id}": FREE,
    "/v1/organizations/compliance_settings": FREE,
    "/v1/organizations/external_keys": FREE,
    "/v1/organizations/external_keys/{id}": FREE,
    "/v1/organizations/external_keys/{id}/validate": FREE,
    "/v1/organizations/external_storage": FREE,
    "/v1/organizations/external_storage/{id}": FREE,
    "/v1/organizations/external_storage/{id}/activate": FREE,
    "/v1/organizations/federation_issuers": FREE,
    "/v1/organizations/federation_issuers/{id}": FREE,
    "/v1/organizations/federation_issuers/{id}/archive": FREE,
    "/v1/organizations/federation_rules": FREE,
    "/v1/organizations/federation_rules/{id}": FREE,
    "/v1/organizations/federation_rules/{id}/archive": FREE,
    "/v1/organizations/federation_rules/{id}/workspaces": FREE,
    "/v1/organizations/invites": FREE,
    "/v1/organizations/plugin_marketplaces/validate_archive": FREE,
    "/v1/organizations/plugin_marketplaces/validate_repository": FREE,
    "/v1/organizations/plugin_marketplaces/{id}": FREE,
    "/v1/organizations/plugins": FREE,
    "/v1/organizations/plugins/{id}": FREE,
    "/v1/organizations/plugins/{id}/installation_settings/{id}": FREE,
    "/v1/organizations/plugins/{id}/versions": FREE,
    "/v1/organizations/providers/google/projects/{id}/data_controls": FREE,
    "/v1/organizations/rbac_groups": FREE,
    "/v1/organizations/rbac_groups/{id}": FREE,
    "/v1/organizations/rbac_groups/{id}/members": FREE,
    "/v1/organizations/service_accounts": FREE,
    "/v1/organizations/service_accounts/{id}": FREE,
    "/v1/organizations/service_accounts/{id}/archive": FREE,
    "/v1/organizations/service_accounts/{id}/workspaces": FREE,
    "/v1/organizations/spend_limit_increase_requests/{id}/approve": FREE,
    "/v1/organizations/spend_limit_increase_requests/{id}/deny": FREE,
    "/v1/organizations/spend_limits": FREE,
    "/v1/organizations/telemetry_destinations": FREE,
    "/v1/organizations/telemetry_destinations/{id}": FREE,
    "/v1/organizations/telemetry_destinations/{id}/test": FREE,
    "/v1/organizations/telemetry_destinations/{id}/workspaces/{id}": FREE,
    "/v1/organizations/users/{id}": FREE,
    "/v1/organizations/users/{id}/sign_out": FREE,
    "/v1/organizations/webhooks": FREE,
    "/v1/organizations/webhooks/{id}": FREE,
    "/v1/organizations/webhooks/{id}/regenerate_signing_secret": FREE,
    "/v1/organizations/workspaces": FREE,
    "/v1/organizations/workspaces/{id}": FREE,
    "/v1/organizations/workspaces/{id}/archive": FREE,
    "/v1/organizations/workspaces/{id}/members": FREE,
    "/v1/organizations/workspaces/{id}/members/{id}": FREE,
    "/v1/organizations/workspaces/{id}/rate_limits/{id}": FREE,
    "/v1/organizations/workspaces/{id}/service_accounts": FREE,
    "/v1/organizations/workspaces/{id}/service_accounts/{id}": FREE,
    "/v1/sessions": UNPRICED,
    "/v1/sessions/{id}": UNPRICED,
    "/v1/sessions/{id}/archive": FREE,
    "/v1/sessions/{id}/events": UNPRICED,
    "/v1/sessions/{id}/resources": UNPRICED,
    "/v1/sessions/{id}/resources/{id}": UNPRICED,
    "/v1/sessions/{id}/threads/{id}/archive": FREE,
    "/v1/skills": FREE,
    "/v1/skills/{id}/versions": FREE,
    "/v1/tunnels": FREE,
    "/v1/tunnels/{id}/archive": FREE,
    "/v1/tunnels/{id}/certificates": FREE,
    "/v1/tunnels/{id}/certificates/{id}/archive": FREE,
    "/v1/tunnels/{id}/reveal_token": FREE,
    "/v1/tunnels/{id}/rotate_token": FREE,
    "/v1/user_profiles": FREE,
    "/v1/user_profiles/{id}": FREE,
    "/v1/user_profiles/{id}/action_urls": FREE,
    "/v1/user_profiles/{id}/enrollment_url": FREE,
    "/v1/user_profiles/{id}/providers/google/data_controls": FREE,
    "/v1/vaults": FREE,
    "/v1/vaults/{id}": FREE,
    "/v1/vaults/{id}/archive": FREE,
    "/v1/vaults/{id}/credentials": FREE,
    "/v1/vaults/{id}/credentials/{id}": FREE,
    "/v1/vaults/{id}/credentials/{id}/archive": FREE,
    "/v1/vaults/{id}/credentials/{id}/mcp_oauth_validate": FREE,
}
"""Every path that the SDK posts to, with {id} for its variable parts, and what it costs.

Priced: a message, or a stream of one. Batch: messages at half the price, later. Free: counting,
storing, and the administration of an organization. Unpriced: what makes models work out of this
process's sight.
"""

_READING = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})


def classify(method: str, url: str) -> str | None:
    """Return PRICED, BATCH, FREE or UNPRICED for a request; None where nobody has classified it.

    ``url`` may be a path or an absolute address, with doubled slashes or a query.
    """
    if method.upper() in _READING:
        return FREE
    path = normalize(url)
    found = ENDPOINTS.get(path)
    if found is not None:
        return found
    return next((cost for pattern, cost in _PATTERNS if pattern.fullmatch(path)), None)


def normalize(url: str) -> str:
    """Return the path that the server will route by, from /v1 on."""
    path = unquote(urlsplit(url).path)
    path = posixpath.normpath("/" + re.sub(r"/+", "/", path).lstrip("/"))
    at = path.find("/v1/")
    return path[at:] if at > 0 else path


_PATTERNS = [
    # Nothing in an id that a server could read as a path, a parameter or an escape.
    (re.compile(re.escape(path).replace(r"\{id\}", r"[\w.:@~-]+"), re.ASCII), cost)
    for path, cost in ENDPOINTS.items()
    if "{id}" in path
]
