# syntax=docker/dockerfile:1.7
#
#   docker build --target cpu -t mimo-fast:cpu .   nano inside: it speaks, listens and answers at once, offline
#   docker build --target gpu -t mimo-fast:gpu .   weights in the volume /weights
#
# tests/images reads this file, and runs its commands as far as a machine without Docker can.

ARG DEBIAN=trixie
ARG PYTHON=3.12
ARG CUDA=13.0.2

# The package as a wheel, with the kernels for CPUs.
FROM python:${PYTHON}-slim-${DEBIAN} AS wheel
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE MANIFEST.in ./
COPY csrc csrc
COPY mimo_fast mimo_fast
ENV MIMO_FAST_CUDA_ARCHITECTURES=none
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# The same with the CUDA kernels, which need a compiler and no GPU.
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS cuda-wheel
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE MANIFEST.in ./
COPY csrc csrc
COPY mimo_fast mimo_fast
RUN python3 -m venv /build \
    && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS gpu
# Triton compiles what launches its kernels: it needs a C compiler and Python's headers.
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/mimo-fast
ENV PATH=/opt/mimo-fast/bin:$PATH
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt torch triton
RUN --mount=type=bind,from=cuda-wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/mimo_fast-*.whl)[server,cuda]"
RUN useradd --uid 10001 --create-home mimo \
    && install -d -o mimo -g mimo /weights /voices
ENV HF_HOME=/weights/huggingface \
    TRITON_CACHE_DIR=/weights/triton \
    PYTHONUNBUFFERED=1 \
    MIMO_FAST_HOST=0.0.0.0 \
    MIMO_FAST_PORT=8000
USER 10001
WORKDIR /home/mimo
VOLUME /weights
EXPOSE 8000
# The published weights are loaded in minutes, and downloaded first.
HEALTHCHECK --interval=30s --timeout=15s --start-period=1h --retries=3 \
    CMD ["python", "-m", "mimo_fast.server.probe"]
ENTRYPOINT ["mimo-fast"]
CMD ["serve"]

# Last: what `docker build .` makes.
FROM python:${PYTHON}-slim-${DEBIAN} AS cpu
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt torch --index-url https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/mimo_fast-*.whl)[server]"
RUN useradd --uid 10001 --create-home mimo \
    && install -d -o mimo -g mimo /weights /voices
ENV HF_HOME=/weights/huggingface \
    PYTHONUNBUFFERED=1 \
    MIMO_FAST_HOST=0.0.0.0 \
    MIMO_FAST_PORT=8000
USER 10001
WORKDIR /home/mimo
VOLUME /weights
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=15s --start-period=1m --retries=3 \
    CMD ["python", "-m", "mimo_fast.server.probe"]
ENTRYPOINT ["mimo-fast"]
CMD ["serve"]
