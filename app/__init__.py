"""A self-hosted AI voice backend on Alibaba DashScope, with each user's own API key."""

import gc

# What is loaded is no garbage, and to look through it again and again is a sixth of the time that loading takes. While
# requests wait, other numbers hold: see app.memory.
gc.set_threshold(20_000, 10, 10)
