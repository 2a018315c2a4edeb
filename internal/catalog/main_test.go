package catalog_test

import (
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newStore(t testing.TB) (*catalog.Store, *clientv3.Client) {
	t.Helper()
	cli := catalogtest.Start(t)
	return create(t, cli), cli
}

func create(t testing.TB, cli *clientv3.Client) *catalog.Store {
	t.Helper()
	s, err := catalog.Create(t.Context(), cli, &argonv1.Cluster{Id: "c"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func machine(name string) *argonv1.Machine {
	return &argonv1.Machine{Meta: &argonv1.Meta{Name: name}, Cpus: 1}
}

// made is a machine in the catalog.
func made(t testing.TB, s *catalog.Store, name string) *argonv1.Machine {
	t.Helper()
	m := machine(name)
	if err := s.Machines.Create(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	return m
}
