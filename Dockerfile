# The worker's image: two stages, no shell in the second, everything pinned by hash.
#
# Plain Dockerfile on purpose (no here-documents, no `COPY --link`): podman, buildah and docker build the same file.
# Both base images are build arguments, so that a mirror, a digest or a slim runtime need no change here:
#   podman build --build-arg PYTHON_IMAGE=… --build-arg RUNTIME_IMAGE=… -t inference-worker .

# The interpreter's minor version must be the same in both images: compiled extensions and byte code depend on it.
# Debian 13 has Python 3.13.
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-trixie
ARG RUNTIME_IMAGE=gcr.io/distroless/python3-debian13:nonroot

FROM ${PYTHON_IMAGE} AS build
# Whatever the host trusts is enough for pip; no index is named here, so a mirror is a matter of pip's own settings.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
WORKDIR /src

# strip, for what wheels carry for debuggers.  Its version is the base image's business: it changes no instruction.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*

# Tools that build the project's own wheel, in an environment of their own; they stay in this stage.
COPY requirements-build.lock ./
RUN python3 -m venv /tools \
    && /tools/bin/pip install --require-hashes --only-binary :all: --requirement requirements-build.lock

# The dependencies in a layer of their own: a change of code reuses it.  Wheels only, so nothing runs at build time.
# Then what a running worker never opens goes, a third of all: symbol tables, the second zstd binding, stubs, botocore's
# descriptions of services that it does not call (it calls SageMaker, and those that give it credentials), and the
# libraries' sources, for which byte code beside them stands in (a traceback still names file and line).
# unchecked-hash: byte code is used without a look at the source's date, which a layer may change.
# REQUIREMENTS=requirements-core.lock leaves out what operators switch on by a setting: tracing, Redis, object storage.
ARG REQUIREMENTS=requirements.lock
COPY requirements.lock requirements-core.lock ./
RUN /tools/bin/pip install --require-hashes --only-binary :all: --no-compile --target /app/lib \
        --requirement "${REQUIREMENTS}" \
    && python3 -m compileall -q -b --invalidation-mode unchecked-hash /app/lib \
    && find /app/lib -type f -regex '.*\.\(py\|pyi\|pyx\|pxd\|pxi\|h\)' -delete \
    && find /app/lib -type f -name '*.so*' -exec strip --strip-unneeded {} + \
    && rm -rf /app/lib/bin /app/lib/zstandard/_cffi*.so \
    && { [ ! -d /app/lib/botocore/data ] || find /app/lib/botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name 'sts' ! -name 'sso*' ! -name 'signin' ! -name 'sagemaker-runtime' -exec rm -rf {} +; }

# The program last.  Its wheel carries the metadata that `--version` and the metric build_info read.
COPY pyproject.toml README.md LICENSE ./
COPY worker/ worker/
RUN /tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && /tools/bin/pip install --no-deps --no-index --no-compile --target /app/own /dist/*.whl \
    && rm -rf /app/own/bin \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /app/own

FROM ${RUNTIME_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="inference-worker" \
      org.opencontainers.image.description="Pub/Sub batch inference worker: one well-formed answer for every request" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# Directories on the path instead of a virtual environment: distroless has /usr/bin/python3, the slim image
# /usr/local/bin/python3, and a virtual environment would point at one of them.
# PYTHONSAFEPATH: the working directory is not searched for modules.
ENV PYTHONPATH=/app/own:/app/lib PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=build /app/lib /app/lib
COPY --from=build /app/own /app/own

# Distroless' own `nonroot`; by number, so that Kubernetes can check runAsNonRoot.
USER 65532:65532
WORKDIR /tmp
# The process is PID 1 and gets SIGTERM itself; `python3` is found on the path in both kinds of runtime image.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-m", "worker"]
CMD ["run"]
