# Runs `antiphon serve`. docs/operate.md has the flags that its transports need.
FROM python:3.12-slim

# Triton compiles small launchers when a kernel runs for the first time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Torch's wheels bring CUDA; the driver is the host's. For CPUs see docs/operate.md.
ARG PIP_FLAGS=""
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY constraints ./constraints
COPY antiphon ./antiphon
RUN pip install --no-cache-dir . $PIP_FLAGS

RUN useradd --create-home antiphon && mkdir /cache && chown antiphon /cache
USER antiphon
WORKDIR /home/antiphon
ENV HF_HOME=/cache PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000

# Loading a large model takes minutes; /health fails until then.
HEALTHCHECK --start-period=30m --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["antiphon", "serve", "--host", "0.0.0.0"]
