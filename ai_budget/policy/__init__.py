"""Decisions, each a pure function of what it is handed: which limits apply, which model now."""
