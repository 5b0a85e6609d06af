"""What people may ask the desk."""

from __future__ import annotations

from django import forms

LENGTHS = {
    "sentence": "In one sentence",
    "points": "In three points",
    "paragraph": "In a paragraph",
}
TINY_QUESTIONS = (
    "Name a colour of the evening sky.",
    "Name a bird that sings at night.",
    "Name a tree that loses no leaves.",
)


class SummaryForm(forms.Form):
    """A text, and how short it should become."""

    text = forms.CharField(
        label="The text",
        max_length=20_000,
        widget=forms.Textarea({"rows": 10}),
    )
    length = forms.ChoiceField(label="How short", choices=list(LENGTHS.items()), initial="points")

    def prompt(self) -> str:
        """The request in words."""
        wish = LENGTHS[self.cleaned_data["length"]].lower()
        return f"Summarise this text {wish}:\n\n{self.cleaned_data['text']}"


class QuestionForm(forms.Form):
    """A question that stands for itself."""

    question = forms.CharField(
        label="Your question",
        max_length=2_000,
        widget=forms.Textarea({"rows": 3}),
    )


class NoteForm(forms.Form):
    """A note for the box at the desk."""

    text = forms.CharField(
        label="Your note",
        max_length=2_000,
        widget=forms.Textarea({"rows": 3}),
    )


class TinyForm(forms.Form):
    """One of a few short questions: a tiny budget has room for no other."""

    question = forms.ChoiceField(
        label="One small question",
        choices=[(question, question) for question in TINY_QUESTIONS],
        widget=forms.RadioSelect,
        initial=TINY_QUESTIONS[0],
    )
