# One image for the head and the workers of a Ray cluster, with Python 3.11, with or without GPUs:
#   docker build --tag IMAGE .
#   docker build --tag IMAGE --build-arg REQUIREMENTS=requirements-gpu.lock .   # with CUDA's libraries
# Plain instructions only (no RUN --mount), so that every builder can build it, Cloud Build's default too.

# No digest: the tag moves when Debian or Python mend something, and what decides results is in the lock file.
FROM python:3.11-slim-bookworm AS packages
ARG REQUIREMENTS=requirements.lock

# What `ray up` calls inside, besides bash: rsync, for files that it brings in over `docker exec`, and ssh, with
# which the head starts workers. The user is that of Ray's own images. Ray runs commands in login shells, for which
# /etc/profile sets PATH anew: the second place where the packages must be named.
# DL3008, versions: Debian's mirrors drop a version when a security fix replaces it, so a pinned one soon fails.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends openssh-client rsync \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 --shell /bin/bash ray \
 && echo "PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/venv.sh

# Root owns the packages: a job cannot change what the next one runs. pip compiles them here, once, as no process of
# `ray` could keep what it compiled. The lock stays, to tell what is inside.
COPY ${REQUIREMENTS} /opt/requirements.lock
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --require-hashes --requirement /opt/requirements.lock

# A stage of its own, so that no source is left beside the installed code: below, ours is one layer, the last.
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

# HOME: Ray reads it from here to place its files, else it takes /root. NVIDIA_*: on a machine with GPUs Ray runs the
# container with --runtime=nvidia, which brings in the driver only if it is asked for; elsewhere they do nothing.
ENV HOME=/home/ray \
    PATH=/opt/venv/bin:$PATH \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/ray
# `ray`, as a number: with a name nobody can tell from outside that it is not root.
USER 1000

# No ENTRYPOINT: Ray runs `docker run ... IMAGE bash`, you may run `docker run IMAGE kuzushiji ...`.
CMD ["kuzushiji", "--help"]
