package rpc

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

type machineService struct{ *API }

// CreateMachine answers once the machine is recorded, with its disk: from then
// on the cluster makes it run, whatever happens to who asked.
func (s machineService) CreateMachine(ctx context.Context, req *connect.Request[argonv1.CreateMachineRequest]) (*connect.Response[argonv1.CreateMachineResponse], error) {
	return s.createMachine(ctx, req.Msg, false)
}

// createMachine is CreateMachine; owns says that the volumes were made with the
// machine, and go with it.
func (s machineService) createMachine(ctx context.Context, m *argonv1.CreateMachineRequest, owns bool) (*connect.Response[argonv1.CreateMachineResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	if err := p.takeHints(ctx, m); err != nil {
		return nil, err
	}
	if err := checkMachine(m); err != nil {
		return nil, err
	}
	var machine *argonv1.Machine
	var disk *argonv1.Volume
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) (err error) {
		machine, disk, err = p.planMachine(st, txn, m, owns)
		return err
	})
	if err != nil {
		return nil, err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	res := &argonv1.CreateMachineResponse{Machine: machineView(st, machine)}
	if now := st.Machines[machine.GetMeta().GetId()]; now != nil {
		res.Machine = machineView(st, now)
	}
	if disk != nil && len(disk.GetReplicas()) < int(disk.GetReplicasWanted()) {
		res.Warnings = incomplete(st, &argonv1.Volume{
			Meta: disk.GetMeta(), ReplicasWanted: disk.GetReplicasWanted(),
			Replicas: make([]*argonv1.Replica, len(disk.GetReplicas())),
		})
	}
	return answer(res, nil)
}

// planMachine puts a new machine into a transaction, and the disk it is to get;
// disk is nil when it uses volumes that exist. See createMachine for owns.
func (p *Parts) planMachine(st *catalog.State, txn *catalog.Txn, req *argonv1.CreateMachineRequest, owns bool) (m *argonv1.Machine, disk *argonv1.Volume, err error) {
	name := req.GetName()
	if _, ok := byName(st.Machines, name); ok {
		return nil, nil, exists("machine", name)
	}
	if err := freePorts(st, name, req.GetPorts()); err != nil {
		return nil, nil, err
	}
	if err := freeMACs(st, name, req.GetMacs()); err != nil {
		return nil, nil, err
	}
	m = &argonv1.Machine{
		Meta:               &argonv1.Meta{Id: catalog.NewID(), Name: name},
		Cpus:               req.GetCpus(),
		MemoryBytes:        req.GetMemoryBytes(),
		Ports:              req.GetPorts(),
		Acceleration:       req.GetAcceleration(),
		Wanted:             argonv1.Wanted_WANTED_RUNNING,
		StopTimeoutSeconds: req.GetStopTimeoutSeconds(),
		Firmware:           req.GetFirmware(),
		Shares:             req.GetShares(),
		OnLoss:             req.GetOnLoss(),
		GenerationId:       catalog.NewGeneration(),
		Status:             &argonv1.MachineStatus{State: argonv1.MachineState_MACHINE_STATE_PENDING, Since: timestamppb.New(p.Now())},
	}
	if m.FirstBoot, err = nextFirstBoot(nil, req.GetFirstBoot()); err != nil {
		return nil, nil, err
	}
	m.Networks = networks(m.GetMeta().GetId(), req.GetNetworks(), req.GetMacs())
	m.CheckpointEverySeconds, m.CheckpointsKept = req.GetCheckpointEverySeconds(), req.GetCheckpointsKept()
	if req.GetStopped() {
		m.Wanted, m.Status.State = argonv1.Wanted_WANTED_STOPPED, argonv1.MachineState_MACHINE_STATE_STOPPED
	}
	for _, volume := range req.GetVolumes() {
		v, ok := byName(st.Volumes, volume)
		if !ok {
			return nil, nil, notFound("volume", volume)
		}
		if err := freeVolume(st, v, "making machine "+name); err != nil {
			return nil, nil, err
		}
		if err := filled(v); err != nil {
			return nil, nil, err
		}
		// So that no other machine can take it, and nobody remove it.
		v = proto.CloneOf(v)
		if owns {
			v.MadeFor = m.GetMeta().GetId()
		}
		txn.Put(v)
		m.VolumeIds = append(m.VolumeIds, v.GetMeta().GetId())
	}
	if req.GetImage() != "" {
		if disk, err = p.planVolume(st, txn, newVolume{name: name, size: req.GetDiskBytes(), replicas: req.GetReplicas(), image: req.GetImage(), machine: m.GetMeta().GetId()}); err != nil {
			return nil, nil, err
		}
		m.VolumeIds = slices.Insert(m.VolumeIds, 0, disk.GetMeta().GetId())
	}
	if m.StartOn, err = awakeServer(st, req.GetOn()); err != nil {
		return nil, nil, err
	}
	if !req.GetStopped() {
		if err := placeable(st, m); err != nil {
			return nil, nil, err
		}
	}
	if len(req.GetPorts()) > 0 {
		// Ports are unique among all machines: two calls that publish some
		// meet at one record, that of the oldest server.
		txn.Put(proto.CloneOf(oldest(st.Servers)))
	}
	txn.Create(m)
	return m, disk, nil
}

func oldest(servers map[string]*argonv1.Server) *argonv1.Server {
	return servers[slices.Min(slices.Collect(maps.Keys(servers)))]
}

// placeable refuses a machine that no server could run now.
func placeable(st *catalog.State, m *argonv1.Machine) error {
	at, err := placement.PlaceMachine(st, m)
	if err != nil {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("machine %s: %w", m.GetMeta().GetName(), err))
	}
	if on := m.GetStartOn(); on != "" && at != on {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("machine %s: server %s has not the memory, the CPUs or the acceleration for it: choose another, or leave the choice to the cluster",
			m.GetMeta().GetName(), serverName(st, on)))
	}
	return nil
}

func (s machineService) ListMachines(ctx context.Context, _ *connect.Request[argonv1.ListMachinesRequest]) (*connect.Response[argonv1.ListMachinesResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	res := &argonv1.ListMachinesResponse{}
	for _, m := range sorted(st.Machines) {
		res.Machines = append(res.Machines, machineView(st, m))
	}
	return answer(res, nil)
}

func (s machineService) GetMachine(ctx context.Context, req *connect.Request[argonv1.GetMachineRequest]) (*connect.Response[argonv1.GetMachineResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	m, ok := byName(st.Machines, req.Msg.GetName())
	if !ok {
		return nil, notFound("machine", req.Msg.GetName())
	}
	return answer(&argonv1.GetMachineResponse{Machine: machineView(st, m)}, nil)
}

// StartMachine answers once it is recorded that the machine should run.
func (s machineService) StartMachine(ctx context.Context, req *connect.Request[argonv1.StartMachineRequest]) (*connect.Response[argonv1.StartMachineResponse], error) {
	view, err := s.want(ctx, req.Msg.GetName(), func(st *catalog.State, m *argonv1.Machine) error {
		if m.GetWanted() == argonv1.Wanted_WANTED_RUNNING {
			return nil
		}
		if m.GetWanted() == suspended {
			return precondition("machine %s is suspended: `argon machine resume %s` lets it go on", req.Msg.GetName(), req.Msg.GetName())
		}
		for _, id := range m.GetVolumeIds() {
			if v := st.Volumes[id]; v == nil || v.GetRemoving() {
				return precondition("machine %s: its volume %s is gone: remove the machine", req.Msg.GetName(), id)
			}
		}
		m.Wanted, m.ForceStop = argonv1.Wanted_WANTED_RUNNING, false
		return placeable(st, m)
	})
	return answer(&argonv1.StartMachineResponse{Machine: view}, err)
}

// StopMachine answers once it is recorded that the machine should stop.
func (s machineService) StopMachine(ctx context.Context, req *connect.Request[argonv1.StopMachineRequest]) (*connect.Response[argonv1.StopMachineResponse], error) {
	view, err := s.want(ctx, req.Msg.GetName(), func(st *catalog.State, m *argonv1.Machine) error {
		// What it was to go on from is given up; that of a suspended one is lost.
		memory := st.Checkpoints[m.GetWake().GetCheckpointId()].GetPurpose() == argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND
		if memory && !req.Msg.GetForce() {
			return precondition("machine %s is suspended, and its memory would be lost: resume it first, or stop it with --force", req.Msg.GetName())
		}
		m.Wake = nil
		m.Wanted = argonv1.Wanted_WANTED_STOPPED
		m.ForceStop = m.GetForceStop() || req.Msg.GetForce()
		return nil
	})
	return answer(&argonv1.StopMachineResponse{Machine: view}, err)
}

// want changes what a machine should do, and returns it as it is then.
func (s machineService) want(ctx context.Context, name string, change func(*catalog.State, *argonv1.Machine) error) (*argonv1.MachineView, error) {
	return s.wantWith(ctx, name, func(st *catalog.State, _ *catalog.Txn, m *argonv1.Machine) error { return change(st, m) })
}

// wantWith is want with more than the machine in the transaction. The machine may
// get another name.
func (s machineService) wantWith(ctx context.Context, name string, change func(*catalog.State, *catalog.Txn, *argonv1.Machine) error) (*argonv1.MachineView, error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	var id string
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		old, ok := byName(st.Machines, name)
		if !ok {
			return notFound("machine", name)
		}
		if old.GetWanted() == argonv1.Wanted_WANTED_REMOVED {
			return precondition("machine %s is being removed", name)
		}
		id = old.GetMeta().GetId()
		m := proto.CloneOf(old)
		if err := change(st, txn, m); err != nil {
			return err
		}
		switch {
		case m.GetMeta().GetName() != name:
			txn.RenameMachine(m, name)
		case !proto.Equal(old, m):
			txn.Put(m)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	m := st.Machines[id]
	if m == nil {
		return nil, notFound("machine", name)
	}
	return machineView(st, m), nil
}

// RemoveMachine answers once nothing of the machine is left, nor of the disks that
// were made with it, unless they are kept. Volumes that were made apart stay. What
// is left on servers that are down goes when they return.
func (s machineService) RemoveMachine(ctx context.Context, req *connect.Request[argonv1.RemoveMachineRequest]) (*connect.Response[argonv1.RemoveMachineResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	var machineID string
	var volumeIDs, kept []string
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		m, ok := byName(st.Machines, req.Msg.GetName())
		if !ok {
			return notFound("machine", req.Msg.GetName())
		}
		machineID, volumeIDs, kept = m.GetMeta().GetId(), nil, nil
		if m.GetWanted() == argonv1.Wanted_WANTED_REMOVED && !req.Msg.GetForce() {
			return nil // somebody else has begun; wait with them
		}
		if err := removable(m, req.Msg.GetForce()); err != nil {
			return err
		}
		m = proto.CloneOf(m)
		m.Wanted, m.ForceStop = argonv1.Wanted_WANTED_REMOVED, true
		txn.Put(m)
		for _, id := range m.GetVolumeIds() {
			v := st.Volumes[id]
			switch {
			case v == nil || req.Msg.GetKeepVolumes():
			case v.GetMadeFor() != machineID:
				kept = append(kept, v.GetMeta().GetName())
			default:
				volumeIDs = append(volumeIDs, id)
				if err := p.planRemoval(st, txn, v); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	_, err = p.await(ctx, func(st *catalog.State) bool {
		for _, id := range volumeIDs {
			if !gone(st, id) {
				return false
			}
		}
		return st.Machines[machineID] == nil
	})
	return answer(&argonv1.RemoveMachineResponse{KeptVolumes: kept}, err)
}

// removable refuses to remove a machine that runs, unless it is forced.
func removable(m *argonv1.Machine, force bool) error {
	stopped := m.GetStatus().GetState() == argonv1.MachineState_MACHINE_STATE_STOPPED
	if force || m.GetWanted() != argonv1.Wanted_WANTED_RUNNING && (stopped || m.GetServerId() == "") {
		return nil
	}
	return precondition("machine %s runs, or is about to: stop it first, or remove it with --force", m.GetMeta().GetName())
}
