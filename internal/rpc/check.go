package rpc

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/dustin/go-humanize"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/volume"
)

// The limits of what can be asked for.
const (
	mib = 1 << 20

	defaultReplicas = 2
	maxReplicas     = 3

	defaultCPUs   = 1
	maxCPUs       = 255
	defaultMemory = 512 * mib
	minMemory     = 16 * mib
	maxMemory     = 4 << 40
	maxDisks      = hypervisor.MaxDisks
	maxPorts      = 64

	defaultStopTimeout = 60
	maxStopTimeout     = 3600

	minCheckpointEvery = 10
	defaultCheckpoints = 6
	maxCheckpoints     = 32

	maxZone = 63
)

func invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

func precondition(format string, args ...any) error {
	return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf(format, args...))
}

func notFound(kind, name string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("%s %q does not exist: see `argon %s ls`", kind, name, kind))
}

func exists(kind, name string) error {
	return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("%s %q exists already: choose another name", kind, name))
}

var goodName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// checkName: names become host names and paths.
func checkName(kind, name string) error {
	if goodName.MatchString(name) {
		return nil
	}
	return invalid("%s name %q: use 1 to 63 of a-z, 0-9 and '-', with no '-' at either end", kind, name)
}

func checkZone(zone string) error {
	if len(zone) > maxZone || strings.ContainsFunc(zone, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return invalid("zone %q: use at most %d printable ASCII characters without spaces", zone, maxZone)
	}
	return nil
}

// wholeMiB rounds bytes up: volumes are made of whole MiB.
func wholeMiB(bytes uint64) uint64 { return (bytes + mib - 1) / mib * mib }

// checkVolumeSize also fills in the size of what the volume is made from,
// rounded up.
func checkVolumeSize(name string, size uint64, from origin) (uint64, error) {
	smallest := wholeMiB(from.size)
	if size == 0 {
		size = smallest
	}
	if size < smallest {
		return 0, invalid("volume %s: %s is less than %s needs: give at least %s",
			name, humanize.IBytes(size), from.what, humanize.IBytes(smallest))
	}
	switch {
	case size == 0:
		return 0, invalid("volume %s: give a size, or an image or a snapshot to take it from", name)
	case size%mib != 0:
		return 0, invalid("volume %s: a size of %d bytes is not a multiple of 1 MiB", name, size)
	case size > volume.MaxSize:
		return 0, invalid("volume %s: %s is more than a volume can have, %s", name, humanize.IBytes(size), humanize.IBytes(volume.MaxSize))
	}
	return size, nil
}

func checkReplicas(name string, n uint32) (uint32, error) {
	if n == 0 {
		return defaultReplicas, nil
	}
	if n > maxReplicas {
		return 0, invalid("volume %s: %d replicas: give 1, 2 or 3", name, n)
	}
	return n, nil
}

// checkMachine checks what concerns only the machine itself, and fills in what
// was left open.
func checkMachine(req *argonv1.CreateMachineRequest) error {
	name := req.GetName()
	if err := checkName("machine", name); err != nil {
		return err
	}
	if req.Cpus == 0 {
		req.Cpus = defaultCPUs
	}
	if req.MemoryBytes == 0 {
		req.MemoryBytes = defaultMemory
	}
	req.CheckpointsKept = cmp.Or(req.GetCheckpointsKept(), defaultCheckpoints)
	if req.StopTimeoutSeconds == 0 {
		req.StopTimeoutSeconds = defaultStopTimeout
	}
	if req.Acceleration == "" {
		req.Acceleration = "auto"
	}
	if err := checkSize(name, req.GetCpus(), req.GetMemoryBytes(), req.GetStopTimeoutSeconds()); err != nil {
		return err
	}
	if err := checkShares(name, req.GetCpus(), req.GetShares()); err != nil {
		return err
	}
	switch {
	case !slices.Contains([]string{"auto", "kvm", "tcg"}, req.GetAcceleration()):
		return invalid("machine %s: acceleration %q: use auto, kvm or tcg", name, req.GetAcceleration())
	case len(req.GetVolumes()) > maxDisks || req.GetImage() != "" && len(req.GetVolumes()) == maxDisks:
		return invalid("machine %s: %d disks: at most %d", name, len(req.GetVolumes())+min(len(req.GetImage()), 1), maxDisks)
	case !slices.Contains([]string{"", "bios", "uefi"}, req.GetFirmware()):
		return invalid("machine %s: firmware %q: use bios or uefi", name, req.GetFirmware())
	case req.GetImage() == "" && len(req.GetVolumes()) == 0:
		return invalid("machine %s: give an image to make its disk from, or a volume", name)
	case req.GetImage() == "" && (req.GetDiskBytes() != 0 || req.GetReplicas() != 0 && req.GetReplicas() != defaultReplicas):
		return invalid("machine %s: the size and the replicas of a disk go with an image; volumes have theirs", name)
	}
	for i, v := range req.GetVolumes() {
		if slices.Contains(req.GetVolumes()[:i], v) {
			return invalid("machine %s: volume %s is given twice", name, v)
		}
	}
	if err := cmp.Or(checkNetworks(req), checkFirstBoot(name, req.GetFirstBoot())); err != nil {
		return err
	}
	if err := checkSchedule(name, req.GetCheckpointEverySeconds(), req.GetCheckpointsKept()); err != nil {
		return err
	}
	return checkPorts(name, req.GetPorts())
}

// checkSize checks what can be changed later, too.
func checkSize(name string, cpus uint32, memory uint64, stopTimeout uint32) error {
	switch {
	case cpus < 1 || cpus > maxCPUs:
		return invalid("machine %s: %d CPUs: give 1 to %d", name, cpus, maxCPUs)
	case memory%mib != 0:
		return invalid("machine %s: %d bytes of memory are not a multiple of 1 MiB", name, memory)
	case memory < minMemory || memory > maxMemory:
		return invalid("machine %s: %s of memory: give %s to %s", name, humanize.IBytes(memory), humanize.IBytes(minMemory), humanize.IBytes(maxMemory))
	case stopTimeout < 1 || stopTimeout > maxStopTimeout:
		return invalid("machine %s: a stop timeout of %d s: give 1 to %d", name, stopTimeout, maxStopTimeout)
	}
	return nil
}

// checkSchedule checks how often checkpoints are taken, and how many are kept.
func checkSchedule(machine string, every, kept uint32) error {
	switch {
	case every != 0 && every < minCheckpointEvery:
		return invalid("machine %s: a checkpoint every %d s: at most every %d s", machine, every, minCheckpointEvery)
	case kept > maxCheckpoints:
		return invalid("machine %s: %d checkpoints kept: at most %d", machine, kept, maxCheckpoints)
	}
	return nil
}

func checkPorts(machine string, ports []*argonv1.PublishedPort) error {
	if len(ports) > maxPorts {
		return invalid("machine %s: %d published ports: at most %d", machine, len(ports), maxPorts)
	}
	seen := map[uint32]bool{}
	for _, p := range ports {
		for _, n := range []uint32{p.GetClusterPort(), p.GetGuestPort()} {
			if n < 1 || n > 65535 {
				return invalid("machine %s: port %d: use 1 to 65535", machine, n)
			}
		}
		if seen[p.GetClusterPort()] {
			return invalid("machine %s: port %d is published twice", machine, p.GetClusterPort())
		}
		seen[p.GetClusterPort()] = true
	}
	return nil
}

// freePorts refuses ports that another machine or Argon itself uses: they are
// the same on every server.
func freePorts(st *catalog.State, machine string, ports []*argonv1.PublishedPort) error {
	for _, p := range ports {
		port := p.GetClusterPort()
		for _, s := range sorted(st.Servers) {
			for _, own := range []struct {
				port uint32
				what string
			}{{s.GetApiPort(), "API"}, {s.GetDataPort(), "volume data"}, {s.GetPeerPort(), "etcd peers"}, {s.GetEtcdPort(), "etcd clients"}} {
				if port == own.port {
					return precondition("machine %s: port %d is the one of server %s for %s: publish another", machine, port, s.GetMeta().GetName(), own.what)
				}
			}
		}
		for _, m := range sorted(st.Machines) {
			for _, q := range m.GetPorts() {
				if q.GetClusterPort() == port && m.GetMeta().GetName() != machine { // its own are checked as a whole
					return precondition("machine %s: port %d is published by machine %s already: choose another", machine, port, m.GetMeta().GetName())
				}
			}
		}
	}
	return nil
}

// freeVolume refuses a volume that something uses or that is going away.
func freeVolume(st *catalog.State, v *argonv1.Volume, what string) error {
	name := v.GetMeta().GetName()
	if v.GetRemoving() {
		return precondition("%s: volume %s is being removed", what, name)
	}
	if m := userOf(st, v); m != nil {
		other := m.GetMeta().GetName()
		if slices.Contains(m.GetDetaching(), v.GetMeta().GetId()) {
			return precondition("%s: volume %s is to be let go of by the guest of machine %s: `argon machine show %s` says when it has", what, name, other, other)
		}
		return precondition("%s: volume %s is a disk of machine %s: `argon machine set %s --detach %s` sets it free, or `argon machine rm %s --keep-volumes`",
			what, name, other, other, name, other)
	}
	return ownVolume(st, v, what)
}

// ownVolume refuses one that the cluster keeps for itself.
func ownVolume(st *catalog.State, v *argonv1.Volume, what string) error {
	if id := v.GetCheckpointId(); id != "" {
		return precondition("%s: volume %s holds the memory of checkpoint %s, and goes with it",
			what, v.GetMeta().GetName(), cmp.Or(st.Checkpoints[id].GetMeta().GetName(), id))
	}
	return nil
}

// unusedVolume also refuses one that somebody has connected.
func unusedVolume(st *catalog.State, v *argonv1.Volume, what string) error {
	if err := freeVolume(st, v, what); err != nil {
		return err
	}
	if connected(st, v) {
		return precondition("%s: volume %s is in use by `argon volume connect`, an export or an import on server %s: end that first",
			what, v.GetMeta().GetName(), serverName(st, v.GetAttachment().GetServerId()))
	}
	return nil
}

// idleVolume refuses one whose content somebody may be using: a machine that
// runs or is about to, or a connection.
func idleVolume(st *catalog.State, v *argonv1.Volume, what string) error {
	if m := userOf(st, v); m != nil && (m.GetServerId() != "" || m.GetWanted() == argonv1.Wanted_WANTED_RUNNING || m.GetWanted() == suspended) {
		return precondition("%s: machine %s runs on volume %s, is about to, or is suspended: stop it first", what, m.GetMeta().GetName(), v.GetMeta().GetName())
	}
	if connected(st, v) {
		return precondition("%s: volume %s is in use by `argon volume connect`, an export or an import on server %s: end that first",
			what, v.GetMeta().GetName(), serverName(st, v.GetAttachment().GetServerId()))
	}
	return nil
}

// userOf is the machine that has the volume as a disk.
func userOf(st *catalog.State, v *argonv1.Volume) *argonv1.Machine {
	for _, m := range st.Machines {
		if slices.Contains(m.GetVolumeIds(), v.GetMeta().GetId()) {
			return m
		}
	}
	return nil
}

// byName finds a record in a snapshot.
func byName[R interface{ GetMeta() *argonv1.Meta }](records map[string]R, name string) (R, bool) {
	for _, r := range records {
		if r.GetMeta().GetName() == name {
			return r, true
		}
	}
	var none R
	return none, false
}
