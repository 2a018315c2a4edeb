package rpc

import (
	"context"
	"maps"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// SetMachine answers once the change is recorded. What can be changed while the
// machine runs, its agent changes from then on.
func (s machineService) SetMachine(ctx context.Context, req *connect.Request[argonv1.SetMachineRequest]) (*connect.Response[argonv1.SetMachineResponse], error) {
	var later []string
	view, err := s.wantWith(ctx, req.Msg.GetName(), func(st *catalog.State, txn *catalog.Txn, m *argonv1.Machine) (err error) {
		later, err = alter(st, txn, m, req.Msg)
		return err
	})
	return answer(&argonv1.SetMachineResponse{Machine: view, NextStart: later}, err)
}

// alter makes the changes that are asked for, and says what of them waits for the
// machine's next start.
func alter(st *catalog.State, txn *catalog.Txn, m *argonv1.Machine, req *argonv1.SetMachineRequest) (later []string, err error) {
	old, name := st.Machines[m.GetMeta().GetId()], m.GetMeta().GetName()
	setMachine(m, req)
	if err := checkSize(name, m.GetCpus(), m.GetMemoryBytes(), m.GetStopTimeoutSeconds()); err != nil {
		return nil, err
	}
	if err := checkShares(name, m.GetCpus(), m.GetShares()); err != nil {
		return nil, err
	}
	if err := checkSchedule(name, m.GetCheckpointEverySeconds(), m.GetCheckpointsKept()); err != nil {
		return nil, err
	}
	if m.GetWake() != nil && (old.GetCpus() != m.GetCpus() || old.GetMemoryBytes() != m.GetMemoryBytes()) {
		return nil, precondition("machine %s goes on from its memory, which fits on what it had only: let it go on first", name)
	}
	if err := setPorts(st, txn, m, req); err != nil {
		return nil, err
	}
	if err := setDevices(st, txn, m, req); err != nil {
		return nil, err
	}
	if err := setLabels(m.GetMeta(), req); err != nil {
		return nil, err
	}
	if to := req.GetNewName(); to != "" && to != name {
		if err := checkName("machine", to); err != nil {
			return nil, err
		}
		if _, ok := byName(st.Machines, to); ok {
			return nil, exists("machine", to)
		}
		m.Meta.Name = to
	}
	later = nextStart(old, m)
	if m.GetWanted() != argonv1.Wanted_WANTED_RUNNING || len(later) == 0 {
		return later, nil
	}
	return later, placeable(st, m)
}

// setPorts publishes ports, and publishes others no more.
func setPorts(st *catalog.State, txn *catalog.Txn, m *argonv1.Machine, req *argonv1.SetMachineRequest) error {
	name := m.GetMeta().GetName()
	for _, port := range req.GetUnpublish() {
		kept := slices.DeleteFunc(slices.Clone(m.GetPorts()), func(p *argonv1.PublishedPort) bool { return p.GetClusterPort() == port })
		if len(kept) == len(m.GetPorts()) {
			return precondition("machine %s: port %d is not published: see `argon machine show %s`", name, port, name)
		}
		m.Ports = kept
	}
	if len(req.GetPublish()) == 0 {
		return nil
	}
	ports := append(slices.Clone(m.GetPorts()), req.GetPublish()...)
	if err := checkPorts(name, ports); err != nil {
		return err
	}
	if err := freePorts(st, name, req.GetPublish()); err != nil {
		return err
	}
	m.Ports = ports
	txn.Put(proto.CloneOf(oldest(st.Servers))) // where all that publish meet; see planMachine
	return nil
}

// setDevices changes disks, network interfaces and firmware. A guest that runs is
// given, and lets go of, all but what it boots from.
func setDevices(st *catalog.State, txn *catalog.Txn, m *argonv1.Machine, req *argonv1.SetMachineRequest) error {
	if len(req.GetAttach())+len(req.GetDetach()) == 0 && req.GetBoot() == "" && req.Networks == nil && req.Firmware == nil {
		return nil
	}
	name := m.GetMeta().GetName()
	switch runs := m.GetServerId() != ""; {
	case m.GetWanted() == suspended || m.GetWake() != nil:
		return precondition("machine %s is suspended, or goes on from its memory, which fits on what it had only: resume it first", name)
	case (runs || m.GetWanted() != argonv1.Wanted_WANTED_STOPPED) && (req.GetBoot() != "" || req.Firmware != nil):
		return precondition("machine %s runs, or is about to: what it boots from and its firmware can be changed once it is stopped (`argon machine stop %s`)", name, name)
	case runs && m.GetWanted() != argonv1.Wanted_WANTED_RUNNING:
		return precondition("machine %s is stopping: wait until it has stopped", name)
	case m.GetMigration() != nil || m.GetMove() != nil:
		return precondition("machine %s is on its way to another server, or is restarted: wait until it runs again", name)
	case runs: // also where an older server has started it, and did not record this
		m.InForce = placement.InForce(st.Machines[m.GetMeta().GetId()])
	}
	if err := setDisks(st, txn, m, req); err != nil {
		return err
	}
	if req.Networks != nil {
		if n := req.GetNetworks(); n == 0 || n > maxNetworks {
			return invalid("machine %s: %d network interfaces: give 1 to %d", name, n, maxNetworks)
		}
		if m.GetServerId() != "" && len(m.GetNetworks()) == 0 { // QEMU gave the one that it has its address
			return precondition("machine %s: it was made before its network cards could be changed while it runs: stop it first (`argon machine stop %s`)", name, name)
		}
		var macs []string // those that it has keep their addresses
		for _, n := range m.GetNetworks() {
			macs = append(macs, n.GetMac())
		}
		m.Networks = networks(m.GetMeta().GetId(), req.GetNetworks(), macs)
	}
	if req.Firmware != nil {
		if !slices.Contains([]string{"bios", "uefi"}, req.GetFirmware()) {
			return invalid("machine %s: firmware %q: use bios or uefi", name, req.GetFirmware())
		}
		m.Firmware = req.GetFirmware()
	}
	return nil
}

// setDisks lets go of disks, then takes others, then says which one boots.
func setDisks(st *catalog.State, txn *catalog.Txn, m *argonv1.Machine, req *argonv1.SetMachineRequest) error {
	name := m.GetMeta().GetName()
	for _, volume := range req.GetDetach() {
		v, ok := byName(st.Volumes, volume)
		i := slices.Index(m.GetVolumeIds(), v.GetMeta().GetId())
		switch runs := m.GetServerId() != ""; {
		case !ok || i < 0:
			return precondition("machine %s: volume %s is no disk of it: see `argon machine show %s`", name, volume, name)
		case runs && i == 0:
			return precondition("machine %s: it runs from volume %s: stop it first (`argon machine stop %s`)", name, volume, name)
		case runs && slices.Contains(m.GetDetaching(), v.GetMeta().GetId()):
			continue
		case runs:
			m.Detaching = append(m.GetDetaching(), v.GetMeta().GetId())
		default:
			m.VolumeIds = slices.Delete(m.GetVolumeIds(), i, i+1)
		}
		if v.GetMadeFor() == m.GetMeta().GetId() { // it does not go with the machine any more
			v = proto.CloneOf(v)
			v.MadeFor = ""
			txn.Put(v)
		}
	}
	for _, volume := range req.GetAttach() {
		v, ok := byName(st.Volumes, volume)
		if !ok {
			return notFound("volume", volume)
		}
		if i := slices.Index(m.GetDetaching(), v.GetMeta().GetId()); i >= 0 && !slices.Contains(req.GetDetach(), volume) {
			m.Detaching = slices.Delete(m.GetDetaching(), i, i+1)
			continue
		}
		if slices.Contains(req.GetDetach(), volume) || slices.Contains(m.GetVolumeIds(), v.GetMeta().GetId()) {
			return invalid("machine %s: volume %s is given twice, or is a disk of it already", name, volume)
		}
		if err := freeVolume(st, v, "attaching it to machine "+name); err != nil {
			return err
		}
		if err := filled(v); err != nil {
			return err
		}
		txn.Put(proto.CloneOf(v)) // so that no other machine can take it, and nobody remove it
		m.VolumeIds = append(m.VolumeIds, v.GetMeta().GetId())
	}
	if volume := req.GetBoot(); volume != "" {
		v, _ := byName(st.Volumes, volume)
		i := slices.Index(m.GetVolumeIds(), v.GetMeta().GetId())
		if i < 0 {
			return precondition("machine %s: volume %s is no disk of it: attach it with --attach %s", name, volume, volume)
		}
		m.VolumeIds = slices.Insert(slices.Delete(m.GetVolumeIds(), i, i+1), 0, v.GetMeta().GetId())
	}
	switch n := len(m.GetVolumeIds()); {
	case n == 0:
		return precondition("machine %s: it would have no disk left", name)
	case n > maxDisks:
		return invalid("machine %s: %d disks: at most %d", name, n, maxDisks)
	}
	return nil
}

func setLabels(meta *argonv1.Meta, req *argonv1.SetMachineRequest) error {
	if len(req.GetLabels())+len(req.GetRemoveLabels()) == 0 {
		return nil
	}
	labels := maps.Clone(meta.GetLabels())
	if labels == nil {
		labels = map[string]string{}
	}
	for _, k := range req.GetRemoveLabels() {
		delete(labels, k)
	}
	for k, v := range req.GetLabels() {
		if k == "" || len(k)+len(v) > 1024 || strings.ContainsAny(k, "=,\n") {
			return invalid("machine %s: label %.20q: write it KEY=VALUE, at most 1024 bytes", meta.GetName(), k)
		}
		labels[k] = v
	}
	if n := len(labels); n > maxLabels {
		return invalid("machine %s: %d labels: at most %d", meta.GetName(), n, maxLabels)
	}
	meta.Labels = labels
	return nil
}
