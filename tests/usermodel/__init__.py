"""A site's own user model, keyed by UUID: nothing in ai_budget may assume an integer."""
