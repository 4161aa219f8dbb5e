# One image for the head and the workers of a Ray cluster, with Python 3.11, with or without GPUs:
#   docker build --tag IMAGE .
#   docker build --tag IMAGE --build-arg REQUIREMENTS=requirements-gpu.lock .   # with CUDA's libraries
# Plain instructions only (no RUN --mount), so that every builder can build it, including the default of Cloud Build.

# No digest: the tag gets security fixes of Debian and Python. The lock file pins the packages that results depend on.
FROM python:3.11-slim-bookworm AS packages
ARG REQUIREMENTS=requirements.lock

# `ray up` calls bash, rsync (to copy files through `docker exec`) and ssh (from the head to the workers). The user is
# that of Ray's own images. Ray runs commands in login shells, where /etc/profile resets PATH: so it is set there, too.
# DL3008, versions: Debian's mirrors drop a version when a security fix replaces it, so a pinned one soon fails.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends openssh-client rsync \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 --shell /bin/bash ray \
 && echo "PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/venv.sh

# Root owns the packages, so that a job can't change the code of the next one. pip compiles them to bytecode here, because
# processes of `ray` can't write there. The lock file stays in the image, as the list of its packages.
COPY ${REQUIREMENTS} /opt/requirements.lock
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --require-hashes --requirement /opt/requirements.lock

# A separate stage, so that the image has the installed code without its source, as its last layer.
FROM packages AS code
COPY pyproject.toml README.md LICENSE /src/
COPY cluster /src/cluster
COPY preprocessing /src/preprocessing
COPY job /src/job
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --root /installed /src

FROM packages
LABEL org.opencontainers.image.title="kuzushiji" \
      org.opencontainers.image.description="Trains classifiers of cursive Japanese characters on Ray" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=code /installed /

# HOME: Ray puts its files there, else into /root. NVIDIA_*: on a machine with GPUs, Ray runs the container with
# --runtime=nvidia, which adds the driver only if these are set; elsewhere they have no effect.
ENV HOME=/home/ray \
    PATH=/opt/venv/bin:$PATH \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/ray
# `ray`, as a number: Kubernetes can't verify by a name that a user is not root.
USER 1000

# No ENTRYPOINT: Ray runs `docker run ... IMAGE bash`; you can run `docker run IMAGE kuzushiji ...`.
CMD ["kuzushiji", "--help"]
