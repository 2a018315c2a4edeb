package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file gives guests that run the disks and network cards that are wanted, and
// has them let go of others.
//
// The record says what a guest may have: a device is on it before the guest is given
// it, and until the guest has let go of it. It changes only while nothing is made
// after it: no migration is ordered, and no checkpoint is being taken; those begin
// only if the guest has just what the record says. A volume is detached here only
// when the record says that the guest has let go of it.

const (
	// letGoWithin is how long a guest has to let go of a device, and changeEvery
	// how often it is asked. In ticks.
	letGoWithin = 5
	changeEvery = 10
)

// errChanging: what was to be made after a guest's devices has to wait.
var errChanging = errors.New("its disks or network cards are being changed: try again in a moment")

// changeGuest brings a guest's devices nearer to what is wanted. What can't be done now
// is told in its status, and tried again.
func (a *Agent) changeGuest(ctx context.Context, m *argonv1.Machine, g *guest) error {
	select {
	case g.changing <- struct{}{}:
		defer func() { <-g.changing }()
	default:
		return ErrOvertaken
	}
	removed, err := a.changeDevices(ctx, m, g)
	switch {
	case errors.Is(err, ErrOvertaken), ctx.Err() != nil:
		return err
	case errors.Is(err, hypervisor.ErrOldGuest) && placement.Changing(m).None():
		err = nil
	}
	a.note(func() {
		// One that was asked, and is to keep the device after all, may still let go of it.
		g.clings = errors.Is(err, hypervisor.ErrHeld) || g.clings && !removed
		g.asked, g.changeAfter, g.devicesDetail = err != nil || g.clings, time.Time{}, ""
		if err != nil {
			g.devicesDetail = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		if g.asked {
			g.changeAfter = a.Now().Add(changeEvery * a.Tick)
		}
	})
	if err != nil {
		a.Log.Warn("a guest's devices can't be changed now; it is tried again", "machine", m.GetMeta().GetName(), "err", err)
	}
	return nil
}

// changeDevices also tells whether the guest has let go of all that it was to.
func (a *Agent) changeDevices(ctx context.Context, m *argonv1.Machine, g *guest) (removed bool, err error) {
	m, err = a.matchDevices(ctx, m, g)
	if err != nil {
		return false, err
	}
	var failed []error
	c := placement.Changing(m)
	for _, d := range placement.InForce(m).GetDisks() {
		if slices.Contains(c.Detach, d.GetId()) {
			failed = append(failed, a.removeDevice(ctx, "disk "+a.volumeName(d.GetId()), g.handle.RemoveDisk, d))
		}
	}
	for _, d := range placement.InForce(m).GetNetworks() {
		if slices.Contains(c.RemoveCards, d.GetId()) {
			failed = append(failed, a.removeDevice(ctx, "network card "+d.GetId(), g.handle.RemoveNetwork, d))
		}
	}
	if len(c.Detach)+len(c.RemoveCards) > 0 {
		removed = errors.Join(failed...) == nil
		if m, err = a.matchDevices(ctx, m, g); err != nil {
			return removed, err
		}
	}
	for _, id := range c.Attach {
		failed = append(failed, a.giveDisk(ctx, m, g, id))
	}
	for _, mac := range c.AddCards {
		failed = append(failed, a.giveCard(ctx, m, g, mac))
	}
	return removed, errors.Join(failed...)
}

func (a *Agent) removeDevice(ctx context.Context, what string, remove func(context.Context, int) error, d *argonv1.Device) error {
	ctx, cancel := context.WithTimeout(ctx, letGoWithin*a.Tick)
	defer cancel()
	if err := remove(ctx, int(d.GetSlot())); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func (a *Agent) volumeName(id string) string {
	if v := a.View.State().Volumes[id]; v != nil {
		return v.GetMeta().GetName()
	}
	return id
}

// matchDevices takes what the guest does not have off its machine's record.
func (a *Agent) matchDevices(ctx context.Context, m *argonv1.Machine, g *guest) (*argonv1.Machine, error) {
	bounded, cancel := a.answering(ctx)
	defer cancel()
	has, err := g.handle.Devices(bounded)
	if err != nil {
		return nil, err
	}
	return a.recordDevices(ctx, m, func(now *argonv1.Machine) error {
		h := placement.InForce(now)
		gone := func(slots []int) func(*argonv1.Device) bool {
			return func(d *argonv1.Device) bool { return !slices.Contains(slots, int(d.GetSlot())) }
		}
		disks, cards := len(h.GetDisks()), len(h.GetNetworks())
		h.Disks, h.Networks = slices.DeleteFunc(h.Disks, gone(has.Disks)), slices.DeleteFunc(h.Networks, gone(has.Networks))
		released := slices.DeleteFunc(slices.Clone(now.GetDetaching()), func(id string) bool {
			return slices.ContainsFunc(h.GetDisks(), func(d *argonv1.Device) bool { return d.GetId() == id })
		})
		if len(h.GetDisks()) == disks && len(h.GetNetworks()) == cards && len(released) == 0 {
			return catalog.ErrUnchanged
		}
		let := func(id string) bool { return slices.Contains(released, id) }
		now.InForce, now.VolumeIds, now.Detaching = h, slices.DeleteFunc(now.GetVolumeIds(), let), slices.DeleteFunc(now.GetDetaching(), let)
		return nil
	})
}

// recordDevices changes what a machine's record says of its guest's devices.
func (a *Agent) recordDevices(ctx context.Context, m *argonv1.Machine, change func(*argonv1.Machine) error) (*argonv1.Machine, error) {
	ctx, cancel := recording(ctx)
	defer cancel()
	now, err := a.Store.Machines.Update(ctx, m.GetMeta().GetId(), func(now *argonv1.Machine) error {
		if !belongs(now, a.ServerID) || now.GetPlacement() != m.GetPlacement() || now.GetMigration() != nil || now.GetWake() != nil {
			return ErrOvertaken
		}
		return change(now)
	})
	if errors.Is(err, catalog.ErrNotFound) {
		return nil, ErrOvertaken
	}
	if err != nil && !errors.Is(err, ErrOvertaken) {
		return nil, fmt.Errorf("record the devices of machine %s: %w", m.GetMeta().GetName(), err)
	}
	return now, err
}

// giveDisk gives a guest a disk, if the volume serves here.
func (a *Agent) giveDisk(ctx context.Context, m *argonv1.Machine, g *guest, id string) error {
	a.mu.Lock()
	_, err := a.diskOf(m, &argonv1.Device{Id: id})
	serves := err == nil && closed(a.volumes[id].attachment.Ready())
	a.mu.Unlock()
	if !serves {
		return nil
	}
	return a.give(ctx, m, g, id, hypervisor.MaxDisks, diskList, func(ctx context.Context, d *argonv1.Device) error {
		a.mu.Lock()
		disk, err := a.diskOf(m, d)
		a.mu.Unlock()
		if err == nil {
			err = g.handle.AddDisk(ctx, disk)
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", a.volumeName(id), err)
		}
		return nil
	})
}

func (a *Agent) giveCard(ctx context.Context, m *argonv1.Machine, g *guest, mac string) error {
	return a.give(ctx, m, g, mac, hypervisor.MaxNetworks, cardList, func(ctx context.Context, d *argonv1.Device) error {
		if err := g.handle.AddNetwork(ctx, hypervisor.Network{Slot: int(d.GetSlot()), MAC: mac}); err != nil {
			return fmt.Errorf("network card %s: %w", mac, err)
		}
		return nil
	})
}

func diskList(h *argonv1.Hardware) *[]*argonv1.Device { return &h.Disks }
func cardList(h *argonv1.Hardware) *[]*argonv1.Device { return &h.Networks }

// give records a device, in the first place that is free, and gives it to the guest.
func (a *Agent) give(ctx context.Context, m *argonv1.Machine, g *guest, id string, most int, list func(*argonv1.Hardware) *[]*argonv1.Device, add func(context.Context, *argonv1.Device) error) error {
	var d *argonv1.Device
	_, err := a.recordDevices(ctx, m, func(now *argonv1.Machine) error {
		c := placement.Changing(now)
		h := placement.InForce(now)
		devices := list(h)
		slot := freeSlot(*devices, most)
		switch {
		case !slices.Contains(c.Attach, id) && !slices.Contains(c.AddCards, id):
			return ErrOvertaken
		case slot < 0:
			return errors.New("no place on its guest's bus is free until the guest has let go of something")
		}
		d = &argonv1.Device{Id: id, Slot: uint32(slot)}
		*devices = append(*devices, d)
		now.InForce = h
		return nil
	})
	if err != nil {
		return err
	}
	bounded, cancel := a.answering(ctx)
	defer cancel()
	if err := add(bounded, d); err != nil {
		_, match := a.matchDevices(ctx, m, g)
		return errors.Join(err, match)
	}
	return nil
}

// freeSlot is the first that no device has; -1: there is none.
func freeSlot(devices []*argonv1.Device, most int) int {
	for slot := range most {
		if !slices.ContainsFunc(devices, func(d *argonv1.Device) bool { return int(d.GetSlot()) == slot }) {
			return slot
		}
	}
	return -1
}

// lockDevices keeps a guest's devices as they are until unlock, for what is made
// after them: they are those of the record.
func (a *Agent) lockDevices(ctx context.Context, m *argonv1.Machine, g *guest) (unlock func(), err error) {
	select {
	case g.changing <- struct{}{}:
	default:
		return nil, ErrOvertaken
	}
	defer func() {
		if err != nil {
			<-g.changing
		}
	}()
	now, err := a.Store.Machines.Get(ctx, m.GetMeta().GetId())
	if err != nil {
		return nil, fmt.Errorf("look at the devices of machine %s: %w", m.GetMeta().GetName(), err)
	}
	h := placement.InForce(now)
	if !proto.Equal(h, placement.InForce(m)) {
		return nil, ErrOvertaken // the view will show it soon
	}
	bounded, cancel := a.answering(ctx)
	defer cancel()
	has, err := g.handle.Devices(bounded)
	if errors.Is(err, hypervisor.ErrOldGuest) {
		has, err = hypervisor.Devices{Disks: slotsOf(h.GetDisks()), Networks: slotsOf(h.GetNetworks())}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ask the guest for its devices: %w", err)
	}
	if !slices.Equal(has.Disks, slotsOf(h.GetDisks())) || len(h.GetNetworks()) > 0 && !slices.Equal(has.Networks, slotsOf(h.GetNetworks())) {
		a.note(func() { g.asked, g.changeAfter = true, time.Time{} })
		return nil, errChanging
	}
	return func() { <-g.changing }, nil
}

func slotsOf(devices []*argonv1.Device) []int {
	var list []int
	for _, d := range devices {
		list = append(list, int(d.GetSlot()))
	}
	slices.Sort(list)
	return list
}
