"""The site for ASGI servers: ``uvicorn example_project.asgi:application``."""

from __future__ import annotations

import os

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")

# Any server then has its static files, with nothing to collect: this is a site to try things on.
application = ASGIStaticFilesHandler(get_asgi_application())
