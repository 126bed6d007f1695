"""The benchmark of the product: `python -m tests.bench`. Everything is measured against one stand-in, in one run."""
