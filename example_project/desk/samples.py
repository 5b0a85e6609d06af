"""Something to try when nothing comes to mind, and what the local stand-in says to it."""

from __future__ import annotations

ANSWERS = {
    "Why is the sky dark at night?": """\
It should not be, if you think about it: in a universe without end, every line of sight would \
sooner or later meet a star, and the whole sky would shine like the surface of the sun. People \
puzzled over that for two hundred years.

The way out is time. The universe is old but not endlessly old, and light takes its time, so we \
see only the stars whose light has had long enough to arrive. And because space stretches on the \
way, the oldest light reaches us as a faint glow of microwaves instead of a blaze.

So the dark between the stars is the edge of what has had time to reach us.""",
    "How do I keep a notebook that I will still read in ten years?": """\
Write less, and write it for a stranger, because in ten years that is who you will be.

Put the date and the place on every page; memory keeps neither. Write down what things cost, what \
you ate, who said what: the small facts that seem too plain to note are the ones you cannot \
recover. Leave out what you ought to have felt.

Keep it in one book and by one pen, close it when a page is full, and read it once a year. A \
notebook that is never read is only a habit; one that is read becomes a conversation.""",
    "What does a budget for an AI feature protect me from?": """\
From the ordinary accidents. A loop that asks the same question all night. A visitor who pastes a \
whole book, and then another. A deploy that picks a model twenty times as dear. A retry that \
retries. None of them is malice, and each can cost more in an hour than the feature earns in a \
month.

A report tells you the next morning. A budget says no at the moment it matters: it sets aside the \
most a call can cost before the call is sent, and a call that does not fit is not made.

It also tells you something pleasant, most days: how little it was.""",
}
QUESTIONS = tuple(ANSWERS)

TEXT = """\
For two hundred years the keeper of the light climbed the stairs twice a night. The lamp wanted \
oil at ten and again at three, and between the two the keeper wrote the weather into a book: \
wind, cloud, the state of the sea, and every ship that passed close enough to be named.

When the lamp became electric, the stairs were climbed once a week. A wire told the harbour \
whether the light was burning, and a second lamp turned itself into place when the first one \
failed. Nobody wrote the weather down any more, for the harbour had instruments of its own, and \
better ones.

It was a fisherman's daughter who found the books, ninety of them, in a cupboard under the \
stairs. She copied out the winds of a hundred and twelve winters and took them to the university. \
There they turned out to be the longest record of its kind on that coast: no instrument had stood \
in one place so long, and no clerk had been so stubborn about three o'clock in the morning.

The cupboard is empty now, and the books are kept where it is dry. But the lighthouse has a new \
one on its shelf, with a pencil on a string. Whoever comes up is asked to write down the wind.
"""

NOTES = (
    "May I keep the atlas of the northern coast for two more weeks? I am only at the fjords.",
    "Somebody has underlined half of the poems on my shelf. Not me! But with good taste.",
    "Could you buy the new history of lighthouses? I would be the first to borrow it.",
    "Are you open on the morning of the second of January? I will need a quiet room by then.",
    "The lamp at the third table by the window flickers, and reading there makes one seasick.",
    "Thank you for finding my grandmother’s cookbook. We made the plum cake, and it worked.",
    "I returned five books on Friday and the machine gave me a receipt for four.",
    "When do you close on the evening of the lantern walk?",
    "The wheel of the book trolley screams. Everybody looks up, and I blush.",
    "Please get something on mushrooms that a beginner can trust with his life.",
    "Is it true that the cat belongs to the library? If so, whom may I pay for the biscuits?",
    "How many books may one borrow over the summer? I asked for twelve and was laughed at.",
    "The lady at the desk this morning was patient with my father. It meant a lot to us.",
    "A page is missing from the third volume, just where the letter is opened.",
    "Have you thought of opening an hour earlier? There are four of us at the door at eight.",
    "I should like to read the diaries of the keeper whose winds were found in a cupboard.",
)
"""What readers have left in the box at the desk."""
