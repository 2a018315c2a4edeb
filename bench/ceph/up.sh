#!/bin/bash
# Starts a small Ceph in a directory, for comparison: a monitor, a manager and
# three OSDs (BlueStore on files) on loopback, as ordinary processes, and makes an
# RBD image of two replicas.
#
#   bench/ceph/up.sh DIR SIZE-IN-MIB
#
# It stays in the foreground, says "ready" when the image can be used, and ends
# everything when its standard input is closed. Clients use DIR/ceph.conf, the
# pool "rbd" and the image "bench".
set -euo pipefail
dir=$1 size=$2
port=16789

mkdir -p "$dir"
conf=$dir/ceph.conf
fsid=$(cat /proc/sys/kernel/random/uuid)
cat >"$conf" <<EOF
[global]
fsid = $fsid
mon_host = 127.0.0.1:$port
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 2
osd_pool_default_min_size = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
run_dir = $dir
admin_socket = $dir/\$name.\$pid.asok
pid_file = $dir/\$name.pid
log_file = $dir/\$name.log
mon_cluster_log_file = $dir/cluster.log
mon_data = $dir/mon
osd_data = $dir/osd\$id
osd_memory_target = 1073741824
rbd_cache = false
[mgr]
mgr_data = $dir/mgr
mgr_initial_modules =
EOF
export CEPH_CONF=$conf

pids=()
finish() {
	kill "${pids[@]}" 2>/dev/null || true
	wait || true
}
trap finish EXIT

mkdir -p "$dir/mon" "$dir/mgr"
monmaptool --create --fsid "$fsid" --add a "127.0.0.1:$port" "$dir/monmap" >/dev/null
ceph-mon --mkfs -i a --monmap "$dir/monmap"
ceph-mon -f -i a >"$dir/mon.out" 2>&1 & pids+=($!)
ceph-mgr -f -i x >"$dir/mgr.out" 2>&1 & pids+=($!)
for i in 0 1 2; do
	mkdir -p "$dir/osd$i"
	truncate -s $((size * 2 + 4096))M "$dir/osd$i/block"
	uuid=$(cat /proc/sys/kernel/random/uuid)
	timeout 60 ceph osd new "$uuid" >/dev/null
	ceph-osd --mkfs -i "$i" --osd-uuid "$uuid" >"$dir/mkfs$i.out" 2>&1
	ceph-osd -f -i "$i" >"$dir/osd$i.out" 2>&1 & pids+=($!)
done
timeout 60 ceph osd pool create rbd 32 32 >/dev/null 2>&1
for _ in $(seq 300); do
	if timeout 20 ceph pg stat 2>/dev/null | grep -Eq '^[0-9]+ pgs: [0-9]+ active\+clean;'; then
		rbd pool init rbd
		rbd create bench --size "$size" --image-feature layering
		echo ready
		cat >/dev/null
		exit 0
	fi
	sleep 1
done
echo "up: the placement groups did not become active and clean: see $dir" >&2
exit 1
