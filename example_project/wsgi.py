"""The site for WSGI servers: ``gunicorn --threads 4 example_project.wsgi``."""

from __future__ import annotations

import os

from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")

# Any server then has its static files, with nothing to collect: this is a site to try things on.
application = StaticFilesHandler(get_wsgi_application())
