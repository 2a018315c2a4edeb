package catalog

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// Txn is a change of several records, of any kind, all or none. Not safe for
// concurrent use. Each record may be in it once.
//
// It takes records as they are when they are added, and reads them only: those
// of a View's State can be put without a copy, which says that nothing may
// have changed them. Only Create fills the record's id and time of creation.
// The new revisions are learned by reading the records again.
//
// etcd takes 2048 operations at once as internal/cluster runs it, which are
// 1,000 records.
type Txn struct {
	store   *Store
	changes []change
	err     error
}

// Txn begins a transaction.
func (s *Store) Txn() *Txn { return &Txn{store: s} }

// Create adds a new record; see Table.Create.
func (x *Txn) Create(r Record) *Txn { return x.add(r, creating) }

// Put adds a changed record; see Table.Put.
func (x *Txn) Put(r Record) *Txn { return x.add(r, putting) }

// Delete adds a record to delete; see Table.Delete.
func (x *Txn) Delete(r Record) *Txn { return x.add(r, deleting) }

// Empty tells whether there is nothing to commit.
func (x *Txn) Empty() bool { return len(x.changes) == 0 && x.err == nil }

// Commit carries everything out, or nothing. ErrExists, ErrConflict and
// ErrNotFound name the record that stood in the way. One transaction can be
// committed once.
func (x *Txn) Commit(ctx context.Context) error {
	if x.err != nil || len(x.changes) == 0 {
		return x.err
	}
	_, err := commit(ctx, x.store.etcd, x.changes)
	return err
}

func (x *Txn) add(r Record, v verb) *Txn {
	c, err := x.store.change(r, v)
	for _, other := range x.changes {
		if err == nil && other.key == c.key {
			err = fmt.Errorf("catalog: %s is twice in one transaction", c.what)
		}
	}
	if err != nil && x.err == nil {
		x.err = err
	}
	x.changes = append(x.changes, c)
	return x
}

// change finds the table of a record.
func (s *Store) change(r Record, v verb) (change, error) {
	switch r := r.(type) {
	case *argonv1.Server:
		return s.Servers.change(r, v)
	case *argonv1.Image:
		return s.Images.change(r, v)
	case *argonv1.Volume:
		return s.Volumes.change(r, v)
	case *argonv1.Machine:
		return s.Machines.change(r, v)
	case *argonv1.Token:
		return s.Tokens.change(r, v)
	case *argonv1.Checkpoint:
		return s.Checkpoints.change(r, v)
	}
	return change{}, fmt.Errorf("catalog: %T cannot be part of a transaction", r)
}

// verb is what happens to a record.
type verb uint8

const (
	creating verb = iota
	putting
	deleting
)

// change is one record's part of a transaction.
type change struct {
	what   string // for errors
	key    string
	record Record // nil if it is of no table
	verb   verb
	// grows: it makes the catalog larger, which a full one refuses.
	grows  bool
	part   part
	guards []guard
	ops    []clientv3.Op
}

// guard is a condition on one key.
type guard struct {
	key string
	// revision is that of the key's last change; 0: there is no such key.
	revision int64
	// value, where it is given, is compared instead of the revision.
	value string
	// present: there must be such a key, whatever its revision and its value,
	// which may be long.
	present bool
	// refused says what it means that found is there instead; nil: nothing.
	refused func(found *mvccpb.KeyValue) error
}

func (g guard) compare() clientv3.Cmp {
	switch {
	case g.present:
		return clientv3.Compare(clientv3.ModRevision(g.key), ">", 0)
	case g.value != "":
		return clientv3.Compare(clientv3.Value(g.key), "=", g.value)
	}
	return clientv3.Compare(clientv3.ModRevision(g.key), "=", g.revision)
}

// read finds out why compare did not hold.
func (g guard) read() clientv3.Op {
	if g.present {
		return clientv3.OpGet(g.key, clientv3.WithKeysOnly())
	}
	return clientv3.OpGet(g.key)
}

// holds is what compare tells etcd, for a key that was read.
func (g guard) holds(found *mvccpb.KeyValue) bool {
	switch {
	case g.present:
		return found != nil
	case g.value != "":
		return found != nil && string(found.Value) == g.value
	}
	return found.GetModRevision() == g.revision
}

func taken(*mvccpb.KeyValue) error { return ErrExists }

func changed(found *mvccpb.KeyValue) error {
	if found == nil {
		return ErrNotFound
	}
	return ErrConflict
}

func renamed(*mvccpb.KeyValue) error { return errors.New("a name cannot be changed") }

// ofSchema keeps a program that was overtaken by a newer one from writing
// what the newer one does not expect.
func ofSchema() guard {
	return guard{key: schemaKey, value: strconv.Itoa(SchemaVersion), refused: func(found *mvccpb.KeyValue) error {
		if found == nil {
			return errNoCluster()
		}
		return checkSchema(string(found.Value))
	}}
}

// change says what a verb does to a record, and under which conditions.
func (t traits[T]) change(r T, v verb) (change, error) {
	if v == creating {
		t.prepare(r)
	}
	if err := t.check(r); err != nil {
		return change{}, err
	}
	value, apart, err := t.encode(r)
	if err != nil {
		return change{}, err
	}
	c := change{what: t.describe(r), key: t.key(t.id(r)), record: r, verb: v, grows: v == creating, part: apart}
	switch {
	case v == creating:
		c.guards = []guard{{key: c.key, refused: taken}}
	case t.revision(r) == 0: // as a guard this would mean that there is none
		return change{}, fmt.Errorf("catalog: %s is written without having been read", c.what)
	default:
		c.guards = []guard{{key: c.key, revision: t.revision(r), refused: changed}}
	}
	if v == deleting {
		c.ops = []clientv3.Op{clientv3.OpDelete(c.key)}
	} else {
		c.ops = []clientv3.Op{clientv3.OpPut(c.key, value)}
	}
	if t.name != nil {
		t.changeName(&c, r, v)
	}
	return c, nil
}

// changeName adds what happens to the key that makes the record's name unique.
func (t traits[T]) changeName(c *change, r T, v verb) {
	key := t.nameKey(t.name(r))
	switch v {
	case creating:
		c.guards = append(c.guards, guard{key: key, refused: taken})
		c.ops = append(c.ops, clientv3.OpPut(key, t.id(r)))
	case putting:
		c.guards = append(c.guards, guard{key: key, value: t.id(r), refused: renamed})
	case deleting:
		c.guards = append(c.guards, guard{key: key, value: t.id(r), refused: renamed})
		c.ops = append(c.ops, clientv3.OpDelete(key))
	}
}

// commit carries changes out, all or none, and returns the revision.
func commit(ctx context.Context, e etcd, changes []change) (int64, error) {
	apart := partsOf(changes)
	common := []guard{ofSchema()}
	if grows(changes, apart) {
		common = append(common, hasRoom())
	}
	// Those that are apart last: what else stands in the way says more.
	all := append([]change{{what: changes[0].what, guards: common}}, changes...)
	all = append(all, change{what: changes[0].what, guards: apart.guards(), ops: apart.ops})
	var guards []clientv3.Cmp
	var reads, ops []clientv3.Op // reads are to say what stood in the way
	for _, c := range all {
		for _, g := range c.guards {
			guards, reads = append(guards, g.compare()), append(reads, g.read())
		}
		ops = append(ops, c.ops...)
	}
	res, err := e.Txn(ctx, guards, ops, reads)
	if errors.Is(err, rpctypes.ErrNoSpace) {
		return 0, fmt.Errorf("%s: %w", changes[0].what, errFull())
	}
	if err != nil {
		return 0, fmt.Errorf("catalog: write %s: %w", changes[0].what, err)
	}
	if !res.Succeeded {
		found := make([]*mvccpb.KeyValue, len(res.Responses))
		for i, r := range res.Responses {
			if kvs := r.GetResponseRange().GetKvs(); len(kvs) > 0 {
				found[i] = kvs[0]
			}
		}
		return 0, blame(all, found)
	}
	for _, id := range apart.left {
		// What can't be deleted now is swept later.
		_ = dropContent(ctx, e, id)
	}
	return res.Header.Revision, nil
}

// blame finds the guard that did not hold. found is what the transaction read
// at the keys of the guards: nil for those that there are not.
func blame(changes []change, found []*mvccpb.KeyValue) error {
	for _, c := range changes {
		for i, g := range c.guards {
			if g.holds(found[i]) {
				continue
			}
			err := g.refused(found[i])
			if errors.Is(err, ErrSchema) || errors.Is(err, ErrNoCluster) {
				return err
			}
			return fmt.Errorf("%s: %w", c.what, err)
		}
		found = found[len(c.guards):]
	}
	return fmt.Errorf("%s: %w", changes[0].what, ErrConflict)
}
