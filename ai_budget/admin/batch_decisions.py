"""What a person decides of batches: to cancel them, to submit them again, and about uncertain ones.

Each is confirmed on a page of its own, asks for a permission of its own, and is kept in the
history of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.auth import get_permission_codename
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.db.models import Model, QuerySet, Sum
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.functional import Promise
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.timezone import get_current_timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from ai_budget import batches as verbs
from ai_budget.admin.amounts import EMPTY, count, exact_usd
from ai_budget.admin.large_tables import JournalAdmin
from ai_budget.exceptions import AIBudgetError
from ai_budget.models import Batch, BatchItem, BatchSubmission

_REFUSALS = (AIBudgetError, ImproperlyConfigured, TypeError, ValueError)
"""What the verbs raise, with a text for whoever asked."""


class _AcceptForm(forms.Form):
    api_id = forms.CharField(
        label=gettext_lazy("Id at the API"),
        max_length=128,
        widget=forms.TextInput(attrs={"class": "vTextField", "autocomplete": "off"}),
        help_text=gettext_lazy("It begins with msgbatch_."),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """One way to decide about an uncertain submission. ``form`` asks for what it needs to know."""

    title: str | Promise
    explanation: str | Promise
    button: str | Promise
    done: str | Promise
    decide: Callable[..., None]
    form: type[forms.Form] = forms.Form


_CHOICES: Mapping[str, _Choice] = {
    "accept": _Choice(
        title=gettext_lazy("The API has it"),
        explanation=gettext_lazy(
            "Look in the Anthropic console for a batch of as many requests, made at that time. "
            "With its id it is looked after like any other: its results are read and booked, "
            "each item once."
        ),
        button=gettext_lazy("It is this batch"),
        done=gettext_lazy("The submission is the API's batch %(api_id)s now."),
        decide=verbs.accept,
        form=_AcceptForm,
    ),
    "send-again": _Choice(
        title=gettext_lazy("Send it again"),
        explanation=gettext_lazy(
            "Only if you are sure that the API never had it. Else its requests are answered "
            "twice, and what the first time costs is booked nowhere."
        ),
        button=gettext_lazy("Yes, send it again"),
        done=gettext_lazy("The submission is sent again."),
        decide=verbs.send_again,
    ),
    "release": _Choice(
        title=gettext_lazy("Release it"),
        explanation=gettext_lazy(
            "Its items are canceled and what is held for them is released. If the API had it "
            "all the same, what it costs is booked nowhere. The items can be submitted again "
            "once the batch is finished."
        ),
        button=gettext_lazy("Yes, release it"),
        done=gettext_lazy("What the submission held is released."),
        decide=verbs.release,
    ),
}


class BatchDecisions(JournalAdmin):
    """The decisions' pages and actions. To look at a batch allows none of them.

    Canceling needs the permission to change batches, submitting again the one to add them, and
    deciding about an uncertain submission the one to change submissions.
    """

    actions: Any = ("cancel", "resubmit")

    # Permissions

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "change", Batch)

    def has_resubmit_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "add", Batch)

    def has_resolve_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "change", BatchSubmission)

    def _may(self, request: HttpRequest, what: str, model: type[Model]) -> bool:
        codename = get_permission_codename(what, model._meta)
        allowed = request.user.has_perm(f"{model._meta.app_label}.{codename}")
        return allowed and self.has_view_permission(request)

    # Pages

    def get_urls(self) -> list[URLPattern]:
        pages: list[tuple[str, Callable[..., HttpResponse], str]] = [
            ("<int:batch_id>/cancel/", self.cancel_page, "cancel"),
            ("<int:batch_id>/resubmit/", self.resubmit_page, "resubmit"),
            (
                "<int:batch_id>/submissions/<int:number>/<slug:choice>/",
                self.resolve_page,
                "resolve",
            ),
        ]
        own = [
            path(route, self.admin_site.admin_view(view), name=f"ai_budget_batch_{name}")
            for route, view, name in pages
        ]
        return own + super().get_urls()

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        batch = self.get_object(request, object_id)
        offered = {} if batch is None else self._offered(request, batch)
        return super().change_view(
            request, object_id, form_url, {**(extra_context or {}), **offered}
        )

    def cancel_page(self, request: HttpRequest, batch_id: int) -> HttpResponse:
        if not self.has_cancel_permission(request):
            raise PermissionDenied
        batch = self._batch(request, batch_id)
        if request.method == "POST":
            self._cancel(request, [batch])
            return HttpResponseRedirect(self.url_of("change", batch.pk))
        return self._ask(
            request,
            title=_("Cancel this batch?"),
            subtitle=batch,
            lines=_about_cancel([batch]),
            button=_("Yes, cancel it"),
            back=self.url_of("change", batch.pk),
        )

    def resubmit_page(self, request: HttpRequest, batch_id: int) -> HttpResponse:
        if not self.has_resubmit_permission(request):
            raise PermissionDenied
        batch = self._batch(request, batch_id)
        if request.method == "POST":
            (created,) = self._resubmit(request, [batch]) or (batch,)
            return HttpResponseRedirect(self.url_of("change", created.pk))
        return self._ask(
            request,
            title=_("Submit the unanswered items of this batch again?"),
            subtitle=batch,
            lines=_about_resubmit([batch]),
            button=_("Yes, submit them again"),
            back=self.url_of("change", batch.pk),
        )

    def resolve_page(
        self, request: HttpRequest, batch_id: int, number: int, choice: str
    ) -> HttpResponse:
        if not self.has_resolve_permission(request):
            raise PermissionDenied
        batch = self._batch(request, batch_id)
        submission = batch.submissions.filter(number=number).first()
        if submission is None or choice not in _CHOICES:
            raise Http404
        chosen, back = _CHOICES[choice], self.url_of("change", batch.pk)
        if submission.status != BatchSubmission.Status.UNCERTAIN:
            text = _("Submission %(number)s is not uncertain any more.") % {"number": number}
            self.message_user(request, text, messages.WARNING)
            return HttpResponseRedirect(back)
        form = chosen.form(request.POST if request.method == "POST" else None)
        if form.is_valid() and self._resolve(request, submission, chosen, form):
            return HttpResponseRedirect(back)
        return self._ask(
            request,
            title=chosen.title,
            subtitle=batch,
            lines=[_about_submission(submission), chosen.explanation],
            button=chosen.button,
            back=back,
            form=form,
        )

    # Actions of the list

    @admin.action(permissions=["cancel"], description=gettext_lazy("Cancel selected batches"))
    def cancel(self, request: HttpRequest, batches: QuerySet[Batch]) -> HttpResponse | None:
        wanted = list(batches.exclude(status=Batch.Status.FINISHED))
        if not wanted:
            self.message_user(request, _("They are finished already."), messages.WARNING)
            return None
        if request.POST.get("confirmed"):
            self._cancel(request, wanted)
            return None
        return self._ask_of_many(
            request,
            wanted,
            action="cancel",
            title=_("Cancel these batches?"),
            lines=_about_cancel(wanted),
            button=_("Yes, cancel them"),
        )

    @admin.action(
        permissions=["resubmit"],
        description=gettext_lazy("Submit unanswered items of selected batches again"),
    )
    def resubmit(self, request: HttpRequest, batches: QuerySet[Batch]) -> HttpResponse | None:
        wanted = [batch for batch in batches if _can_be_resubmitted(batch)]
        if not wanted:
            text = _("None of them is finished with items that are unanswered.")
            self.message_user(request, text, messages.WARNING)
            return None
        if request.POST.get("confirmed"):
            self._resubmit(request, wanted)
            return None
        return self._ask_of_many(
            request,
            wanted,
            action="resubmit",
            title=_("Submit the unanswered items of these batches again?"),
            lines=_about_resubmit(wanted),
            button=_("Yes, submit them again"),
        )

    # What is done

    def _cancel(self, request: HttpRequest, wanted: Iterable[Batch]) -> None:
        canceled = 0
        for batch in wanted:
            if batch.status == Batch.Status.FINISHED:
                self._refused(request, batch, _("It is finished already."))
                continue
            try:
                verbs.cancel(batch)
            except _REFUSALS as error:
                self._refused(request, batch, str(error))
                continue
            self.log_change(request, batch, _("Asked to cancel it."))
            canceled += 1
        if canceled:
            text = ngettext(
                "%(count)s batch is being canceled.",
                "%(count)s batches are being canceled.",
                canceled,
            )
            self.message_user(request, text % {"count": canceled}, messages.SUCCESS)

    def _resubmit(self, request: HttpRequest, wanted: Iterable[Batch]) -> list[Batch]:
        submitted = []
        for batch in wanted:
            # A second click must not pay for the same items a second time.
            later = batch.resubmitted_as.order_by("pk").first()
            if later is not None:
                text = _("It was submitted again as %(batch)s already.") % {"batch": later}
                self._refused(request, batch, text)
                continue
            try:
                created = verbs.resubmit(batch)
            except _REFUSALS as error:
                self._refused(request, batch, str(error))
                continue
            self.log_change(request, batch, _("Submitted again as %(batch)s.") % {"batch": created})
            self.log_addition(request, created, _("Submits %(batch)s again.") % {"batch": batch})
            told = format_html(
                _("Items of {batch} submitted again as {link}: {items}."),
                items=count(created.total),
                batch=batch,
                link=self.link_to(created.pk),
            )
            self.message_user(request, told, messages.SUCCESS)
            submitted.append(created)
        return submitted

    def _resolve(
        self,
        request: HttpRequest,
        submission: BatchSubmission,
        chosen: _Choice,
        form: forms.Form,
    ) -> bool:
        """Carry a decision out; say on its form why it could not be."""
        try:
            chosen.decide(submission, **form.cleaned_data)
        except _REFUSALS as error:
            form.add_error(None, str(error))
            return False
        done = str(chosen.done) % form.cleaned_data
        label = _("Submission %(number)s") % {"number": submission.number}
        self.log_change(request, submission.batch, f"{label}: {done}")
        self.message_user(request, done, messages.SUCCESS)
        return True

    def _refused(self, request: HttpRequest, batch: Batch, why: str) -> None:
        self.message_user(request, f"{batch}: {why}", messages.ERROR)

    # What is shown

    def _offered(self, request: HttpRequest, batch: Batch) -> dict[str, Any]:
        """Return what the page of a batch offers to decide, to whoever may."""
        finished = batch.status == Batch.Status.FINISHED
        cancel = self.has_cancel_permission(request) and not finished
        resubmit = self.has_resubmit_permission(request) and _can_be_resubmitted(batch)
        uncertain = batch.submissions.filter(status=BatchSubmission.Status.UNCERTAIN)
        may_resolve = self.has_resolve_permission(request)
        return {
            "cancel_url": self.url_of("cancel", batch.pk) if cancel else "",
            "resubmit_url": self.url_of("resubmit", batch.pk) if resubmit else "",
            "uncertain": [
                {
                    "about": _about_submission(submission),
                    "choices": [
                        (self.url_of("resolve", batch.pk, submission.number, slug), choice.title)
                        for slug, choice in _CHOICES.items()
                        if may_resolve
                    ],
                }
                for submission in uncertain
            ],
        }

    def _ask_of_many(
        self, request: HttpRequest, wanted: Sequence[Batch], *, action: str, **page: Any
    ) -> HttpResponse:
        hidden = [("action", action), ("confirmed", "yes")]
        hidden += [(ACTION_CHECKBOX_NAME, str(batch.pk)) for batch in wanted]
        return self._ask(
            request, hidden=hidden, back=self.url_of("changelist"), batches=wanted, **page
        )

    def _ask(self, request: HttpRequest, **page: Any) -> HttpResponse:
        """Return the page that asks whether it is meant; its form comes back to this address."""
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "media": self.media,
            **page,
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "admin/ai_budget/confirm.html", context)

    def _batch(self, request: HttpRequest, batch_id: int) -> Batch:
        batch: Batch | None = self.get_object(request, str(batch_id))
        if batch is None:
            raise Http404
        return batch

    def url_of(self, page: str, *args: Any) -> str:
        """Return the address of one of the pages of batches."""
        name = f"admin:ai_budget_batch_{page}"
        return reverse(name, args=args, current_app=self.admin_site.name)

    def link_to(self, batch_id: int) -> SafeString:
        return format_html('<a href="{}">#{}</a>', self.url_of("change", batch_id), batch_id)


def _can_be_resubmitted(batch: Batch) -> bool:
    unanswered = batch.errored + batch.canceled + batch.expired + batch.refused
    over = batch.status == Batch.Status.FINISHED
    return bool(over and unanswered) and not batch.resubmitted_as.exists()


def _about_cancel(batches: Sequence[Batch]) -> list[str]:
    figures = {
        "items": count(sum(batch.open for batch in batches)),
        "held": exact_usd(sum(batch.held_nanousd for batch in batches)),
    }
    return [
        _("Open items: %(items)s. Held for them: %(held)s.") % figures,
        _(
            "What has not been sent is released. What the API has is canceled there, which may "
            "take some minutes; what it answers meanwhile is booked."
        ),
    ]


def _about_resubmit(batches: Sequence[Batch]) -> list[str]:
    unanswered = sum(b.errored + b.canceled + b.expired + b.refused for b in batches)
    return [
        _("Items without an answer: %(items)s.") % {"items": count(unanswered)},
        _(
            "They are submitted as a batch of their own, which counts today, for whoever pays "
            "for this one: what they can cost is held again, or the budget refuses it. Items "
            "whose requests are no longer kept are left out."
        ),
    ]


def _about_submission(submission: BatchSubmission) -> str:
    held = submission.items.filter(status=BatchItem.Status.OPEN).aggregate(
        nanousd=Sum("reserved_nanousd")
    )
    return _(
        "Submission %(number)s (items: %(items)s) was sent at %(sent)s, and nobody heard whether "
        "the API took it. %(held)s stays held for it."
    ) % {
        "number": submission.number,
        "items": count(submission.items_count),
        "held": exact_usd(held["nanousd"] or 0),
        "sent": moment(submission.sent_at),
    }


def moment(at: datetime | None) -> str:
    """Return a time to the minute, in the reader's zone."""
    return EMPTY if at is None else f"{at.astimezone(get_current_timezone()):%Y-%m-%d %H:%M}"
