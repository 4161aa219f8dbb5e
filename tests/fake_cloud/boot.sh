#!/bin/bash
# Turns the namespaces that it is started in into a host: NAME USERS VISIBLE...
#   NAME: its host name. USERS: login names, separated by spaces. VISIBLE: folders of the real machine that the host
#   sees, read-only. Standard input: a tar file of the files that are added to the real machine's.
# It is the host's first process, and becomes its sshd. Everything that it mounts ends with its namespace.
set -euo pipefail
name=$1 users=$2
shift 2

hostname "$name"
mount --make-rprivate /
# One tmpfs for everything that is written. It covers /sys, in this namespace only: no folder of VISIBLE lies there.
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

# Of /tmp, /home and /root, the host sees only the folders of VISIBLE.
mount --bind /sys/tmp $root/tmp
mount --bind /sys/home $root/home
mount --bind /sys/superuser $root/root
for folder in "$@"; do
  mkdir -p "$root$folder"
  mount -o bind,ro "$folder" "$root$folder"
  # Login users must be able to reach it; the modes change in the overlay only.
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
  chroot $root usermod --password '*' --home "/home/$user" "$user" # otherwise, sshd treats the account as locked
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
