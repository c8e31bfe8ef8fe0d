# syntax=docker/dockerfile:1
# docker build --target cpu  -t loramux:cpu .
# docker build --target cuda -t loramux:cuda .
# docker run -p 50051:50051 -v loramux-cache:/var/cache/loramux loramux:cpu

FROM python:3.11-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LORAMUX_CACHE=/var/cache/loramux \
    HF_HOME=/var/cache/loramux/huggingface
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home loramux \
    && install -d -o loramux -g loramux /var/cache/loramux /adapters
WORKDIR /opt/loramux
COPY pyproject.toml constraints.txt README.md ./
COPY server server

FROM base AS cpu
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && pip install --no-cache-dir -c constraints.txt .
USER loramux
VOLUME /var/cache/loramux
EXPOSE 50051 9400
STOPSIGNAL SIGTERM
ENTRYPOINT ["loramux"]
CMD ["serve", "--model", "smollm2", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0", "--adapter-dir", "/adapters"]

FROM base AS cuda
RUN pip install --no-cache-dir -c constraints.txt .
USER loramux
VOLUME /var/cache/loramux
EXPOSE 50051 9400
STOPSIGNAL SIGTERM
ENTRYPOINT ["loramux"]
CMD ["serve", "--model", "smollm2", "--device", "cuda", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0", "--adapter-dir", "/adapters"]
