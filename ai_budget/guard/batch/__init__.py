"""Message batches inside the budget: reserved whole, sent, and booked item by item."""
