"""A small site that uses every verb of ai_budget. For trying things out, not for production."""
