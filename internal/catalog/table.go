package catalog

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// Errors that callers decide by.
var (
	ErrNotFound = errors.New("not found")
	// ErrExists: the id or the name is taken.
	ErrExists = errors.New("exists already")
	// ErrConflict: the record was changed by somebody else since it was read.
	ErrConflict = errors.New("changed by somebody else at the same time")
	// ErrUnchanged, returned by Update's function, ends it without a write
	// and without an error.
	ErrUnchanged = errors.New("unchanged")
)

// NewID makes a new id: a ULID, so that ids sort by time.
func NewID() string { return ulid.Make().String() }

// Record is a kind of record that a Table can hold.
type Record interface{ proto.Message }

// traits tell how a kind of record carries its head.
type traits[T Record] struct {
	kind  string
	fresh func() T
	id    func(T) string
	// name is nil for kinds without names.
	name func(T) string
	// prepare fills what a new record lacks: its id and the time.
	prepare     func(T)
	revision    func(T) int64
	setRevision func(T, int64)
}

// Table is all records of one kind. Safe for concurrent use. Records that it
// returns belong to the caller.
type Table[T Record] struct {
	cli *clientv3.Client
	traits[T]
}

func named[T interface {
	Record
	GetMeta() *argonv1.Meta
}](kind string, fresh func() T, meta func(T) **argonv1.Meta) traits[T] {
	return traits[T]{
		kind:  kind,
		fresh: fresh,
		id:    func(r T) string { return r.GetMeta().GetId() },
		name:  func(r T) string { return r.GetMeta().GetName() },
		prepare: func(r T) {
			m := meta(r)
			if *m == nil {
				*m = &argonv1.Meta{}
			}
			if (*m).Id == "" {
				(*m).Id = NewID()
			}
			if (*m).Created == nil {
				(*m).Created = timestamppb.Now()
			}
		},
		revision: func(r T) int64 { return r.GetMeta().GetRevision() },
		setRevision: func(r T, rev int64) {
			if m := meta(r); *m != nil {
				(*m).Revision = rev
			}
		},
	}
}

func (t *Table[T]) prefix() string       { return prefix + t.kind + "/" }
func (t *Table[T]) key(id string) string { return t.prefix() + id }

func nameKey(kind, name string) string { return prefix + "names/" + kind + "/" + name }

// decode makes a record of what etcd holds.
func (t *Table[T]) decode(value []byte, modRevision int64) (T, error) {
	r := t.fresh()
	if err := proto.Unmarshal(value, r); err != nil {
		return r, fmt.Errorf("catalog: a %s record is damaged: %w", t.kind, err)
	}
	t.setRevision(r, modRevision)
	return r, nil
}

// encode makes what etcd holds; the revision is etcd's own and not stored.
func (t *Table[T]) encode(r T) (string, error) {
	stored := proto.CloneOf(r)
	t.setRevision(stored, 0)
	b, err := proto.Marshal(stored)
	if err != nil {
		return "", fmt.Errorf("catalog: encode a %s record: %w", t.kind, err)
	}
	return string(b), nil
}

// Get reads a record by its id.
func (t *Table[T]) Get(ctx context.Context, id string) (T, error) {
	var none T
	res, err := t.cli.Get(ctx, t.key(id))
	if err != nil {
		return none, fmt.Errorf("catalog: read %s %s: %w", t.kind, id, err)
	}
	if len(res.Kvs) == 0 {
		return none, fmt.Errorf("%s %s: %w", t.kind, id, ErrNotFound)
	}
	return t.decode(res.Kvs[0].Value, res.Kvs[0].ModRevision)
}

// ByName reads a record by its name.
func (t *Table[T]) ByName(ctx context.Context, name string) (T, error) {
	var none T
	res, err := t.cli.Get(ctx, nameKey(t.kind, name))
	if err != nil {
		return none, fmt.Errorf("catalog: read %s %q: %w", t.kind, name, err)
	}
	if len(res.Kvs) == 0 {
		return none, fmt.Errorf("%s %q: %w", t.kind, name, ErrNotFound)
	}
	r, err := t.Get(ctx, string(res.Kvs[0].Value))
	if errors.Is(err, ErrNotFound) { // it went in between
		return none, fmt.Errorf("%s %q: %w", t.kind, name, ErrNotFound)
	}
	return r, err
}

// List reads all records, by id, oldest first.
func (t *Table[T]) List(ctx context.Context) ([]T, error) {
	res, err := t.cli.Get(ctx, t.prefix(), clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("catalog: list every %s: %w", t.kind, err)
	}
	records := make([]T, 0, len(res.Kvs))
	for _, kv := range res.Kvs {
		r, err := t.decode(kv.Value, kv.ModRevision)
		if err != nil {
			return nil, err
		}
		records = append(records, r)
	}
	return records, nil
}

// Create writes a new record. It fills the id and the time of creation where
// they are empty, and the revision. ErrExists if the id or the name is taken.
func (t *Table[T]) Create(ctx context.Context, r T) error {
	return t.commit(ctx, r, t.create)
}

// Put writes a record that was read before, if nobody changed it since;
// otherwise ErrConflict. It sets the new revision. Names cannot be changed.
func (t *Table[T]) Put(ctx context.Context, r T) error {
	return t.commit(ctx, r, t.put)
}

// Delete deletes a record that was read before, if nobody changed it since;
// otherwise ErrConflict. Its name is free again.
func (t *Table[T]) Delete(ctx context.Context, r T) error {
	return t.commit(ctx, r, t.remove)
}

func (t *Table[T]) commit(ctx context.Context, r T, how func(T) (change, error)) error {
	c, err := how(r)
	if err != nil {
		return err
	}
	return commit(ctx, t.cli, []change{c})
}

// Update reads a record, lets change alter it and writes it back; when somebody
// else was faster it begins again. change may return ErrUnchanged to write
// nothing, or any other error to stop. It returns the record as it now is.
func (t *Table[T]) Update(ctx context.Context, id string, change func(T) error) (T, error) {
	for {
		r, err := t.Get(ctx, id)
		if err != nil {
			return r, err
		}
		if err := change(r); err != nil {
			if errors.Is(err, ErrUnchanged) {
				return r, nil
			}
			return r, err
		}
		err = t.Put(ctx, r)
		if errors.Is(err, ErrConflict) {
			continue
		}
		return r, err
	}
}

// change is one record's part of a transaction.
type change struct {
	what    string // for errors
	guards  []clientv3.Cmp
	ops     []clientv3.Op
	refused error // what it means that the guards do not hold
	done    func(revision int64)
}

func (t *Table[T]) create(r T) (change, error) {
	t.prepare(r)
	value, err := t.encode(r)
	if err != nil {
		return change{}, err
	}
	key := t.key(t.id(r))
	c := change{
		what:    t.describe(r),
		guards:  []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(key), "=", 0)},
		ops:     []clientv3.Op{clientv3.OpPut(key, value)},
		refused: ErrExists,
		done:    func(rev int64) { t.setRevision(r, rev) },
	}
	if t.name != nil {
		if t.name(r) == "" || strings.Contains(t.name(r), "/") {
			return change{}, fmt.Errorf("%s: %q is no name", t.kind, t.name(r))
		}
		nk := nameKey(t.kind, t.name(r))
		c.guards = append(c.guards, clientv3.Compare(clientv3.CreateRevision(nk), "=", 0))
		c.ops = append(c.ops, clientv3.OpPut(nk, t.id(r)))
	}
	return c, nil
}

func (t *Table[T]) put(r T) (change, error) {
	value, err := t.encode(r)
	if err != nil {
		return change{}, err
	}
	key := t.key(t.id(r))
	return change{
		what:    t.describe(r),
		guards:  t.unchanged(r),
		ops:     []clientv3.Op{clientv3.OpPut(key, value)},
		refused: ErrConflict,
		done:    func(rev int64) { t.setRevision(r, rev) },
	}, nil
}

func (t *Table[T]) remove(r T) (change, error) {
	c := change{
		what:    t.describe(r),
		guards:  t.unchanged(r),
		ops:     []clientv3.Op{clientv3.OpDelete(t.key(t.id(r)))},
		refused: ErrConflict,
		done:    func(int64) {},
	}
	if t.name != nil {
		c.ops = append(c.ops, clientv3.OpDelete(nameKey(t.kind, t.name(r))))
	}
	return c, nil
}

func (t *Table[T]) unchanged(r T) []clientv3.Cmp {
	return []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(t.key(t.id(r))), "=", t.revision(r))}
}

func (t *Table[T]) describe(r T) string {
	if t.name != nil {
		return fmt.Sprintf("%s %q", t.kind, t.name(r))
	}
	return t.kind + " " + t.id(r)
}

// commit carries changes out, all or none.
func commit(ctx context.Context, cli *clientv3.Client, changes []change) error {
	var guards []clientv3.Cmp
	var ops []clientv3.Op
	for _, c := range changes {
		guards = append(guards, c.guards...)
		ops = append(ops, c.ops...)
	}
	res, err := cli.Txn(ctx).If(guards...).Then(ops...).Commit()
	if err != nil {
		return fmt.Errorf("catalog: write %s: %w", changes[0].what, err)
	}
	if !res.Succeeded {
		return blame(ctx, cli, changes)
	}
	for _, c := range changes {
		c.done(res.Header.Revision)
	}
	return nil
}

// blame finds which change was refused, to say so.
func blame(ctx context.Context, cli *clientv3.Client, changes []change) error {
	for _, c := range changes {
		res, err := cli.Txn(ctx).If(c.guards...).Commit()
		if err != nil {
			return fmt.Errorf("catalog: write %s: %w", c.what, err)
		}
		if !res.Succeeded {
			return fmt.Errorf("%s: %w", c.what, c.refused)
		}
	}
	return fmt.Errorf("%s: %w", changes[0].what, ErrConflict)
}

// Txn is a change of several records, of any kind, all or none. Not safe for
// concurrent use. Each record may be in it once.
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

// Commit carries everything out, or nothing. ErrExists and ErrConflict name
// the record that stood in the way.
func (x *Txn) Commit(ctx context.Context) error {
	if x.err != nil || len(x.changes) == 0 {
		return x.err
	}
	return commit(ctx, x.store.cli, x.changes)
}

type verb uint8

const (
	creating verb = iota
	putting
	deleting
)

func (x *Txn) add(r Record, v verb) *Txn {
	var c change
	var err error
	switch r := r.(type) {
	case *argonv1.Server:
		c, err = planned(x.store.Servers, r, v)
	case *argonv1.Image:
		c, err = planned(x.store.Images, r, v)
	case *argonv1.Volume:
		c, err = planned(x.store.Volumes, r, v)
	case *argonv1.Machine:
		c, err = planned(x.store.Machines, r, v)
	case *argonv1.Token:
		c, err = planned(x.store.Tokens, r, v)
	default:
		err = fmt.Errorf("catalog: no table for %T", r)
	}
	if err != nil && x.err == nil {
		x.err = err
	}
	x.changes = append(x.changes, c)
	return x
}

func planned[T Record](t *Table[T], r T, v verb) (change, error) {
	switch v {
	case creating:
		return t.create(r)
	case putting:
		return t.put(r)
	default:
		return t.remove(r)
	}
}

// newest keeps the last n.
func newest[T any](list []T, n int) []T {
	if n > 0 && len(list) > n {
		return slices.Clone(list[len(list)-n:])
	}
	return list
}

// eventTTL is how long an event is kept.
const eventTTL = 7 * 24 * time.Hour
