"""What is left of a dataset: from the ledger of a download to rates, causes and a page that states them."""
