package fake

import (
	"context"
	"fmt"
	"slices"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// This file gives guests devices, and takes them away.

// Devices implements hypervisor.Guest.
func (g *Guest) Devices(ctx context.Context) (hypervisor.Devices, error) {
	if err := g.answer(ctx); err != nil {
		return hypervisor.Devices{}, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var has hypervisor.Devices
	for _, d := range g.spec.Disks {
		has.Disks = append(has.Disks, d.Slot)
	}
	for _, n := range g.spec.Networks {
		has.Networks = append(has.Networks, n.Slot)
	}
	slices.Sort(has.Disks)
	slices.Sort(has.Networks)
	return has, nil
}

// AddDisk implements hypervisor.Guest.
func (g *Guest) AddDisk(_ context.Context, d hypervisor.Disk) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if slices.ContainsFunc(g.spec.Disks, func(other hypervisor.Disk) bool { return other.Slot == d.Slot }) {
		return fmt.Errorf("slot %d has a disk", d.Slot)
	}
	g.spec.Disks = append(g.spec.Disks, d)
	return nil
}

// AddNetwork implements hypervisor.Guest.
func (g *Guest) AddNetwork(_ context.Context, n hypervisor.Network) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if slices.ContainsFunc(g.spec.Networks, func(other hypervisor.Network) bool { return other.Slot == n.Slot }) {
		return fmt.Errorf("slot %d has a network card", n.Slot)
	}
	g.spec.Networks = append(g.spec.Networks, n)
	return nil
}

// Cling makes it let go of no device, or of those again that it is told to.
func (g *Guest) Cling(clings bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.clings = clings
}

// RemoveDisk implements hypervisor.Guest: one that clings is known to at once.
func (g *Guest) RemoveDisk(_ context.Context, slot int) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.clings {
		return hypervisor.ErrHeld
	}
	g.spec.Disks = slices.DeleteFunc(g.spec.Disks, func(d hypervisor.Disk) bool { return d.Slot == slot })
	return nil
}

// RemoveNetwork implements hypervisor.Guest.
func (g *Guest) RemoveNetwork(_ context.Context, slot int) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.clings {
		return hypervisor.ErrHeld
	}
	g.spec.Networks = slices.DeleteFunc(g.spec.Networks, func(n hypervisor.Network) bool { return n.Slot == slot })
	return nil
}
