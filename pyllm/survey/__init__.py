"""How long a folder's documents are for a model, and what attention policies would save on them."""
