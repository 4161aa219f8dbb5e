#!/usr/bin/env bash
# Builds the Dockerfile and runs what came out: `make test-image`. No Docker, no image registry: the base is a stand-in
# from Debian's packages, under the name that the Dockerfile gives it.
#
# Needs Debian 12, root, 12 GB of disk, and what this machine's apt and pip reach; 3 to 7 minutes, 1 GB of downloads.
# Leaves ~/.cache/kuzushiji/base-bookworm.tar, the stand-in, for the next time (delete it for a fresh one), no more.
set -euo pipefail
cd "$(dirname "$0")/.."

stand_in=${XDG_CACHE_HOME:-$HOME/.cache}/kuzushiji/base-bookworm.tar
base=docker.io/library/$(awk '/^FROM/ { print $2; exit }' Dockerfile)
image=localhost/kuzushiji
container=kuzushiji-test

[ "$(id -u)" = 0 ] || { echo 'test-image needs root: mmdebstrap and buildah make devices and mounts' >&2; exit 1; }
for tool in buildah mmdebstrap podman rsync runc; do
  command -v "$tool" > /dev/null \
    || { echo 'test-image needs: apt install buildah mmdebstrap podman rsync runc' >&2; exit 1; }
done

# A store of our own: the stand-in never hides a base of the same name that somebody pulled, and goes as a folder.
work=$(mktemp --directory /var/tmp/kuzushiji-image.XXXXXX)
clean_up() {
  podman rm --force --time 0 --ignore "$container" > /dev/null || true
  umount --recursive "$work/store/overlay" 2> /dev/null || true
  rm -rf "$work"
}
trap clean_up EXIT

cat > "$work/storage.conf" << CONF
[storage]
driver = "overlay"
graphroot = "$work/store"
runroot = "$work/run"
CONF
# Podman asks for 1,048,576 processes and files, which a root with fewer rights than usual may not grant.
cat > "$work/containers.conf" << CONF
[containers]
default_ulimits = ["nofile=$(ulimit -Hn):$(ulimit -Hn)", "nproc=16384:16384"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF
export CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_CONF=$work/containers.conf TMPDIR=$work

say() { printf '\n== %s (after %d:%02d minutes)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

if [ ! -e "$stand_in" ]; then
  say 'stand-in for the base, from the mirror that this machine uses'
  mkdir -p "$(dirname "$stand_in")"
  # shellcheck disable=SC2016 # apt fills these in
  apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' \
    > "$work/sources.list"
  # How this machine's apt reaches it (proxy, certificates, dates) holds inside as well.
  apt-config dump --format '%F "%v";%n' | grep -E '^Acquire::(Check|https?)' > "$work/apt.conf" || true
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates --aptopt="$work/apt.conf" \
    bookworm "$work/base.tar" "$work/sources.list"
  mv "$work/base.tar" "$stand_in"
fi
podman import --quiet --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin' "$stand_in" "$base" > /dev/null

# pip's settings and certificates of this machine are mounted while it builds, with the folders that they name.
python3 - << 'PYTHON' > "$work/pip.conf"
import ast
import subprocess

settings = {}  # by section and name; those of the environment win
listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
    key, value = line.split("=", 1)
    section, name = key.replace(":env:.", "global.").split(".", 1)
    settings.setdefault(section, {})[name] = ast.literal_eval(value).replace("\n", "\n  ")
for section, values in settings.items():
    print(f"[{section}]", *(f"{name} = {value}" for name, value in values.items()), sep="\n")
PYTHON
mounts=(--volume "$work/pip.conf:/etc/pip.conf:ro" --volume /etc/ssl/certs:/etc/ssl/certs:ro)
mounted=(/etc/pip.conf)
while read -r place; do
  place=${place%/simple}  # an index in a folder points to files beside itself
  [ -e "$place" ] || continue
  mounts+=(--volume "$place:$place:ro")
  mounted+=("$place")
done < <(sed 's,file://,,g' "$work/pip.conf" | grep --only-matching --perl-regexp '(?<=[ =])/(?!etc/ssl/certs)\S+')

say 'what .dockerignore lets in'
mkdir "$work/context"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --target-directory "$work/context"
for planted in .env key.json job/key.json cluster/.env .git/config demo/pages.jpg job/__pycache__/cli.pyc; do
  mkdir -p "$(dirname "$work/context/$planted")"
  echo secret > "$work/context/$planted"
done
printf 'FROM scratch\nCOPY . /\n' > "$work/everything"
buildah build --quiet --file "$work/everything" --tag localhost/context "$work/context" > /dev/null
podman save --quiet localhost/context | tar --extract --to-stdout --wildcards '*.tar' | tar --list | grep -v '/$' \
  | sort > "$work/let-in"
printf '%s\n' requirements{,-gpu}.lock pyproject.toml README.md LICENSE {cluster,preprocessing,job}/*.py | sort \
  | diff - "$work/let-in"
echo "$(wc -l < "$work/let-in") files, none of them planted"

say 'build'
started=$SECONDS
buildah build --pull-never --layers --network host --isolation oci "${mounts[@]}" --tag "$image" "$work/context"
built=$((SECONDS - started))

in_image() { podman run --rm --network none --shm-size 64g "$image" "$@"; }  # `ray up` sets a limit too

say 'the command line'
in_image kuzushiji --help
in_image | grep --quiet Usage  # CMD

say 'user, and what is not in the image'
[ "$(in_image id --user --name)" = ray ] && [ "$(in_image id --user)" = 1000 ]
in_image sh -c '! touch /opt/venv/x 2> /dev/null \
  && ! ls /var/lib/apt/lists/* /var/cache/apt/archives/*.deb 2> /dev/null \
  && test ! -e /src && test ! -e /home/ray/.cache'
[ -z "$(in_image find "${mounted[@]}" -type f -size +0)" ]
in_image pip check

say 'as ray up does it: a shell that waits, a key brought in by rsync, commands in login shells'
podman run --rm --detach --tty --network none --name "$container" "$image" bash > /dev/null
[ "$(podman exec "$container" printenv HOME)" = /home/ray ]
install --mode 600 /dev/null "$work/key.pem"
rsync --rsh 'podman exec -i' --archive "$work/key.pem" "$container:/home/ray/key.pem"
podman exec "$container" /bin/bash -c \
  'bash --login -c -i "source ~/.bashrc; stat --format \"%U %a %n\" ~/key.pem; command -v ray ssh rsync"' \
  2> /dev/null | tee "$work/launcher"
grep --quiet '^ray 600 /home/ray/key.pem' "$work/launcher"
grep --quiet '^/opt/venv/bin/ray' "$work/launcher"
podman rm --force --time 0 "$container" > /dev/null

say 'pages, dataset, model, without a network'
in_image bash -ec '
  kuzushiji sample --out pages --num-pages 3 --scale .15
  kuzushiji prepare --pages pages/train_images --labels pages/train.csv --dataset crops
  kuzushiji train --dataset crops --models models --architecture baseline --workers 1 --epochs 1 --global-batch-size 32
  kuzushiji verify models/baseline'

say 'done'
podman history --format '{{.Size}}  {{.CreatedBy}}' "$image" | cut -c 1-120
podman image inspect --format '{{len .RootFS.Layers}} layers, {{.Size}} bytes' "$image"
echo "built in $((built / 60)):$(printf %02d $((built % 60))) minutes"
