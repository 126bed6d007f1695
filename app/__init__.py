"""A self-hosted AI voice backend on Alibaba DashScope, with each user's own API key."""

import gc

# What is loaded is no garbage, and to look through it again and again is a sixth of the time that loading takes. It
# also bounds how many objects are looked through in one go while requests wait: a few milliseconds.
gc.set_threshold(20_000, 10, 10)
