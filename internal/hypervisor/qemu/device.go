package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu/qmp"
)

// This file gives guests disks and network cards while they run, and takes them
// away. What a guest has is always asked of QEMU, whose word on a removal (its
// event DEVICE_DELETED) may have gone to a daemon before this one.

// named are the devices that have names.
func (g *guest) named(ctx context.Context) (map[string]bool, error) {
	var list []struct {
		Name string `json:"name"`
	}
	if err := g.executeWith(ctx, "qom-list", map[string]string{"path": "/machine/peripheral"}, &list); err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for _, one := range list {
		names[one.Name] = true
	}
	return names, nil
}

// Devices implements hypervisor.Guest. Guests of servers before had no names for
// them, and boot from the first disk.
func (g *guest) Devices(ctx context.Context) (hypervisor.Devices, error) {
	names, err := g.named(ctx)
	if err != nil {
		return hypervisor.Devices{}, err
	}
	has := hypervisor.Devices{Disks: slots(names, diskNode, hypervisor.MaxDisks), Networks: slots(names, cardID, hypervisor.MaxNetworks)}
	if len(has.Disks) == 0 {
		return has, fmt.Errorf("guest %s: %w", g.id, hypervisor.ErrOldGuest)
	}
	return has, nil
}

func slots(names map[string]bool, name func(int) string, most int) (list []int) {
	for slot := range most {
		if names[name(slot)] {
			list = append(list, slot)
		}
	}
	return list
}

// AddDisk implements hypervisor.Guest.
func (g *guest) AddDisk(ctx context.Context, d hypervisor.Disk) error {
	names, err := g.named(ctx)
	if err != nil {
		return err
	}
	if names[diskNode(d.Slot)] {
		return fmt.Errorf("guest %s has a disk in slot %d already", g.id, d.Slot)
	}
	if err := g.dropDisk(ctx, d.Slot); err != nil { // what was left of one before
		return err
	}
	err = g.executeWith(ctx, "blockdev-add", limitedNode(d.Slot, servedNode(lowerNode(d.Slot), d)), nil)
	if err == nil {
		err = g.executeWith(ctx, "device_add", diskDevice(d).args(), nil)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("give the guest a disk: %w", err), g.dropDisk(ctx, d.Slot))
	}
	return nil
}

// dropDisk gives up the nodes of a disk that the guest does not have. QEMU is done
// with them some time after the device has gone.
func (g *guest) dropDisk(ctx context.Context, slot int) error {
	nodes, err := g.nodes(ctx)
	if err != nil {
		return err
	}
	if _, is := nodes[diskNode(slot)]; is {
		err := g.executeWith(ctx, "blockdev-del", map[string]string{"node-name": diskNode(slot)}, nil)
		for refused := (*qmp.Error)(nil); errors.As(err, &refused) && g.awaitNews(ctx) == nil; {
			err = g.executeWith(ctx, "blockdev-del", map[string]string{"node-name": diskNode(slot)}, nil)
		}
		if err != nil {
			return fmt.Errorf("disconnect disk %d: %w", slot, err)
		}
	}
	g.deleteConnections(ctx, slot, nodes)
	return nil
}

// RemoveDisk implements hypervisor.Guest.
func (g *guest) RemoveDisk(ctx context.Context, slot int) error {
	if err := g.unplug(ctx, diskNode(slot)); err != nil {
		return err
	}
	return g.dropDisk(ctx, slot)
}

// AddNetwork implements hypervisor.Guest.
func (g *guest) AddNetwork(ctx context.Context, n hypervisor.Network) error {
	names, err := g.named(ctx)
	if err != nil {
		return err
	}
	if names[cardID(n.Slot)] {
		return fmt.Errorf("guest %s has a network card in slot %d already", g.id, n.Slot)
	}
	g.dropNetwork(ctx, n.Slot) // what was left of one before
	args := map[string]any{"type": "user", "id": networkID(n.Slot)}
	if n.Slot > 0 {
		args["net"] = subnet(n.Slot)
	}
	if g.noWayOut {
		args["restrict"] = true
	}
	if err := g.executeWith(ctx, "netdev_add", args, nil); err != nil {
		return fmt.Errorf("give the guest a network: %w", err)
	}
	if err := g.executeWith(ctx, "device_add", networkDevice(n).args(), nil); err != nil {
		g.dropNetwork(context.WithoutCancel(ctx), n.Slot)
		return fmt.Errorf("give the guest a network card: %w", err)
	}
	return nil
}

// dropNetwork gives up what is behind a card that the guest does not have, if it is
// there.
func (g *guest) dropNetwork(ctx context.Context, slot int) {
	_ = g.executeWith(ctx, "netdev_del", map[string]string{"id": networkID(slot)}, nil)
}

// RemoveNetwork implements hypervisor.Guest.
func (g *guest) RemoveNetwork(ctx context.Context, slot int) error {
	if err := g.unplug(ctx, cardID(slot)); err != nil {
		return err
	}
	g.dropNetwork(ctx, slot)
	return nil
}

// unplug asks the guest to let go of a device and waits until it has. One that is
// asked again is told so by QEMU, or asked once more; both are well.
func (g *guest) unplug(ctx context.Context, id string) error {
	names, err := g.named(ctx)
	if err != nil || !names[id] {
		return err
	}
	var refused *qmp.Error
	if err := g.executeWith(ctx, "device_del", map[string]string{"id": id}, nil); err != nil && !errors.As(err, &refused) {
		return err
	}
	for err != nil || names[id] {
		if err := g.awaitNews(ctx); ctx.Err() != nil {
			return fmt.Errorf("guest %s: %s: %w", g.id, id, hypervisor.ErrHeld)
		} else if err != nil {
			return fmt.Errorf("guest %s: waiting until it lets go of %s: %w", g.id, id, err)
		}
		if names, err = g.named(ctx); err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

// tellsOfChange reports whether an event is waited for.
func tellsOfChange(e qmp.Event) bool {
	return slices.Contains([]string{"MIGRATION", "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"}, e.Name)
}
