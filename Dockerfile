FROM python:3.11-slim AS builder

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock .
RUN python -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-deps --require-hashes --requirement requirements.lock \
 && /opt/venv/bin/pip uninstall --yes pip setuptools \
 && rm -rf /opt/venv/lib/python3.11/site-packages/Crypto/SelfTest


FROM python:3.11-slim

# Nothing is installed from here on, by nobody.
RUN python -m pip uninstall --yes pip setuptools wheel \
 && rm -r /usr/local/lib/python3.11/ensurepip \
 && useradd --user-group --uid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin app \
 && install --directory --owner app --group app --mode 0700 /data
COPY --from=builder /opt/venv /opt/venv
WORKDIR /app
COPY alembic.ini ./
COPY alembic alembic
COPY app app
# Compiled here, because nothing can be written there later.
RUN python -m compileall -q --invalidation-mode unchecked-hash alembic app

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DATA_DIR=/data
USER app
# The only folder that is written to: the rest runs read-only (`docker run --read-only --tmpfs /tmp`).
VOLUME /data
EXPOSE 8000 8001
# `serve` listens on 8000, `worker` on 8001.
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import socket; from urllib.request import urlopen; port = 8000 if socket.socket().connect_ex(('127.0.0.1', 8000)) == 0 else 8001; urlopen(f'http://127.0.0.1:{port}/health/live', timeout=3)"]
# Requests under way get DRAIN_SECONDS (25), the rest up to 15 more to settle: `docker run --stop-timeout 45`.
# The same image runs `python -m app worker --host 0.0.0.0` and `python -m app migrate`.
CMD ["python", "-m", "app", "serve", "--host", "0.0.0.0"]
