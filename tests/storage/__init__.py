"""Both storage backends: what they share, and what is particular to each."""
