package catalog

import (
	clientv3 "go.etcd.io/etcd/client/v3"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// RenameMachine adds a changed machine that has another name than it was read with:
// what was its name is free from then on. ErrExists if the new one is taken.
func (x *Txn) RenameMachine(m *argonv1.Machine, was string) *Txn {
	x.add(m, putting)
	if x.err != nil {
		return x
	}
	t := x.store.Machines.traits
	c := &x.changes[len(x.changes)-1]
	id, from, to := t.id(m), t.nameKey(was), t.nameKey(t.name(m))
	c.guards[len(c.guards)-1] = guard{key: from, value: id, refused: renamed}
	c.guards = append(c.guards, guard{key: to, refused: taken})
	c.ops = append(c.ops, clientv3.OpDelete(from), clientv3.OpPut(to, id))
	return x
}
