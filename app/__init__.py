"""A self-hosted AI voice backend on Alibaba DashScope, with each user's own API key."""
