package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/agent"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
	"github.com/argon-cluster/argon/internal/rpc"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/replica"
)

// volumes attaches volumes on this server and serves them on unix sockets.
type volumes struct {
	serverID string
	store    *catalog.Store
	view     *catalog.View
	replicas *replica.Store
	dialer   mirror.Dialer
	paths    paths
	news     *news
	// meeting is where volumes of a machine wait that are snapshotted together.
	meeting *mirror.Meeting
	agent   *agent.Agent // for connections of users
	sockets *sockets
	// ending tells whether the daemon is about to end.
	ending func() bool
	log    *slog.Logger
}

// Attach implements agent.Volumes.
func (v *volumes) Attach(ctx context.Context, req agent.AttachRequest) (agent.Attachment, error) {
	config := mirror.DefaultConfig()
	config.Continue = req.GuestRuns
	var group mirror.Group = mirror.Alone{}
	if req.MachineID != "" {
		group = v.meeting
	}
	m, err := mirror.Attach(ctx, mirror.Options{
		VolumeID: req.VolumeID,
		Holder:   mirror.Holder{ServerID: v.serverID, MachineID: req.MachineID},
		Epoch:    req.Epoch,
		Catalog:  volumeRecords{v.store},
		View:     volumeView{v.view},
		Dialer:   v.dialer,
		Config:   config,
		Group:    group,
		Log:      v.log,
		Note:     func(n mirror.Note) { v.note(req.VolumeID, n) },
	})
	if errors.Is(err, mirror.ErrDeposed) {
		return nil, fmt.Errorf("%w: %w", agent.ErrOvertaken, err)
	}
	if err != nil {
		return nil, err
	}
	if waits, ok := req.Standby.(*standbyAttachment); ok {
		return waits.become(m), nil
	}
	a, err := v.serve(ctx, m, req)
	if err != nil {
		m.Abandon()
		return nil, err
	}
	return a, nil
}

// serve serves an attachment on the volume's socket.
func (v *volumes) serve(ctx context.Context, m *mirror.Attachment, req agent.AttachRequest) (*attachment, error) {
	path := v.paths.nbd(req.VolumeID)
	ln, err := v.sockets.listen(ctx, path, req.MachineID)
	if err != nil {
		return nil, err
	}
	return serveNBD(m, req.VolumeID, path, ln, v.forget(ctx, path), v.log)
}

// forget is what is done about a socket when its attachment is over.
func (v *volumes) forget(ctx context.Context, path string) func() {
	return func() {
		// The guest of a daemon that ends runs on, and finds its disk again.
		if !v.ending() {
			v.sockets.drop(context.WithoutCancel(ctx), path)
		}
	}
}

// Instant implements agent.Volumes.
func (v *volumes) Instant(ctx context.Context, group string, volumes int, stop func(context.Context) error) error {
	return v.meeting.Instant(ctx, group, volumes, stop)
}

// note tells the operator.
func (v *volumes) note(volumeID string, n mirror.Note) {
	v.news.tell(&argonv1.Event{
		Severity: n.Severity, Kind: "volume", SubjectId: volumeID,
		SubjectName: v.view.State().Volumes[volumeID].GetMeta().GetName(),
		Reason:      n.Reason, Message: n.Message,
	})
}

// volumeRecords is the catalog as an attachment sees it.
type volumeRecords struct{ *catalog.Store }

// UpdateVolume implements mirror.Catalog.
func (r volumeRecords) UpdateVolume(ctx context.Context, id string, change func(*argonv1.Volume) error) (*argonv1.Volume, error) {
	return r.Volumes.Update(ctx, id, change)
}

// GetVolume implements mirror.Catalog.
func (r volumeRecords) GetVolume(ctx context.Context, id string) (*argonv1.Volume, error) {
	return r.Volumes.Get(ctx, id)
}

// volumeView is the cluster as an attachment sees it.
type volumeView struct{ *catalog.View }

// Volume implements mirror.View.
func (v volumeView) Volume(id string) *argonv1.Volume { return v.State().Volumes[id] }

// ServerAlive implements mirror.View.
func (v volumeView) ServerAlive(id string) bool { return placement.Alive(v.State(), id) }

// Connect implements rpc.Volumes.
func (v *volumes) Connect(ctx context.Context, volumeID string) (rpc.Connection, error) {
	c, err := v.agent.Connect(ctx, volumeID)
	if err != nil {
		return nil, err
	}
	return connection{c}, nil
}

type connection struct{ *agent.Connection }

// URI implements rpc.Connection; see the NBD project's doc/uri.md.
func (c connection) URI() string { return nbdURI(c.Disk()) }

func nbdURI(d hypervisor.Disk) string {
	u := url.URL{
		Scheme: "nbd+unix", Path: "/" + d.Export,
		RawQuery: url.Values{"socket": {d.Socket}}.Encode(),
	}
	return "nbd+unix://" + u.EscapedPath() + "?" + u.RawQuery
}

// Inspect implements rpc.Volumes. It seals the replica in the epoch that it has
// seen already, which changes nothing but that a holder of that epoch has to
// begin a new session.
func (v *volumes) Inspect(ctx context.Context, vol *argonv1.Volume, r *argonv1.Replica) (rpc.ReplicaFacts, error) {
	ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
	defer cancel()
	epoch := vol.GetEpoch()
	link, info, err := v.dialer.Dial(ctx, vol, r, epoch)
	var sealed *mirror.SealedError
	if errors.As(err, &sealed) {
		epoch = sealed.Epoch
		link, info, err = v.dialer.Dial(ctx, vol, r, epoch)
	}
	if err != nil {
		return rpc.ReplicaFacts{}, fmt.Errorf("replica %d: %w", r.GetId(), err)
	}
	link.Close(false)
	return rpc.ReplicaFacts{Incarnation: info.Incarnation, Sealed: epoch, Whole: info.Health == mirror.Good}, nil
}

const (
	inspectTimeout = 5 * time.Second
	// meetPatience is how long a volume may stand still for the others that it
	// is snapshotted with.
	meetPatience = 5 * time.Second
)
