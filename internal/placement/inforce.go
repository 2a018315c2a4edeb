package placement

import (
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// HardwareOf is what a guest of the machine would be made of now.
func HardwareOf(m *argonv1.Machine) *argonv1.Hardware {
	return &argonv1.Hardware{Cpus: m.GetCpus(), MemoryBytes: m.GetMemoryBytes(), Seed: m.GetFirstBoot() != nil}
}

// AsStarted is the machine as its guest was made, without what waits for the next
// start. Whatever takes its guest's memory has to be made of the same.
func AsStarted(m *argonv1.Machine) *argonv1.Machine {
	h := m.GetInForce()
	if h == nil || proto.Equal(h, HardwareOf(m)) {
		return m
	}
	m = proto.CloneOf(m)
	m.Cpus, m.MemoryBytes = h.GetCpus(), h.GetMemoryBytes()
	switch {
	case !h.GetSeed():
		m.FirstBoot = nil
	case m.GetFirstBoot() == nil:
		m.FirstBoot = &argonv1.FirstBoot{} // the disk is there, whatever is in it
	}
	return m
}
