# docker build --tag crlseq .                              for CPUs
# docker build --tag crlseq --build-arg DEVICE=cuda .      for NVIDIA GPUs; run it with --gpus all
ARG DEVICE=cpu

FROM python:3.12-slim-bookworm AS cpu
# Without CUDA, whose libraries have gigabytes.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0

FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/crlseq
ENV PATH=/opt/crlseq/bin:$PATH
RUN pip install --no-cache-dir torch==2.13.0

# hadolint ignore=DL3006
FROM ${DEVICE}
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints-3.12.txt ./
COPY crlseq crlseq
RUN pip install --no-cache-dir --constraint constraints-3.12.txt '.[enrich,mudata]' && crlseq --version
# Any user may run it: caches of matplotlib and numba go to HOME.
ENV HOME=/tmp
USER 65534
WORKDIR /data
ENTRYPOINT ["crlseq"]
