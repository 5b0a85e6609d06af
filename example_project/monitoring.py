"""What Prometheus reads of the example site: its budgets, and nothing about its readers.

What a site spends is nobody's business but its own, so not everybody may look: staff in a
browser, and whoever sends the token that the environment gives.
"""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.utils.crypto import constant_time_compare
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from ai_budget.metrics.prometheus import BudgetCollector

registry = CollectorRegistry()
registry.register(BudgetCollector())


@never_cache
@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """Write the metrics in the format that is asked for."""
    if not _may_read(request):
        # The same for whoever has no token and whoever has a wrong one.
        return HttpResponse(status=401, headers={"WWW-Authenticate": 'Bearer realm="metrics"'})
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return HttpResponse(encode(registry), content_type=content_type)


def _may_read(request: HttpRequest) -> bool:
    if request.user.is_active and request.user.is_staff:
        return True
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    token = getattr(settings, "METRICS_TOKEN", "")
    return bool(token) and scheme.lower() == "bearer" and constant_time_compare(given, token)
