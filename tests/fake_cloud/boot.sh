#!/bin/bash
# Turns the namespaces that it is started in into a machine: NAME USERS VISIBLE...
#   NAME: its host name. USERS: login names, by spaces. VISIBLE: folders of the real machine to be seen, read-only.
#   Standard input: a tar file of what lies over the real machine's files.
# It is the machine's first process, and ends as its sshd. Everything that it mounts ends with its namespace.
set -euo pipefail
name=$1 users=$2
shift 2

hostname "$name"
mount --make-rprivate /
# One tmpfs for all that is written. It covers /sys, in here only: a place where no folder lies that is to be seen.
mount -t tmpfs -o size=8g tmpfs /sys
mkdir /sys/{upper,work,root,tmp,home,superuser}
chmod 1777 /sys/tmp
root=/sys/root
mount -t overlay overlay -o lowerdir=/,upperdir=/sys/upper,workdir=/sys/work $root

mount -t proc proc $root/proc
mount -t sysfs sysfs $root/sys
mount -t tmpfs tmpfs $root/dev
mkdir $root/dev/{pts,shm}
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts $root/dev/pts
mount -t tmpfs -o size=4g,mode=1777 tmpfs $root/dev/shm
for device in null zero full random urandom tty; do
  touch $root/dev/$device
  mount --bind /dev/$device $root/dev/$device
done
ln -s pts/ptmx $root/dev/ptmx
ln -s /proc/self/fd $root/dev/fd
for stream in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${stream%:*}" "$root/dev/${stream#*:}"; done
mount -t tmpfs -o size=64m,mode=755 tmpfs $root/run
mkdir $root/run/sshd

# Nobody's own files are seen in here but the folders that were asked for.
mount --bind /sys/tmp $root/tmp
mount --bind /sys/home $root/home
mount --bind /sys/superuser $root/root
for folder in "$@"; do
  mkdir -p "$root$folder"
  mount -o bind,ro "$folder" "$root$folder"
  # Login users must be able to walk there; the modes change in the overlay only.
  parent=$(dirname "$folder")
  while [ "$parent" != / ]; do
    [ -w "$root$parent" ] && chmod o+x "$root$parent" 2>/dev/null || true
    parent=$(dirname "$parent")
  done
done

tar --extract --preserve-permissions --no-same-owner --directory $root
cp -r /etc/skel/. $root/root
for user in $users; do
  chroot $root id "$user" >/dev/null 2>&1 || chroot $root useradd --no-create-home --shell /bin/bash "$user"
  chroot $root usermod --password '*' --home "/home/$user" "$user" # else sshd takes the account for a locked one
  cp -r /etc/skel $root/home/"$user"
  chroot $root chown -R "$user": "/home/$user"
done
rm -f $root/etc/ssh/ssh_host_*
chroot $root ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key

cd $root
mkdir -p .machine
pivot_root . .machine
cd /
umount -l /.machine
rmdir /.machine
echo ready
exec /usr/sbin/sshd -D -e >/dev/null </dev/null
