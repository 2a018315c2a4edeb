package rpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

const (
	// checkpointTimeout bounds how long a call waits for one to be taken.
	checkpointTimeout = 10 * time.Minute

	cpWanted   = argonv1.CheckpointState_CHECKPOINT_STATE_WANTED
	cpTaking   = argonv1.CheckpointState_CHECKPOINT_STATE_TAKING
	cpReady    = argonv1.CheckpointState_CHECKPOINT_STATE_READY
	cpFailed   = argonv1.CheckpointState_CHECKPOINT_STATE_FAILED
	cpRemoving = argonv1.CheckpointState_CHECKPOINT_STATE_REMOVING

	suspended = argonv1.Wanted_WANTED_SUSPENDED
)

type checkpointService struct{ *API }

// CheckpointMachine records the wish and waits until the machine's server has
// carried it out. If the caller goes away it is taken nevertheless.
func (s machineService) CheckpointMachine(ctx context.Context, req *connect.Request[argonv1.CheckpointMachineRequest]) (*connect.Response[argonv1.CheckpointMachineResponse], error) {
	name := req.Msg.GetCheckpoint()
	if name != "" {
		if err := checkName("checkpoint", name); err != nil {
			return nil, err
		}
	}
	c, err := s.askForCheckpoint(ctx, req.Msg.GetName(), name, argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_MANUAL)
	if err != nil {
		return nil, err
	}
	st, err := s.awaitCheckpoint(ctx, c, func(*catalog.State) bool { return true })
	if err != nil {
		return nil, err
	}
	return answer(&argonv1.CheckpointMachineResponse{Checkpoint: checkpointView(st, st.Checkpoints[c.GetMeta().GetId()])}, nil)
}

// askForCheckpoint records a checkpoint as being wanted, with the volume for its
// memory.
func (s machineService) askForCheckpoint(ctx context.Context, machine, name string, purpose argonv1.CheckpointPurpose) (*argonv1.Checkpoint, error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	var c *argonv1.Checkpoint
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		m, ok := byName(st.Machines, machine)
		if !ok {
			return notFound("machine", machine)
		}
		if err := savable(st, m); err != nil {
			return err
		}
		if _, ok := byName(st.Checkpoints, name); ok {
			return exists("checkpoint", name)
		}
		var memory *argonv1.Volume
		ids := placement.CheckpointIDs{Checkpoint: catalog.NewID(), Memory: catalog.NewID()}
		if c, memory, err = placement.NewCheckpoint(st, m, name, purpose, ids, p.Now()); err != nil {
			return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("checkpoint of machine %s: %w", machine, err))
		}
		// Two that ask for one at once meet at the machine.
		m = proto.CloneOf(m)
		if purpose == argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND {
			m.Wanted = suspended
		}
		txn.Create(c).Create(memory).Put(m)
		return nil
	})
	return c, err
}

// savable refuses a machine whose memory can't be saved now.
func savable(st *catalog.State, m *argonv1.Machine) error {
	name, status := m.GetMeta().GetName(), m.GetStatus()
	runs := status.GetState() == argonv1.MachineState_MACHINE_STATE_RUNNING && status.GetPlacement() == m.GetPlacement()
	switch {
	case m.GetWanted() == suspended:
		return precondition("machine %s is suspended, or being suspended", name)
	case m.GetMigration() != nil:
		return precondition("machine %s is being migrated to server %s: wait until it is there", name, serverName(st, m.GetMigration().GetToServerId()))
	case m.GetWanted() != argonv1.Wanted_WANTED_RUNNING || !runs:
		return precondition("machine %s is %s: only the memory of one that runs can be saved", name, stateWord(m))
	case !placement.Alive(st, m.GetServerId()):
		return precondition("machine %s: its server %s is down", name, serverName(st, m.GetServerId()))
	}
	if c := placement.BeingSaved(st, m); c != nil {
		return precondition("machine %s: checkpoint %s is being taken already: wait until it is", name, c.GetMeta().GetName())
	}
	for _, id := range m.GetVolumeIds() {
		v := st.Volumes[id]
		if len(v.GetSnapshots()) >= maxSnapshots {
			return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("volume %s has %d snapshots, which is all it can have: remove some, or checkpoints", v.GetMeta().GetName(), maxSnapshots))
		}
	}
	return nil
}

func stateWord(m *argonv1.Machine) string {
	return strings.ToLower(strings.TrimPrefix(m.GetStatus().GetState().String(), "MACHINE_STATE_"))
}

// awaitCheckpoint waits until one is taken and also is true, or says why it was
// not taken.
func (s machineService) awaitCheckpoint(ctx context.Context, c *argonv1.Checkpoint, also func(*catalog.State) bool) (*catalog.State, error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, checkpointTimeout)
	defer cancel()
	id, name := c.GetMeta().GetId(), c.GetMeta().GetName()
	st, err := p.await(bounded, func(st *catalog.State) bool {
		switch st.Checkpoints[id].GetState() {
		case cpWanted, cpTaking:
			return false
		case cpReady:
			return also(st)
		}
		return true
	})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("checkpoint %s is still being taken: see `argon checkpoint show %s`", name, name))
	}
	if err != nil {
		return nil, err
	}
	switch now := st.Checkpoints[id]; now.GetState() {
	case cpReady:
		return st, nil
	case cpFailed:
		return nil, connect.NewError(connect.CodeAborted, fmt.Errorf("checkpoint %s was not taken: %s", name, now.GetReason()))
	}
	return nil, precondition("checkpoint %s was removed while it was taken", name)
}

// SuspendMachine answers once the machine rests in the store.
func (s machineService) SuspendMachine(ctx context.Context, req *connect.Request[argonv1.SuspendMachineRequest]) (*connect.Response[argonv1.SuspendMachineResponse], error) {
	c, err := s.askForCheckpoint(ctx, req.Msg.GetName(), "", argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND)
	if err != nil {
		return nil, err
	}
	// Whoever resumes it at once is served: then it is not suspended any more.
	st, err := s.awaitCheckpoint(ctx, c, func(st *catalog.State) bool {
		m := st.Machines[c.GetMachineId()]
		return m.GetServerId() == "" || m.GetWanted() != suspended
	})
	if err != nil {
		return nil, err
	}
	m := st.Machines[c.GetMachineId()]
	if m == nil {
		return nil, precondition("machine %s was removed while it was suspended", req.Msg.GetName())
	}
	return answer(&argonv1.SuspendMachineResponse{Machine: machineView(st, m)}, nil)
}

// ResumeMachine answers once it is recorded what the machine is to go on from.
func (s machineService) ResumeMachine(ctx context.Context, req *connect.Request[argonv1.ResumeMachineRequest]) (*connect.Response[argonv1.ResumeMachineResponse], error) {
	view, err := s.wantWith(ctx, req.Msg.GetName(), func(st *catalog.State, txn *catalog.Txn, m *argonv1.Machine) error {
		server, err := awakeServer(st, req.Msg.GetServer())
		if err != nil {
			return err
		}
		if req.Msg.GetCheckpoint() == "" {
			err = resumeSuspended(m)
		} else {
			err = resumeFrom(st, txn, m, req.Msg.GetCheckpoint())
		}
		if err != nil {
			return err
		}
		m.Wake.ServerId, m.Wanted, m.ForceStop = server, argonv1.Wanted_WANTED_RUNNING, false
		return awakable(st, m)
	})
	return answer(&argonv1.ResumeMachineResponse{Machine: view}, err)
}

// awakeServer is the id of the server that a machine is to go on on.
func awakeServer(st *catalog.State, name string) (string, error) {
	if name == "" {
		return "", nil
	}
	server, ok := byName(st.Servers, name)
	switch {
	case !ok:
		return "", notFound("server", name)
	case server.GetWitness():
		return "", precondition("server %s is a witness, which runs no machines", name)
	case server.GetDrain() != nil:
		return "", precondition("server %s is drained, and takes no machines", name)
	case !placement.Alive(st, server.GetMeta().GetId()):
		return "", precondition("server %s is down", name)
	}
	return server.GetMeta().GetId(), nil
}

func resumeSuspended(m *argonv1.Machine) error {
	name := m.GetMeta().GetName()
	switch {
	case m.GetWanted() != suspended:
		return precondition("machine %s is not suspended, it is %s: to make it what it was at a checkpoint, give --from", name, stateWord(m))
	case m.GetWake() == nil || m.GetServerId() != "":
		return precondition("machine %s is still being suspended: try again", name)
	}
	m.Wake.Checked = false
	return nil
}

// resumeFrom makes a machine one that goes on from a checkpoint: with what it
// was made of then.
func resumeFrom(st *catalog.State, txn *catalog.Txn, m *argonv1.Machine, checkpoint string) error {
	name := m.GetMeta().GetName()
	c, err := usableCheckpoint(st, checkpoint)
	switch {
	case err != nil:
		return err
	case c.GetMachineId() != m.GetMeta().GetId():
		return precondition("checkpoint %s is not of machine %s: `argon machine clone` makes another machine of it", checkpoint, name)
	case m.GetWanted() == suspended:
		return precondition("machine %s is suspended: resume it without --from, or give up its memory with `argon machine stop %s --force` first", name, name)
	case m.GetWanted() != argonv1.Wanted_WANTED_STOPPED || m.GetServerId() != "":
		return precondition("machine %s runs, or is about to: stop it first, as its memory and its disks become those of the checkpoint", name)
	}
	for _, id := range placement.AsStarted(c.GetMachine()).GetVolumeIds() {
		v := st.Volumes[id]
		if owner := userOf(st, v); owner != nil && owner.GetMeta().GetId() != m.GetMeta().GetId() {
			return precondition("checkpoint %s: its disk %s belongs to machine %s now", checkpoint, v.GetMeta().GetName(), owner.GetMeta().GetName())
		}
		if err := idleVolume(st, v, "resuming from checkpoint "+checkpoint); err != nil {
			return err
		}
		txn.Put(proto.CloneOf(v))
	}
	asThen(m, c)
	m.Wake = &argonv1.Wake{CheckpointId: c.GetMeta().GetId()}
	// So that it can't be removed in between.
	txn.Put(proto.CloneOf(c))
	return nil
}

// asThen gives a machine the parts that a checkpoint's memory knows.
func asThen(m *argonv1.Machine, c *argonv1.Checkpoint) {
	was := placement.AsStarted(c.GetMachine())
	m.Cpus, m.MemoryBytes, m.VolumeIds = was.GetCpus(), was.GetMemoryBytes(), was.GetVolumeIds()
	m.Detaching = nil
	m.Firmware, m.Networks, m.FirstBoot = was.GetFirmware(), was.GetNetworks(), was.GetFirstBoot()
	m.GenerationId = placement.NextGeneration(was, catalog.NewGeneration())
}

func usableCheckpoint(st *catalog.State, name string) (*argonv1.Checkpoint, error) {
	c, ok := byName(st.Checkpoints, name)
	switch {
	case !ok:
		return nil, notFound("checkpoint", name)
	case c.GetPurpose() == argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND:
		return nil, precondition("checkpoint %s is the memory of a suspended machine: resume that", name)
	}
	if why := placement.Unusable(st, c); why != "" {
		return nil, precondition("checkpoint %s can't be used: %s", name, why)
	}
	return c, nil
}

// awakable refuses a machine that no server could let go on now.
func awakable(st *catalog.State, m *argonv1.Machine) error {
	if _, err := placement.PlaceAwake(st, m); err != nil {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("machine %s: %w", m.GetMeta().GetName(), err))
	}
	return nil
}

// CloneMachine answers once the other machine is recorded, with its disks.
func (s machineService) CloneMachine(ctx context.Context, req *connect.Request[argonv1.CloneMachineRequest]) (*connect.Response[argonv1.CloneMachineResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	if err := checkName("machine", req.Msg.GetClone()); err != nil {
		return nil, err
	}
	var clone *argonv1.Machine
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) (err error) {
		clone, err = p.planClone(st, txn, req.Msg)
		return err
	})
	if err != nil {
		return nil, err
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	if now := st.Machines[clone.GetMeta().GetId()]; now != nil {
		clone = now
	}
	return answer(&argonv1.CloneMachineResponse{Machine: machineView(st, clone), Notes: cloneNotes(req.Msg, clone)}, nil)
}

// cloneNotes say what a machine that goes on from another's memory shares with
// it.
func cloneNotes(req *argonv1.CloneMachineRequest, clone *argonv1.Machine) []string {
	random := "its kernel is told that it is a copy (vmgenid) and takes new random numbers, if it knows that; programs in it may go on with those of the other: make no keys in it before it has booted"
	if clone.GetGenerationId() == "" {
		random = "its random numbers continue those of the other: make no keys in it before it has booted"
	}
	return []string{
		fmt.Sprintf("until it boots, %s knows itself by the hostname, machine id, SSH host keys and hardware addresses of %s", req.GetClone(), req.GetName()),
		random,
		"no ports are published for it",
	}
}

func (p *Parts) planClone(st *catalog.State, txn *catalog.Txn, req *argonv1.CloneMachineRequest) (*argonv1.Machine, error) {
	source, ok := byName(st.Machines, req.GetName())
	if !ok {
		return nil, notFound("machine", req.GetName())
	}
	name := req.GetClone()
	if _, ok := byName(st.Machines, name); ok {
		return nil, exists("machine", name)
	}
	c, err := usableCheckpoint(st, req.GetCheckpoint())
	if err != nil {
		return nil, err
	}
	if c.GetMachineId() != source.GetMeta().GetId() {
		return nil, precondition("checkpoint %s is not of machine %s", req.GetCheckpoint(), req.GetName())
	}
	server, err := awakeServer(st, req.GetServer())
	if err != nil {
		return nil, err
	}
	m := &argonv1.Machine{
		Meta:         &argonv1.Meta{Id: catalog.NewID(), Name: name},
		Acceleration: source.GetAcceleration(), StopTimeoutSeconds: source.GetStopTimeoutSeconds(), Shares: source.GetShares(),
		Wanted: argonv1.Wanted_WANTED_RUNNING, ClonedFrom: source.GetMeta().GetId(),
		Wake:   &argonv1.Wake{CheckpointId: c.GetMeta().GetId(), ServerId: server},
		Status: &argonv1.MachineStatus{State: argonv1.MachineState_MACHINE_STATE_PENDING, Since: timestamppb.New(p.Now())},
	}
	asThen(m, c)
	m.Networks = networks(m.GetMeta().GetId(), uint32(max(1, len(m.GetNetworks()))), nil)
	disks := m.GetVolumeIds()
	m.VolumeIds = nil
	for i, id := range disks {
		parent := st.Volumes[id]
		called := name
		if i > 0 {
			called = fmt.Sprintf("%s-%d", name, i)
		}
		v, err := p.planVolume(st, txn, newVolume{
			name: called, replicas: parent.GetReplicasWanted(), machine: m.GetMeta().GetId(),
			parent: parent.GetMeta().GetName(), snapshot: placement.Snapshot(parent, c.GetSnapshots()[id]).GetName(),
		})
		if err != nil {
			return nil, err
		}
		m.VolumeIds = append(m.VolumeIds, v.GetMeta().GetId())
	}
	txn.Create(m).Put(proto.CloneOf(c))
	return m, awakable(st, m)
}

// ListCheckpoints shows those of machines; what is suspended shows in its state.
func (s checkpointService) ListCheckpoints(ctx context.Context, req *connect.Request[argonv1.ListCheckpointsRequest]) (*connect.Response[argonv1.ListCheckpointsResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	id := ""
	if name := req.Msg.GetMachine(); name != "" {
		m, ok := byName(st.Machines, name)
		if !ok {
			return nil, notFound("machine", name)
		}
		id = m.GetMeta().GetId()
	}
	res := &argonv1.ListCheckpointsResponse{}
	for _, c := range sorted(st.Checkpoints) {
		if id == "" || c.GetMachineId() == id {
			res.Checkpoints = append(res.Checkpoints, checkpointView(st, c))
		}
	}
	return answer(res, nil)
}

// GetCheckpoint implements the call.
func (s checkpointService) GetCheckpoint(ctx context.Context, req *connect.Request[argonv1.GetCheckpointRequest]) (*connect.Response[argonv1.GetCheckpointResponse], error) {
	st, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	c, ok := byName(st.Checkpoints, req.Msg.GetName())
	if !ok {
		return nil, notFound("checkpoint", req.Msg.GetName())
	}
	return answer(&argonv1.GetCheckpointResponse{Checkpoint: checkpointView(st, c)}, nil)
}

// RemoveCheckpoint answers once nothing can be resumed from it any more; its
// space comes back after that.
func (s checkpointService) RemoveCheckpoint(ctx context.Context, req *connect.Request[argonv1.RemoveCheckpointRequest]) (*connect.Response[argonv1.RemoveCheckpointResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	name := req.Msg.GetName()
	err = p.change(ctx, func(st *catalog.State, txn *catalog.Txn) error {
		c, ok := byName(st.Checkpoints, name)
		if !ok {
			return notFound("checkpoint", name)
		}
		for _, m := range st.Machines {
			if m.GetWake().GetCheckpointId() == c.GetMeta().GetId() {
				return precondition("checkpoint %s: machine %s goes on from it: it can be removed once that runs", name, m.GetMeta().GetName())
			}
		}
		switch c.GetState() {
		case cpWanted, cpTaking:
			if c.GetPurpose() == argonv1.CheckpointPurpose_CHECKPOINT_PURPOSE_SUSPEND {
				return precondition("checkpoint %s: its machine is being suspended to it", name)
			}
		case cpRemoving:
			return nil
		}
		c = proto.CloneOf(c)
		c.State = cpRemoving
		txn.Put(c)
		return nil
	})
	return answer(&argonv1.RemoveCheckpointResponse{}, err)
}

func checkpointView(st *catalog.State, c *argonv1.Checkpoint) *argonv1.CheckpointView {
	c = proto.CloneOf(c)
	c.Machine = withoutSecrets(c.GetMachine())
	return &argonv1.CheckpointView{
		Checkpoint:  c,
		MachineName: cmp.Or(st.Machines[c.GetMachineId()].GetMeta().GetName(), c.GetMachineId()),
		ServerName:  serverName(st, c.GetServerId()),
		Unusable:    placement.Unusable(st, c),
	}
}
