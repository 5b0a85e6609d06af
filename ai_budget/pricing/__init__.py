"""Prices: what a model's tokens cost (rates), what an answer cost, and the most a request can."""
