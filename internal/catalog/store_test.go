package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
)

func TestSchema(t *testing.T) {
	s, cli := newStore(t)
	ctx := t.Context()
	if _, err := catalog.Open(ctx, cli); err != nil {
		t.Errorf("Open: %v", err)
	}
	if _, err := catalog.Create(ctx, cli, &argonv1.Cluster{}); !errors.Is(err, catalog.ErrExists) {
		t.Errorf("a second Create: %v, want ErrExists", err)
	}
	if c, err := s.Cluster(ctx); err != nil || c.GetId() != "c" || c.GetSchemaVersion() != catalog.SchemaVersion {
		t.Errorf("Cluster = %v, %v", c, err)
	}
	m := made(t, s, "m")
	for _, tc := range []struct {
		version, says string
	}{
		{"2", "catalog: the catalog's layout is not known to this argon: it has version 2 and this program knows up to 1; install the newer argon on this server"},
		{"0", "catalog: the catalog's layout is not known to this argon: it has version 0 and this program needs 1; install the older argon on this server"},
		{"x", `catalog: the catalog's layout is not known to this argon: its version is "x", which is none; restore a backup`},
	} {
		if _, err := cli.Put(ctx, "/argon/schema", tc.version); err != nil {
			t.Fatal(err)
		}
		if _, err := catalog.Open(ctx, cli); !errors.Is(err, catalog.ErrSchema) || err.Error() != tc.says {
			t.Errorf("Open of version %q: %v, want %s", tc.version, err, tc.says)
		}
		// A store that was opened before writes nothing any more.
		if err := s.Machines.Put(ctx, m); !errors.Is(err, catalog.ErrSchema) || err.Error() != tc.says {
			t.Errorf("Put into version %q: %v, want %s", tc.version, err, tc.says)
		}
	}
	if _, err := cli.Delete(ctx, "/argon/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	if _, err := catalog.Open(ctx, cli); !errors.Is(err, catalog.ErrNoCluster) {
		t.Errorf("Open of nothing: %v, want ErrNoCluster", err)
	}
	if err := s.Machines.Create(ctx, machine("n")); !errors.Is(err, catalog.ErrNoCluster) {
		t.Errorf("Create in nothing: %v, want ErrNoCluster", err)
	}
	if _, err := s.Cluster(ctx); !errors.Is(err, catalog.ErrNoCluster) {
		t.Errorf("Cluster of nothing: %v, want ErrNoCluster", err)
	}
}

func TestSecrets(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	if _, err := s.GetSecret(ctx, "k"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("GetSecret of nothing: %v, want ErrNotFound", err)
	}
	if err := s.PutSecret(ctx, "k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	if err := s.PutSecret(ctx, "k", []byte("w")); !errors.Is(err, catalog.ErrExists) {
		t.Errorf("a secret twice: %v, want ErrExists", err)
	}
	if got, err := s.GetSecret(ctx, "k"); err != nil || string(got) != "v" {
		t.Errorf("GetSecret = %q, %v", got, err)
	}
}

func TestVolumeStatus(t *testing.T) {
	s, _ := newStore(t)
	v := runView(t, s)
	ctx := t.Context()
	show := func() *argonv1.VolumeStatus { return synced(t, v).VolumeStatus["v"] }
	for _, condition := range []string{"waiting", "serving"} {
		if err := s.PutVolumeStatus(ctx, &argonv1.VolumeStatus{VolumeId: "v", Condition: condition}); err != nil {
			t.Fatal(err)
		}
		if got := show().GetCondition(); got != condition {
			t.Errorf("the view shows %q, want %q", got, condition)
		}
	}
	for range 2 { // forgetting what is forgotten is fine
		if err := s.DeleteVolumeStatus(ctx, "v"); err != nil {
			t.Fatal(err)
		}
	}
	if got := show(); got != nil {
		t.Errorf("the view still shows %v", got)
	}
	if err := s.PutVolumeStatus(ctx, &argonv1.VolumeStatus{}); err == nil {
		t.Error("a status of no volume was taken")
	}
}

func TestUsage(t *testing.T) {
	s, _ := newStore(t)
	v := runView(t, s)
	ctx := t.Context()
	if err := s.PutUsage(ctx, &argonv1.Usage{ServerId: "s", ImagesBytes: 7}); err != nil {
		t.Fatal(err)
	}
	if got := synced(t, v).Usage["s"].GetImagesBytes(); got != 7 {
		t.Errorf("the view shows %d, want 7", got)
	}
	if err := s.DeleteUsage(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	if got := synced(t, v).Usage; len(got) != 0 {
		t.Errorf("the view still shows %v", got)
	}
}

func TestLeases(t *testing.T) {
	s, cli := newStore(t)
	v := runView(t, s)
	ctx := t.Context()
	grant := func() clientv3.LeaseID {
		lease, err := cli.Grant(ctx, 60)
		if err != nil {
			t.Fatal(err)
		}
		return lease.ID
	}
	put := func(id clientv3.LeaseID, run string) {
		if err := s.PutLease(ctx, id, &argonv1.Lease{ServerId: "a", RunId: run}); err != nil {
			t.Fatal(err)
		}
		if got := synced(t, v).Leases["a"]; got.GetRunId() != run {
			t.Errorf("the view shows the lease %v, want that of %s", got, run)
		}
	}
	end := func(id clientv3.LeaseID) {
		if _, err := cli.Revoke(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	first, second := grant(), grant()
	put(first, "first")
	put(second, "second")
	end(first)
	if synced(t, v).Leases["a"] == nil {
		t.Error("the end of an old run's lease took the new run's with it")
	}
	end(second)
	if got := synced(t, v).Leases["a"]; got != nil {
		t.Errorf("the lease has ended and shows %v", got)
	}
	if err := s.PutLease(ctx, second, &argonv1.Lease{ServerId: "a"}); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		t.Errorf("PutLease with a lease that has ended: %v, want ErrLeaseNotFound", err)
	}
}

func TestUnavailable(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{context.DeadlineExceeded, true},
		{rpctypes.ErrNoLeader, true},
		{rpctypes.ErrTimeout, true},
		{rpctypes.ErrTimeoutDueToLeaderFail, true},
		{status.Error(codes.Unavailable, "connection refused"), true},
		{nil, false},
		{context.Canceled, false},
		{rpctypes.ErrCompacted, false},
		{catalog.ErrConflict, false},
		{errors.New("other"), false},
	} {
		if got := catalog.Unavailable(fmt.Errorf("wrapped: %w", tc.err)); got != tc.want {
			t.Errorf("Unavailable(%v) = %v", tc.err, got)
		}
	}
}

// TestEtcdIsAway: requests fail in time, say so, and work again later.
func TestEtcdIsAway(t *testing.T) {
	etcd, cli := catalogtest.StartEtcd(t)
	s := create(t, cli)
	m := made(t, s, "m")
	etcd.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := s.Machines.Get(ctx, m.GetMeta().GetId()); !catalog.Unavailable(err) {
		t.Errorf("Get without etcd: %v, want one that is Unavailable", err)
	}
	if err := s.Machines.Put(ctx, m); !catalog.Unavailable(err) {
		t.Errorf("Put without etcd: %v, want one that is Unavailable", err)
	}
	etcd.Start()
	if err := s.Machines.Put(t.Context(), m); err != nil {
		t.Errorf("Put with etcd back: %v", err)
	}
}

// Of two who change the record about the whole at once, each finds the other's
// change.
func TestChangeCluster(t *testing.T) {
	s, _ := newStore(t)
	interfered := false
	c, err := s.ChangeCluster(t.Context(), func(c *argonv1.Cluster) {
		if !interfered {
			interfered = true
			_, err := s.ChangeCluster(t.Context(), func(c *argonv1.Cluster) { c.Settings = &argonv1.Settings{LeaseSeconds: 5} })
			if err != nil {
				t.Error(err)
			}
		}
		c.Name = "office"
	})
	if err != nil || c.GetName() != "office" || c.GetSettings().GetLeaseSeconds() != 5 || c.GetId() != "c" {
		t.Errorf("%v, %v", c, err)
	}
	if is, err := s.Cluster(t.Context()); err != nil || is.GetName() != "office" || is.GetSettings().GetLeaseSeconds() != 5 {
		t.Errorf("read again: %v, %v", is, err)
	}
}
