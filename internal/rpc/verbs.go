package rpc

import (
	"context"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file: what is done to a machine as a whole: reset, restart, copy.

// ResetMachine has the machine's server press the reset button.
func (s machineService) ResetMachine(ctx context.Context, req *connect.Request[argonv1.ResetMachineRequest]) (*connect.Response[argonv1.ResetMachineResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	m, here, err := p.findGuest(ctx, req.Msg.GetName(), req.Header())
	if err != nil {
		return nil, err
	}
	if !here {
		var res *connect.Response[argonv1.ResetMachineResponse]
		err := p.relay(ctx, m, func(ctx context.Context, machines argonv1connect.MachineServiceClient) (err error) {
			res, err = machines.ResetMachine(ctx, handedOn(p, req.Msg))
			return err
		})
		if err != nil {
			return nil, err
		}
		return answer(res.Msg, nil)
	}
	if err := p.Guests.Reset(ctx, m.GetMeta().GetId()); err != nil {
		return nil, p.guestError(m, "reset", err)
	}
	p.tell(ctx, argonv1.Severity_SEVERITY_INFO, "machine", m.GetMeta().GetId(), m.GetMeta().GetName(), "machine-reset", "somebody has reset it")
	return answer(&argonv1.ResetMachineResponse{Machine: machineView(p.View.State(), m)}, nil)
}

// RestartMachine answers once it is recorded that the machine is to stop, and to
// start again.
func (s machineService) RestartMachine(ctx context.Context, req *connect.Request[argonv1.RestartMachineRequest]) (*connect.Response[argonv1.RestartMachineResponse], error) {
	view, err := s.want(ctx, req.Msg.GetName(), func(st *catalog.State, m *argonv1.Machine) error {
		name := m.GetMeta().GetName()
		switch {
		case m.GetWanted() == suspended || m.GetWake() != nil:
			return precondition("machine %s is suspended, or goes on from its memory: `argon machine resume %s` first", name, name)
		case m.GetWanted() != argonv1.Wanted_WANTED_RUNNING || m.GetServerId() == "":
			return precondition("machine %s does not run: start it with `argon machine start %s`", name, name)
		case m.GetMigration() != nil:
			return precondition("machine %s is being migrated to server %s: wait until it is there, or end that with `argon machine migrate %s --cancel`",
				name, serverName(st, m.GetMigration().GetToServerId()), name)
		case placement.BeingSaved(st, m) != nil:
			return precondition("machine %s: a checkpoint of it is being taken: wait until it is there", name)
		case m.GetMove() == nil:
			m.Move = &argonv1.Move{FromServerId: m.GetServerId(), Placement: m.GetPlacement(), Since: timestamppb.New(s.local.Parts().Now()), Restart: true}
		case !m.GetMove().GetRestart():
			return precondition("machine %s is leaving its server, and starts again elsewhere", name)
		}
		m.ForceStop = m.GetForceStop() || req.Msg.GetForce()
		return nil
	})
	return answer(&argonv1.RestartMachineResponse{Machine: view}, err)
}

// CopyMachine takes a snapshot of a machine's disks, and makes another machine of
// clones of it. Unless they are to stay that, the clones get all data of their own in
// the background, and the snapshot goes when they have.
func (s machineService) CopyMachine(ctx context.Context, req *connect.Request[argonv1.CopyMachineRequest]) (*connect.Response[argonv1.CopyMachineResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	source, name := req.Msg.GetName(), req.Msg.GetCopy()
	if err := checkName("machine", name); err != nil {
		return nil, err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	if _, ok := byName(st.Machines, name); ok {
		return nil, exists("machine", name)
	}
	snapshot := "copy-" + strings.ToLower(catalog.NewID())
	snapshots := snapshotService(s)
	if _, err := snapshots.CreateSnapshot(ctx, connect.NewRequest(&argonv1.CreateSnapshotRequest{Machine: source, Name: snapshot})); err != nil {
		return nil, err
	}
	var made *argonv1.Machine
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) (err error) {
		made, err = p.planCopy(st, txn, req.Msg, snapshot)
		return err
	})
	if err != nil || !req.Msg.GetLinked() {
		// With clones of it, it goes once they need it no more.
		remove := &argonv1.RemoveSnapshotRequest{Machine: source, Name: snapshot, Detach: true}
		_, rerr := snapshots.RemoveSnapshot(context.WithoutCancel(ctx), connect.NewRequest(remove))
		if rerr != nil {
			p.Log.Warn("the snapshot that a machine was copied from stays", "machine", source, "snapshot", snapshot, "err", rerr)
		}
	}
	if err != nil {
		return nil, err
	}
	if st, err = p.fresh(ctx); err != nil {
		return nil, err
	}
	if now := st.Machines[made.GetMeta().GetId()]; now != nil {
		made = now
	}
	notes := []string{
		fmt.Sprintf("its disks hold what those of %s held: hostname, machine id, SSH host keys, static addresses", source),
		"no ports are published for it: argon machine set " + name + " --publish",
	}
	if req.Msg.GetLinked() {
		notes = append(notes, fmt.Sprintf("its disks read from snapshot %s of those of %s, which stays as long", snapshot, source))
	}
	return answer(&argonv1.CopyMachineResponse{Machine: machineView(st, made), Notes: notes}, nil)
}

// planCopy makes a machine like another one, with clones of a snapshot of its disks.
func (p *Parts) planCopy(st *catalog.State, txn *catalog.Txn, req *argonv1.CopyMachineRequest, snapshot string) (*argonv1.Machine, error) {
	source, ok := byName(st.Machines, req.GetName())
	if !ok {
		return nil, notFound("machine", req.GetName())
	}
	name := req.GetCopy()
	if _, ok := byName(st.Machines, name); ok {
		return nil, exists("machine", name)
	}
	m := &argonv1.Machine{
		Meta: &argonv1.Meta{Id: catalog.NewID(), Name: name, Labels: source.GetMeta().GetLabels()},
		Cpus: source.GetCpus(), MemoryBytes: source.GetMemoryBytes(), Acceleration: source.GetAcceleration(),
		Firmware: source.GetFirmware(), StopTimeoutSeconds: source.GetStopTimeoutSeconds(), Shares: source.GetShares(), OnLoss: source.GetOnLoss(),
		CheckpointEverySeconds: source.GetCheckpointEverySeconds(), CheckpointsKept: source.GetCheckpointsKept(),
		FirstBoot: proto.CloneOf(source.GetFirstBoot()), GenerationId: catalog.NewGeneration(),
		Wanted: argonv1.Wanted_WANTED_RUNNING,
		Status: &argonv1.MachineStatus{State: argonv1.MachineState_MACHINE_STATE_PENDING, Since: timestamppb.New(p.Now())},
	}
	if req.GetStopped() {
		m.Wanted, m.Status.State = argonv1.Wanted_WANTED_STOPPED, argonv1.MachineState_MACHINE_STATE_STOPPED
	}
	m.Networks = networks(m.GetMeta().GetId(), uint32(max(1, len(source.GetNetworks()))), nil)
	for i, id := range source.GetVolumeIds() {
		parent := st.Volumes[id]
		called := name
		if i > 0 {
			called = fmt.Sprintf("%.60s-%d", name, i)
		}
		v, err := p.planVolume(st, txn, newVolume{
			name: called, replicas: parent.GetReplicasWanted(), machine: m.GetMeta().GetId(),
			parent: parent.GetMeta().GetName(), snapshot: snapshot,
		})
		if err != nil {
			return nil, err
		}
		m.VolumeIds = append(m.VolumeIds, v.GetMeta().GetId())
	}
	txn.Create(m)
	if req.GetStopped() {
		return m, nil
	}
	return m, placeable(st, m)
}
