package placement

import (
	"slices"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// HardwareOf is what a guest of the machine would be made of if it were started now.
func HardwareOf(m *argonv1.Machine) *argonv1.Hardware {
	return &argonv1.Hardware{
		Cpus: m.GetCpus(), MemoryBytes: m.GetMemoryBytes(), Seed: m.GetFirstBoot() != nil,
		Disks: inARow(WantedDisks(m)), Networks: inARow(macs(m)),
	}
}

func inARow(ids []string) []*argonv1.Device {
	var list []*argonv1.Device
	for i, id := range ids {
		list = append(list, &argonv1.Device{Id: id, Slot: uint32(i)})
	}
	return list
}

func macs(m *argonv1.Machine) []string {
	var list []string
	for _, n := range m.GetNetworks() {
		list = append(list, n.GetMac())
	}
	return list
}

// WantedDisks are the volumes that a machine is to have, without those that its
// guest is to let go of.
func WantedDisks(m *argonv1.Machine) []string {
	return slices.DeleteFunc(slices.Clone(m.GetVolumeIds()), func(id string) bool { return slices.Contains(m.GetDetaching(), id) })
}

// InForce is what the guest of a machine is made of, as far as is recorded. It is
// the caller's own.
func InForce(m *argonv1.Machine) *argonv1.Hardware {
	h := proto.CloneOf(m.GetInForce())
	if h == nil {
		h = HardwareOf(m)
	}
	if len(h.GetDisks()) == 0 { // recorded before anything could change
		h.Disks, h.Networks = inARow(m.GetVolumeIds()), inARow(macs(m))
	}
	return h
}

// AsStarted is the machine as its guest is, without what waits for the next start or
// is being changed. Whatever takes its guest's memory has to be made of the same.
func AsStarted(m *argonv1.Machine) *argonv1.Machine {
	if m == nil || m.GetInForce() == nil {
		return m
	}
	h := InForce(m)
	m = proto.CloneOf(m)
	m.InForce = h
	m.Cpus, m.MemoryBytes = h.GetCpus(), h.GetMemoryBytes()
	m.VolumeIds, m.Detaching, m.Networks = deviceIDs(h.GetDisks()), nil, nil
	for _, mac := range deviceIDs(h.GetNetworks()) {
		m.Networks = append(m.Networks, &argonv1.NetworkInterface{Mac: mac})
	}
	switch {
	case !h.GetSeed():
		m.FirstBoot = nil
	case m.GetFirstBoot() == nil:
		m.FirstBoot = &argonv1.FirstBoot{} // the disk is there, whatever is in it
	}
	return m
}

// Woken is what a guest of the machine is made of that goes on from a checkpoint,
// of this machine or of the one that it was cloned from.
func Woken(m *argonv1.Machine, c *argonv1.Checkpoint) *argonv1.Hardware {
	h := InForce(c.GetMachine())
	if c.GetMachineId() == m.GetMeta().GetId() {
		return h
	}
	rename(h.GetDisks(), m.GetVolumeIds())
	rename(h.GetNetworks(), macs(m))
	return h
}

// rename gives devices the ids of those that take their places.
func rename(devices []*argonv1.Device, ids []string) {
	for i, d := range devices {
		if i < len(ids) {
			d.Id = ids[i]
		}
	}
}

// Change is what a guest that runs has to be given, and to let go of, to have the
// disks and network cards that are wanted: volumes and hardware addresses.
type Change struct {
	Attach, Detach        []string
	AddCards, RemoveCards []string
}

// None reports whether nothing is to be changed.
func (c Change) None() bool {
	return len(c.Attach)+len(c.Detach)+len(c.AddCards)+len(c.RemoveCards) == 0
}

// Changing is what a machine's guest lacks, and has too much.
func Changing(m *argonv1.Machine) Change {
	h := InForce(m)
	disks, cards := deviceIDs(h.GetDisks()), deviceIDs(h.GetNetworks())
	c := Change{Attach: without(WantedDisks(m), disks), Detach: slices.Clone(m.GetDetaching())}
	if wanted := macs(m); len(wanted) > 0 {
		c.AddCards, c.RemoveCards = without(wanted, cards), without(cards, wanted)
	}
	return c
}

// Settle takes off a machine's record the disks that its guest was to let go of: it
// is no more.
func Settle(m *argonv1.Machine) {
	m.VolumeIds, m.Detaching = WantedDisks(m), nil
}

func deviceIDs(list []*argonv1.Device) []string {
	var ids []string
	for _, d := range list {
		ids = append(ids, d.GetId())
	}
	return ids
}

func without(list, taken []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(taken, s) })
}
