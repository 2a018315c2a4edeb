package rpc

import (
	"context"
	"io"
	"log/slog"
	"os"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/image"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/stream"
)

// Local is this server, whether it is part of a cluster or not. Safe for
// concurrent use.
type Local interface {
	// Condition is "unconfigured", "starting", "ready" or "no-majority", and a
	// line about it.
	Condition() (state, detail string)
	// Parts are those of a member; nil until the catalog was first read.
	Parts() *Parts
	// Init and Join configure this server. They fail if it is configured.
	Init(ctx context.Context, req *argonv1.InitRequest) (*argonv1.InitResponse, error)
	Join(ctx context.Context, req *argonv1.JoinRequest) (*argonv1.JoinResponse, error)
	// Introduce hears from another server where it is.
	Introduce(who Caller, req *argonv1.IntroduceRequest) (*argonv1.IntroduceResponse, error)
	// Meet leads this server to others of its cluster, and them to it.
	Meet(ctx context.Context, addresses []string) ([]*argonv1.Whereabouts, error)
	// Readdress has others reach this server at another address, soon.
	Readdress(ctx context.Context, address string) error
	Version() string
	// LogDir is where this server keeps its log; see package logfile.
	LogDir() string
}

// Parts are what the handlers of a cluster's member work with.
type Parts struct {
	ServerID string
	Store    *catalog.Store
	// View must be running.
	View     *catalog.View
	Members  Members
	Images   ImageStore
	Volumes  Volumes
	Consoles Consoles
	Guests   Guests
	Peers    Peers
	Now      func() time.Time
	Log      *slog.Logger
}

// Members lets servers and administrators in.
type Members interface {
	Admit(ctx context.Context, req *argonv1.AdmitRequest) (*argonv1.AdmitResponse, error)
	CreateToken(ctx context.Context, servers uint32, ttl time.Duration) (token string, record *argonv1.Token, err error)
	// CheckToken says why a token lets nobody join.
	CheckToken(ctx context.Context, token string) error
	// KeyPin is the SHA-256 of this server's public key, in base64.
	KeyPin() string
	ListTokens(ctx context.Context) ([]*argonv1.Token, error)
	DeleteToken(ctx context.Context, id string) error
	IssueClient(ctx context.Context, name string, request []byte, ttl time.Duration, by string) (certificatePEM string, err error)
	// Backup hands over a copy of the catalog, with the cluster's keys.
	Backup(ctx context.Context, send func([]byte) error) error
	// LeaderID is the server that the controller runs on; empty: none known.
	LeaderID(ctx context.Context) string
	// CatalogLoad is how large the catalog is, and may become.
	CatalogLoad(ctx context.Context) (*argonv1.CatalogLoad, error)
}

// ImageStore keeps the images of this server; see image.Store.
type ImageStore interface {
	Import(ctx context.Context, id string, r image.Request, progress func(image.Progress)) (*image.Staged, error)
	Pack(ctx context.Context, format image.Format, about image.Description, disks []image.Source, progress func(image.Progress)) (*image.Packed, error)
	Send(ctx context.Context, id string, send func(off int64, data []byte) error) error
	Open(id string) (*os.File, error)
	Receive(ctx context.Context, r image.Request, progress func(image.Progress)) (*image.Given, error)
	Spool() (*os.File, error)
	QCOW2(ctx context.Context, size int64, fill func(*os.File) error, progress func(image.Progress)) (*os.File, error)
}

// Volumes attaches volumes on this server, and asks replicas about themselves.
type Volumes interface {
	// Connect attaches a volume here for a user. Errors say who holds it.
	Connect(ctx context.Context, volumeID string) (Connection, error)
	// Inspect asks a replica, on any server, what it is.
	Inspect(ctx context.Context, v *argonv1.Volume, r *argonv1.Replica) (ReplicaFacts, error)
	// OpenSnapshot opens what a replica on this server has of a snapshot.
	OpenSnapshot(volumeID string, replicaID, snapshotID uint32) (SnapshotView, error)
}

// SnapshotView is a snapshot as one replica has it. It may end before it is
// closed, when the snapshot is removed.
type SnapshotView interface {
	stream.Snapshot
	Close() error
}

// Connection is a volume that is attached here for a user.
type Connection interface {
	URI() string
	// Device is the volume itself.
	Device() volume.Device
	// Done is closed when the attachment is over by itself; Err says why.
	Done() <-chan struct{}
	Err() error
	// Close gives the connection back.
	Close()
}

// ReplicaFacts are what a replica says of itself.
type ReplicaFacts struct {
	Incarnation uint64
	// Sealed is the highest epoch it has seen.
	Sealed uint64
	// Whole: no copy to it was begun and not ended, and no write failed.
	Whole bool
}

// Consoles opens the serial consoles of guests on this server.
type Consoles interface {
	// Open fails with fs.ErrNotExist when the machine has no guest here.
	Open(ctx context.Context, machineID string) (io.ReadWriteCloser, error)
	// Kept is what the machine's last guest here printed last. It fails with
	// fs.ErrNotExist when there was none.
	Kept(machineID string) ([]byte, error)
}

// Guests are those on this server, by their machine. All fail with
// fs.ErrNotExist when the machine has none here. See hypervisor.Guest.
type Guests interface {
	Display(ctx context.Context, machineID string) (io.ReadWriteCloser, error)
	Screenshot(ctx context.Context, machineID string) ([]byte, error)
	Freeze(ctx context.Context, machineID string) error
	Thaw(ctx context.Context, machineID string) error
	Reset(ctx context.Context, machineID string) error
}

// Peers reaches the API of other servers.
type Peers interface {
	Machines(serverID string) (argonv1connect.MachineServiceClient, error)
	Volumes(serverID string) (argonv1connect.VolumeServiceClient, error)
	Servers(serverID string) (argonv1connect.ServerServiceClient, error)
}
