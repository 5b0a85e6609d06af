"""The reading desk: summaries, questions, and what they cost. It has no tables of its own."""
