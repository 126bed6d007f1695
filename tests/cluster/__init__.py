"""The topology of compose.yaml as processes on the loopback, under load, while parts of it are killed.

nginx with `app/operations/nginx.conf` in front of two backends, a worker, PostgreSQL, Redis, and the sandbox as
DashScope and OSS: `python -m tests.cluster --streams 200 --seconds 120`.
"""
