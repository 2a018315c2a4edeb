package catalog

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// ErrFull: the catalog takes nothing that makes it larger.
var ErrFull = errors.New("the catalog is full")

func errFull() error {
	return fmt.Errorf("%w: remove machines, volumes, snapshots, checkpoints or user data that nobody needs, then try again (`argon status` shows its size, and whether a disk is full)", ErrFull)
}

// smallGrowth is by how much, in bytes, a record may grow in a full catalog. What
// is wanted of a thing, such as its removal, takes less. It would take millions of
// such changes to use up what is kept free for them.
const smallGrowth = 64

// SetFull says whether the catalog is full: then it takes no new records, no
// contents, and no change that is limited (Txn.LimitGrowth) and makes a record
// larger.
func (s *Store) SetFull(ctx context.Context, full bool) error {
	var err error
	if full {
		err = s.etcd.Put(ctx, fullKey, "1")
	} else {
		err = s.etcd.Delete(ctx, fullKey)
	}
	if err != nil {
		return fmt.Errorf("catalog: write whether it is full: %w", err)
	}
	return nil
}

// hasRoom is the guard of what makes the catalog larger.
func hasRoom() guard {
	return guard{key: fullKey, refused: func(*mvccpb.KeyValue) error { return errFull() }}
}

// grows reports whether changes make the catalog larger.
func grows(changes []change, p parts) bool {
	for _, c := range changes {
		if c.grows {
			return true
		}
	}
	return len(p.carried) > 0
}

// LimitGrowth makes the transaction fail with ErrFull if the catalog is full
// and a record in it becomes larger than it is in st. Creating a record always
// does. It is for what users ask for, not for what is observed: that goes on. Call
// it when everything has been added.
func (x *Txn) LimitGrowth(st *State) {
	for i, c := range x.changes {
		if c.verb == putting && proto.Size(c.record) > proto.Size(st.find(c.record))+smallGrowth {
			x.changes[i].grows = true
		}
	}
}

// find is the state's record with the id of another one; nil if there is none.
func (st *State) find(r Record) Record {
	switch r := r.(type) {
	case *argonv1.Server:
		return st.Servers[r.GetMeta().GetId()]
	case *argonv1.Image:
		return st.Images[r.GetMeta().GetId()]
	case *argonv1.Volume:
		return st.Volumes[r.GetMeta().GetId()]
	case *argonv1.Machine:
		return st.Machines[r.GetMeta().GetId()]
	case *argonv1.Checkpoint:
		return st.Checkpoints[r.GetMeta().GetId()]
	}
	return r
}
