# syntax=docker/dockerfile:1
# Two targets: `cpu` (the default) and `gpu`.
#
#   docker build --target cpu --tag browsecast .
#   docker build --target gpu --tag browsecast:gpu .
#
# The lock holds torch's build for CUDA, which runs on CPUs too, only larger (some 6 GB). For a small CPU image name an
# index that has torch's CPU wheels: --build-arg TORCH_INDEX=URL. That one wheel is then not checked against the lock.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app

FROM base AS locked-gpu
COPY requirements.lock ./
RUN pip install --require-hashes --requirement requirements.lock

FROM base AS locked-cpu
ARG TORCH_INDEX=
COPY requirements.lock ./
# Leave out torch's blocks of the lock and everything that only a GPU needs, when torch comes from elsewhere.
RUN set -eu; \
    if [ -z "$TORCH_INDEX" ]; then \
        pip install --require-hashes --requirement requirements.lock; \
    else \
        awk '/^[a-z0-9]/ {skip = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==/} !skip' requirements.lock > cpu.lock; \
        pip install --require-hashes --no-deps --requirement cpu.lock; \
        pip install --no-deps --index-url "$TORCH_INDEX" "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.lock)"; \
    fi

FROM locked-gpu AS built-gpu
COPY pyproject.toml README.md ./
COPY models models
COPY streams streams
COPY trainer trainer
RUN pip install --no-deps --no-build-isolation .

FROM locked-cpu AS built-cpu
COPY pyproject.toml README.md ./
COPY models models
COPY streams streams
COPY trainer trainer
RUN pip install --no-deps --no-build-isolation .

# What runs: no sources, no build tools beyond the virtual environment, and no root.
FROM base AS runtime
RUN useradd --uid 10001 --user-group --create-home --home-dir /home/browsecast browsecast \
    && mkdir --parents /data/state /data/registry /data/archive /data/trainer-state /data/bundle /data/sessions \
    && chown --recursive browsecast:browsecast /data
ENV BROWSECAST_STATE_DIR=/data/state BROWSECAST_HOST=0.0.0.0 BROWSECAST_PORT=6066 BROWSECAST_TRAINER_PORT=6067 \
    BROWSECAST_REGISTRY=/data/registry BROWSECAST_ARCHIVE_DIR=/data/archive BROWSECAST_TRAINER_DIR=/data/trainer-state
WORKDIR /data
VOLUME ["/data/state", "/data/registry", "/data/archive", "/data/trainer-state", "/data/bundle", "/data/sessions"]
EXPOSE 6066 6067
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"BROWSECAST_PORT\"]}/live', timeout=2)"]
ENTRYPOINT ["browsecast"]
CMD ["worker"]

FROM runtime AS gpu
COPY --from=built-gpu /opt/venv /opt/venv
# The driver comes from the host (NVIDIA's container runtime); CUDA's libraries are in the virtual environment.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER browsecast

FROM runtime AS cpu
COPY --from=built-cpu /opt/venv /opt/venv
USER browsecast
