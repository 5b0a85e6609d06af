"""The addresses of the example site."""

from __future__ import annotations

from importlib.util import find_spec

from django.contrib import admin
from django.contrib.auth.views import LoginView, LogoutView
from django.urls import path

from example_project.desk import views

urlpatterns = [
    path("", views.home, name="home"),
    path("summarise/", views.summarise, name="summarise"),
    path("ask/", views.ask, name="ask"),
    path("ask/stream/", views.ask_stream, name="ask-stream"),
    path("tiny/", views.tiny, name="tiny"),
    path("notes/", views.notes, name="notes"),
    path("notes/sort/", views.sort_notes, name="sort-notes"),
    path("usage/", views.usage, name="usage"),
    path("usage/strip/", views.usage_strip, name="usage-strip"),
    path("sign-in/", LoginView.as_view(template_name="desk/sign_in.html"), name="login"),
    path("sign-out/", LogoutView.as_view(), name="logout"),
    path("admin/", admin.site.urls),
]
if find_spec("prometheus_client"):  # with the extra [prometheus]
    from example_project.monitoring import metrics

    urlpatterns.append(path("metrics/", metrics, name="metrics"))
