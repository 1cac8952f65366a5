#!/usr/bin/env bash
# For machines without a container engine or a container registry: podman from Debian's packages, and stand-ins for the
# images that the Dockerfile and the tests name.  Root, Debian 12 or newer, about two and a half minutes; a second run
# does only what is missing.
#
# What it learns about the machine is written to ~/.cache/inference-worker/podman.env, where tests/deploy/engine.py
# looks.  The stand-ins are laid out like the published images and prove the Dockerfile and the program, not those
# images.  Never push them.
set -euo pipefail

state=${XDG_CACHE_HOME:-$HOME/.cache}/inference-worker
python_image=localhost/standin/python:3.13
runtime_image=localhost/standin/python3-debian13:nonroot
emulator_image=localhost/standin/pubsub-emulator
emulator=/usr/lib/google-cloud-sdk/platform/pubsub-emulator
suite=trixie # Debian 13, whose python3 is 3.13

mkdir -p "$state"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

install_engine() {
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    podman buildah runc netavark aardvark-dns iptables catatonit golang-github-containers-common debootstrap
}

# Two things differ inside a restricted machine: the limits that podman sets by default may be above what root may
# raise, and crun refuses a hybrid cgroup layout while runc takes it.
write_configuration() {
  local files processes
  files=$(ulimit -Hn)
  processes=$(ulimit -Hu)
  if [ "$files" = unlimited ]; then files=1048576; fi
  if [ "$processes" = unlimited ] || [ "$processes" -gt 32768 ]; then processes=32768; fi
  printf '%s\n' \
    '[containers]' "default_ulimits = [\"nofile=$files:$files\", \"nproc=$processes:$processes\"]" \
    '[engine]' 'runtime = "runc"' 'cgroup_manager = "cgroupfs"' 'events_logger = "file"' \
    '[network]' 'network_backend = "netavark"' >"$state/containers.conf"
}

# The host's network and certificates reach a build from outside, so that the Dockerfile needs to know of neither.
write_environment() {
  local certificates=/etc/ssl/certs/ca-certificates.crt
  printf '%s\n' \
    "CONTAINERS_CONF=$state/containers.conf" "PYTHON_IMAGE=$python_image" "RUNTIME_IMAGE=$runtime_image" \
    "EMULATOR_IMAGE=$emulator_image" \
    "BUILD_FLAGS=--network=host --pull=never -v $certificates:$certificates:ro" >"$state/podman.env"
}

missing() { ! podman image exists "$1"; }

build() { # TAG FOLDER [ARGUMENT…]: the Dockerfile in the folder
  local tag=$1 folder=$2
  shift 2
  podman build --quiet --network=host --pull=never "$@" --tag "$tag" "$folder"
}

# Like the slim image: Debian with Python and pip, nothing else, `python3` under /usr/local/bin too.
make_python() {
  local root=$scratch/root mirror
  # The mirror that this machine's own apt uses.
  # shellcheck disable=SC2016 # apt's own placeholders
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 -E '/debian/?$')
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip "$suite" "$root" "$mirror"
  ln -s /usr/bin/python3 "$root/usr/local/bin/python3"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/doc "$root"/etc/resolv.conf
  tar -C "$root" -c . | podman import --change 'LABEL standin=true' - "$python_image"
}

# Like distroless: the interpreter, the C and C++ runtime, certificates and time zones, and no shell.
make_runtime() {
  local context=$scratch/runtime
  mkdir "$context"
  cat >"$context/collect.sh" <<'COLLECT'
set -eu
mkdir -p /out/usr/lib /out/usr/lib64 /out/etc
ln -s usr/lib /out/lib
ln -s usr/lib64 /out/lib64
{
  find /usr/lib/python3.13 /usr/share/zoneinfo /etc/ssl/certs/ca-certificates.crt -type f
  find /usr/bin -name 'python3*'
  dpkg -L libc6 libgcc-s1 libstdc++6 | grep '\.so' | grep -v gconv
  ldd /usr/bin/python3 /usr/lib/python3.13/lib-dynload/*.so | awk '$3 ~ /^\// {print $3}'
} | sed 's#^/lib#/usr/lib#' | sort -u >/files
tar -C / -c --dereference -T /files | tar -C /out -x
rm -rf /out/usr/lib/python3.13/ensurepip /out/usr/lib/python3.13/test
mkdir -m 1777 /out/tmp
echo 'nonroot:x:65532:65532::/tmp:/sbin/nologin' >/out/etc/passwd
echo 'hosts: files dns' >/out/etc/nsswitch.conf
COLLECT
  cat >"$context/Dockerfile" <<'DOCKERFILE'
ARG BASE
FROM ${BASE} AS collect
COPY collect.sh /
RUN sh /collect.sh
FROM scratch
LABEL standin=true
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
COPY --from=collect /out /
USER 65532:65532
ENTRYPOINT ["/usr/bin/python3"]
DOCKERFILE
  build "$runtime_image" "$context" --build-arg "BASE=$python_image"
}

# Google's Pub/Sub emulator as its SDK component ships it, on Debian's Java, behind the one gcloud call tests make.
make_emulator() {
  local context=$scratch/emulator
  mkdir "$context"
  cp -r "$emulator" "$context/emulator"
  cat >"$context/gcloud" <<'GCLOUD'
#!/bin/sh
address=0.0.0.0:8085
for argument; do
  case $argument in --host-port=*) address=${argument#--host-port=} ;; esac
done
exec java -Xmx512m -jar /emulator/lib/cloud-pubsub-emulator-*-all.jar --host="${address%:*}" --port="${address##*:}"
GCLOUD
  cat >"$context/Dockerfile" <<'DOCKERFILE'
ARG BASE
FROM ${BASE}
RUN mkdir -p /usr/share/man/man1 && apt-get update && apt-get install -y --no-install-recommends openjdk-21-jre-headless
COPY emulator /emulator
COPY --chmod=755 gcloud /usr/local/bin/gcloud
DOCKERFILE
  build "$emulator_image" "$context" --build-arg "BASE=$python_image"
}

if ! command -v podman >/dev/null || ! command -v debootstrap >/dev/null; then install_engine; fi
write_configuration
export CONTAINERS_CONF=$state/containers.conf
if missing "$python_image"; then make_python; fi
if missing "$runtime_image"; then make_runtime; fi
if missing "$emulator_image"; then
  if [ ! -d "$emulator" ]; then
    echo "no $emulator: install Google's SDK component pubsub-emulator first" >&2
    exit 1
  fi
  make_emulator
fi
write_environment
podman image ls --filter label=standin=true --filter dangling=false
