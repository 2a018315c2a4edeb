package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu/qmp"
)

// This file is about disks. To the guest's device a disk is a node that limits
// it; below that is the node that is connected to the volume's socket.

// diskNode names the upper node of a disk, by its place.
func diskNode(i int) string { return fmt.Sprintf("disk%d", i) }

// volumeNode is the lower one. It connects again by itself when the volume's
// socket was away, and repeats what was under way.
func volumeNode(name string, d hypervisor.Disk) map[string]any {
	return map[string]any{
		"driver": "nbd", "node-name": name,
		"server": map[string]string{"type": "unix", "path": d.Socket},
		"export": d.Export, "discard": "unmap",
		"cache":           map[string]bool{"direct": true},
		"reconnect-delay": int64(reconnectFor / time.Second),
		"open-timeout":    int64(openFor / time.Second),
	}
}

// servedNode is a lower one of a volume that serves already: a guest that runs stands
// still while QEMU waits for one.
func servedNode(name string, d hypervisor.Disk) map[string]any {
	node := volumeNode(name, d)
	delete(node, "open-timeout")
	return node
}

// limitedNode is the upper one; file is the lower one, or its name.
func limitedNode(i int, file any) map[string]any {
	return map[string]any{
		"driver": "throttle", "node-name": diskNode(i), "throttle-group": throttleID, "file": file,
		"discard": "unmap", "cache": map[string]bool{"direct": true},
	}
}

// diskArgs attaches a volume. A full volume stops the guest instead of showing it
// an error. The geometry is the one that says nothing: QEMU would read the disk at
// its start to guess one, and the disk of a guest that comes from another server
// can't be read before it is here.
func diskArgs(d hypervisor.Disk) ([]string, error) {
	backend, err := json.Marshal(limitedNode(d.Slot, volumeNode(lowerNode(d.Slot), d)))
	if err != nil {
		return nil, fmt.Errorf("disk %d: %w", d.Slot, err)
	}
	return []string{"-blockdev", string(backend), "-device", diskDevice(d).text()}, nil
}

// lowerNode names the lower node of a disk at first.
func lowerNode(slot int) string { return diskNode(slot) + "-nbd" }

// diskDevice has the name of its node.
func diskDevice(d hypervisor.Disk) properties {
	return properties{
		{"driver", "virtio-blk-pci"},
		{"id", diskNode(d.Slot)},
		{"drive", diskNode(d.Slot)},
		{"serial", d.Serial},
		{"bootindex", d.Slot + 1},
		addr(slotDisk + d.Slot),
		{"write-cache", "on"},
		{"werror", "stop"},
		{"rerror", "stop"},
		{"cyls", 16383},
		{"heads", 16},
		{"secs", 63},
	}
}

// GrowDisk implements hypervisor.Guest. A node that is connected to a volume
// keeps the size that it found (nbd_co_truncate in QEMU's block/nbd.c), so the
// limiting one is put on a new connection, and then told its size.
func (g *guest) GrowDisk(ctx context.Context, d hypervisor.Disk, bytes int64) error {
	i := d.Slot
	sizes, err := g.nodes(ctx)
	if err != nil {
		return err
	}
	if sizes[diskNode(i)] >= bytes {
		return nil
	}
	fresh := freshNode(i, sizes)
	if err := g.executeWith(ctx, "blockdev-add", servedNode(fresh, d), nil); err != nil {
		return fmt.Errorf("connect to the grown disk: %w", err)
	}
	err = g.executeWith(ctx, "blockdev-reopen", map[string]any{"options": []any{limitedNode(i, fresh)}}, nil)
	if refused := (*qmp.Error)(nil); errors.As(err, &refused) {
		_ = g.executeWith(ctx, "blockdev-del", map[string]string{"node-name": fresh}, nil)
		return fmt.Errorf("guest %s: %w", g.id, hypervisor.ErrOldGuest)
	}
	if err == nil {
		err = g.executeWith(ctx, "block_resize", map[string]any{"node-name": diskNode(i), "size": bytes}, nil)
	}
	if err != nil {
		return fmt.Errorf("tell the guest of its grown disk: %w", err)
	}
	// The connections before are not needed, of attempts that were cut short
	// either; the first goes by itself.
	g.deleteConnections(ctx, i, sizes)
	return nil
}

// deleteConnections deletes those of a disk that it does not need.
func (g *guest) deleteConnections(ctx context.Context, i int, nodes map[string]int64) {
	for name := range nodes {
		if strings.HasPrefix(name, diskNode(i)+"-nbd-") {
			_ = g.executeWith(ctx, "blockdev-del", map[string]string{"node-name": name}, nil)
		}
	}
}

// freshNode is a name for a disk's next connection.
func freshNode(i int, taken map[string]int64) string {
	for n := 1; ; n++ {
		name := fmt.Sprintf("%s-nbd-%d", diskNode(i), n)
		if _, is := taken[name]; !is {
			return name
		}
	}
}

// nodes are the sizes of all block nodes, in bytes.
func (g *guest) nodes(ctx context.Context) (map[string]int64, error) {
	var list []struct {
		Name  string `json:"node-name"`
		Image struct {
			Bytes int64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := g.executeWith(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &list); err != nil {
		return nil, err
	}
	sizes := map[string]int64{}
	for _, n := range list {
		sizes[n.Name] = n.Image.Bytes
	}
	return sizes, nil
}
