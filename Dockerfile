# Two images: `--target service` scores and has no torch, `--target training` makes the models.
# How to build them, and how to renew the digest: docs/operations.md

# The Python that the tests run on.
ARG PYTHON_IMAGE=python:3.11-slim-trixie@sha256:da047cb8f9d1d98e5c070f5300ba9f7274e33b8fc0e5be5ed88740aed1b95ba9

FROM ${PYTHON_IMAGE} AS source
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ecdctr.py ./
COPY bundle bundle
COPY embeddings_store embeddings_store
COPY service service
COPY training training
COPY experiments experiments
COPY loadtest loadtest
# Without pip in it: nothing is installed at run time.
RUN python -m venv --without-pip /opt/ecdctr

FROM source AS service-build
RUN pip --python /opt/ecdctr/bin/python install --no-cache-dir --constraint constraints.txt '.[s3]'

FROM source AS training-build
# Where a CPU build of torch is, if that is wanted: it is several GB smaller.
ARG PIP_EXTRA_INDEX_URL
RUN pip --python /opt/ecdctr/bin/python install --no-cache-dir --constraint constraints.txt '.[s3,train]'

FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# With a name: torch's exporter asks for it.
RUN groupadd --gid 10001 ecdctr \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp ecdctr
# The root file system may be read-only: what is written goes to /tmp or to the workspace. Without the
# third variable onnxruntime leaves a device id in HOME and sends statistics of use to its makers.
ENV PATH=/opt/ecdctr/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    ECDCTR_WORKSPACE=/workspace
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["ecdctr"]

FROM runtime AS training
LABEL org.opencontainers.image.title="ecdctr-training" \
      org.opencontainers.image.description="Trains, exports and promotes the ads CTR model"
COPY --from=training-build /opt/ecdctr /opt/ecdctr
# Logs are for lines, not for progress bars.
ENV TQDM_DISABLE=1
CMD ["--help"]

FROM runtime AS service
LABEL org.opencontainers.image.title="ecdctr-service" \
      org.opencontainers.image.description="Scores ads over HTTP"
COPY --from=service-build /opt/ecdctr /opt/ecdctr
EXPOSE 8000
HEALTHCHECK --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/livez', timeout=3)"]
CMD ["serve", "--host", "0.0.0.0"]
