"""Where balances are kept and money is taken: reserve, settle, release, balances."""
