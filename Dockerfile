# syntax=docker/dockerfile:1
# Never built as an image yet. hadolint reads it, and the steps of `cpu` were replayed in a Debian root without Docker.
#
#   docker build --target cpu  -t loramux:cpu .
#   docker build --target cuda -t loramux:cuda .
#
#   docker run --name loramux -p 50051:50051 -p 127.0.0.1:9400:9400 \
#     -v loramux-cache:/var/cache/loramux -v "$PWD/my-adapters:/adapters:ro" loramux:cpu
#   (loramux:cuda needs --gpus all as well)
#
# 50051 is the public port, 9400 has /metrics and /healthz. The admin port stays on the container's own loopback:
# docker exec loramux loramux adapters list. The shipped adapters are in the image, yours come in by /adapters. The first
# start fetches the embedded model into /var/cache/loramux.

FROM python:3.11-slim-bookworm AS python
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# What the server needs, by its name and before its sources, so that a change of these downloads nothing again.
FROM python AS build
# Debian's packages have no old versions to pin; the base image does.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["server"], sep="\n")' > needs.txt

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt -r needs.txt
COPY README.md LICENSE ./
COPY server server
RUN pip install --no-cache-dir --no-deps . \
    && python -c 'from loramux.ops.cpu import build; build.compile_to(build.HERE / "libloramux_cpu.so")'

FROM build AS build-cuda
RUN pip install --no-cache-dir -c constraints.txt -r needs.txt
COPY README.md LICENSE ./
COPY server server
RUN pip install --no-cache-dir --no-deps . \
    && python -c 'from loramux.ops.cpu import build; build.compile_to(build.HERE / "libloramux_cpu.so")'

FROM python AS final
ENV LORAMUX_CACHE=/var/cache/loramux \
    HF_HOME=/var/cache/loramux/huggingface \
    TRITON_CACHE_DIR=/var/cache/loramux/triton
RUN useradd --uid 10001 --create-home loramux \
    && install -d -o 10001 -g 10001 /var/cache/loramux /adapters
COPY adapters /opt/loramux/adapters
VOLUME ["/var/cache/loramux", "/adapters"]
EXPOSE 50051 9400
STOPSIGNAL SIGTERM
# /healthz is 200 while the server takes requests. The first start fetches and converts the embedded model.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9400/healthz', timeout=4)"]
ENTRYPOINT ["loramux"]

FROM final AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
USER 10001
CMD ["serve", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0", "--adapter-dir", "/opt/loramux/adapters", "--adapter-dir", "/adapters"]

FROM final AS cuda
# Triton compiles what launches its kernels when it first runs on a GPU, with a C compiler; g++ is not needed.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/venv /opt/venv
USER 10001
CMD ["serve", "--device", "cuda", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0", "--adapter-dir", "/opt/loramux/adapters", "--adapter-dir", "/adapters"]
