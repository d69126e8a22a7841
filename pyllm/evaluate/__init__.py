"""Quality against cost: what a policy's answers lose beside dense attention's, and what it reads for them."""
