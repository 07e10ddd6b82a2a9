# syntax=docker/dockerfile:1
# Two images of one build, for the chart helm/loraplex and for `docker run`:
#   docker build --target cpu  -t loraplex:0.1.0-cpu  .     head, gateways, and bases on CPUs
#   docker build --target cuda -t loraplex:0.1.0-cuda .     GPU nodes
# Both install the same versions (requirements.lock); they differ in the build of torch. All nodes of a cluster must have the same
# sources: build both from one checkout. Tags are pinned; to pin the very bytes, pass --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm

# --- What the images have beside Python: KubeRay's probes call bash and wget, Triton compiles its launchers with gcc.
FROM ${PYTHON_IMAGE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PATH=/opt/loraplex/bin:$PATH \
    HOME=/home/loraplex \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates tini wget \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 loraplex \
 && useradd --uid 10001 --gid 10001 --home-dir /home/loraplex --create-home --shell /usr/sbin/nologin loraplex \
 && install --directory --owner=10001 --group=10001 /var/lib/loraplex /models
WORKDIR /home/loraplex

# --- The wheel of this checkout.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
# Of the build's own requirements too.
ENV PIP_CONSTRAINT=/src/requirements.lock
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY platform platform
COPY kernels kernels
COPY deployments deployments
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# --- All that is installed, in a virtual environment that the images take over whole.
FROM ${PYTHON_IMAGE} AS packages
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/tmp/requirements.lock
COPY requirements.lock /tmp/requirements.lock
RUN python -m venv /opt/loraplex
COPY --from=wheel /wheels /tmp/wheels

# torch without CUDA, from PyTorch's own index.
FROM packages AS cpu-packages
ARG TORCH=2.13.0
RUN /opt/loraplex/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu "torch==${TORCH}+cpu" /tmp/wheels/*.whl \
 && /opt/loraplex/bin/pip check

# PyPI's torch is the one with CUDA; it brings NVIDIA's libraries and Triton.
FROM packages AS cuda-packages
ARG TORCH=2.13.0
RUN /opt/loraplex/bin/pip install "torch==${TORCH}" /tmp/wheels/*.whl \
 && /opt/loraplex/bin/pip check

# --- GPU nodes. The driver comes from the host, CUDA's libraries with torch.
FROM base AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=cuda-packages /opt/loraplex /opt/loraplex
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 8000 9000
# Of a container that serves. In Kubernetes the chart's probes hold.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["wget", "--tries=1", "--timeout=4", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/ready"]
ENTRYPOINT ["tini", "--"]
CMD ["loraplex", "--help"]

# --- Everything else; the default target.
FROM base AS cpu
COPY --from=cpu-packages /opt/loraplex /opt/loraplex
USER 10001:10001
EXPOSE 8000 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["wget", "--tries=1", "--timeout=4", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/ready"]
ENTRYPOINT ["tini", "--"]
CMD ["loraplex", "--help"]
