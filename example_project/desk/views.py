"""The pages of the desk. Each paid page names its feature; the budgets do the rest."""

from __future__ import annotations

from typing import Any

from asgiref.sync import sync_to_async
from django import forms
from django.contrib.auth.decorators import login_required, user_passes_test
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

import ai_budget
from ai_budget import periods
from ai_budget.models import CallLog
from ai_budget.periods import Period
from example_project.desk import nightly, samples, streams
from example_project.desk.forms import NoteForm, QuestionForm, SummaryForm, TinyForm
from example_project.desk.models import Note
from example_project.desk.refusals import refusals_explained, refused
from example_project.desk.usage import allowance, shares

SUMMARIST = "You shorten texts. Keep to what the text says, in plain words, without a preamble."
LIBRARIAN = "You answer at the desk of a library: briefly, warmly and in plain words."
TINY = "Answer in one short line."

_LATEST_CALLS = 15
_LATEST_NOTES = 50


@require_GET
def home(request: HttpRequest) -> HttpResponse:
    return render(request, "desk/home.html")


@login_required
@refusals_explained
def summarise(request: HttpRequest) -> HttpResponse:
    form = SummaryForm(request.POST or None, initial=_sample(request, "text", samples.TEXT))
    answer = None
    if form.is_valid():
        answer = ai_budget.ask(
            form.prompt(), feature="summaries", user=request.user, system=SUMMARIST
        )
    return _page(request, "desk/summarise.html", form, answer)


@login_required
@refusals_explained
def ask(request: HttpRequest) -> HttpResponse:
    """Answer in one piece. ``ask.js`` sends the same form to ``ask_stream`` instead."""
    form = QuestionForm(request.POST or None, initial=_sample(request, "question", ""))
    answer = None
    if form.is_valid():
        answer = ai_budget.ask(
            form.cleaned_data["question"], feature="chat", user=request.user, system=LIBRARIAN
        )
    return _page(request, "desk/ask.html", form, answer, questions=samples.QUESTIONS)


@login_required
@refusals_explained
def tiny(request: HttpRequest) -> HttpResponse:
    """Spend a budget with room for a single call; the second is refused until tomorrow."""
    form = TinyForm(request.POST or None)
    answer = None
    if form.is_valid():
        answer = ai_budget.ask(
            form.cleaned_data["question"], feature="tiny", user=request.user, system=TINY
        )
    return _page(request, "desk/tiny.html", form, answer)


@login_required
def notes(request: HttpRequest) -> HttpResponse:
    """Take a note, and show what is in the box and what the last night made of it."""
    form = NoteForm(request.POST or None)
    if form.is_valid():
        Note.objects.create(text=form.cleaned_data["text"], left_at=periods.now())
        return redirect("notes")
    context = {"form": form, "notes": Note.objects.all()[:_LATEST_NOTES]}
    return render(request, "desk/notes.html", {**context, "night": nightly.latest()})


@user_passes_test(lambda user: user.is_staff)
@require_POST
@refusals_explained
def sort_notes(request: HttpRequest) -> HttpResponse:
    """Do at once what is done every night; the answers come in the minutes after."""
    nightly.sort_notes()
    return redirect("notes")


@login_required
@require_POST
async def ask_stream(request: HttpRequest) -> HttpResponseBase:
    """Answer piece by piece, each as a line of JSON, until the reader leaves.

    A refusal is raised before the first line, while the response can still be a 429. Each kind
    of server stops the right kind of iterator when the reader leaves; the wrong kind would be
    read to its end first, and paid for.
    """
    form = QuestionForm(request.POST)
    if not form.is_valid():
        return JsonResponse({"errors": form.errors.get_json_data()}, status=400)
    question = form.cleaned_data["question"]
    body: streams.AsyncBody | streams.SyncBody
    try:
        if isinstance(request, ASGIRequest):
            body = await streams.open_async(request, question, system=LIBRARIAN)
        else:
            body = await sync_to_async(streams.open_sync)(request, question, system=LIBRARIAN)
    except ai_budget.LimitReached as refusal:
        return await sync_to_async(refused)(request, refusal, "desk/_refusal.html")
    return streams.response(body)


@login_required
@require_GET
def usage(request: HttpRequest) -> HttpResponse:
    calls = CallLog.objects.filter(user=request.user.pk).order_by("-reserved_at", "-id")
    context = {
        "allowances": [allowance(request.user, period) for period in Period],
        "shares": shares(request.user),
        "calls": calls[:_LATEST_CALLS],
    }
    return render(request, "desk/usage.html", context)


@login_required
@require_GET
def usage_strip(request: HttpRequest) -> HttpResponse:
    """The strip alone, for a page whose answer arrived after the page."""
    return render(request, "desk/strip.html")


def _sample(request: HttpRequest, field: str, text: str) -> dict[str, Any]:
    """Fill the form from the address: ``?question=...``, or ``?sample`` for a ready text."""
    if "sample" in request.GET and text:
        return {field: text}
    return {field: request.GET.get(field, "")}


def _page(
    request: HttpRequest,
    template: str,
    form: forms.Form,
    answer: ai_budget.Answer | None,
    **context: Any,
) -> HttpResponse:
    context |= {"form": form, "answer": answer}
    if answer is not None:
        context["today"] = allowance(request.user, Period.DAY)
    return render(request, template, context)
