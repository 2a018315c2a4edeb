package catalog

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/google/uuid"
	"github.com/oklog/ulid/v2"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// Errors that callers decide by. They come wrapped with the record's kind and
// name.
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

// NewGeneration makes what a guest tells a copy of itself by: a random UUID
// (RFC 9562).
func NewGeneration() string { return uuid.NewString() }

// Record is a kind of record that a Table can hold.
type Record interface{ proto.Message }

// Table is all records of one kind. Safe for concurrent use. Records that it
// returns belong to the caller.
//
// An error of etcd in the middle of a write leaves open whether the write
// happened; Unavailable tells such an error.
type Table[T Record] struct {
	etcd etcd
	traits[T]
}

// traits tell how a kind of record carries its head.
type traits[T Record] struct {
	kind string
	// prefix is where the records are; the id follows.
	prefix string
	fresh  func() T
	id     func(T) string
	// name is nil for kinds without names.
	name func(T) string
	// prepare fills what a new record lacks.
	prepare  func(T)
	revision func(T) int64
	// created is the revision that a record was made at; 0 for kinds that do
	// not keep it.
	created func(T) int64
	// setRevisions sets those of the last change and of the creation, where the
	// kind has them.
	setRevisions func(r T, changed, created int64)
	// firstBoot is the part of a record that has what is kept apart from it;
	// nil for kinds without.
	firstBoot func(T) *argonv1.FirstBoot
}

// booting are the traits of a kind that has a first boot.
func (t traits[T]) booting(firstBoot func(T) *argonv1.FirstBoot) traits[T] {
	t.firstBoot = firstBoot
	return t
}

func named[T interface {
	Record
	GetMeta() *argonv1.Meta
}](kind string, fresh func() T, meta func(T) **argonv1.Meta) traits[T] {
	return traits[T]{
		kind:   kind,
		prefix: statePrefix + kind + "/",
		fresh:  fresh,
		id:     func(r T) string { return r.GetMeta().GetId() },
		name:   func(r T) string { return r.GetMeta().GetName() },
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
		created:  func(r T) int64 { return r.GetMeta().GetCreatedRevision() },
		setRevisions: func(r T, changed, created int64) {
			if m := meta(r); *m != nil {
				(*m).Revision, (*m).CreatedRevision = changed, created
			}
		},
	}
}

func (t traits[T]) key(id string) string       { return t.prefix + id }
func (t traits[T]) nameKey(name string) string { return namesPrefix + t.kind + "/" + name }

// decode makes a record of what etcd holds.
func (t traits[T]) decode(kv *mvccpb.KeyValue) (T, error) {
	r := t.fresh()
	if err := proto.Unmarshal(kv.Value, r); err != nil {
		return r, fmt.Errorf("catalog: a %s record is damaged: %w", t.kind, err)
	}
	t.setRevisions(r, kv.ModRevision, kv.CreateRevision)
	return r, nil
}

// encode makes what etcd holds, in the record's key and apart from it; the
// revision is etcd's own and not stored.
func (t traits[T]) encode(r T) (value string, apart part, err error) {
	stored := proto.CloneOf(r)
	t.setRevisions(stored, 0, 0)
	if t.firstBoot != nil {
		if apart, err = setApart(t.firstBoot(stored)); err != nil {
			return "", part{}, err
		}
	}
	b, err := proto.Marshal(stored)
	if err != nil {
		return "", part{}, fmt.Errorf("catalog: encode %s: %w", t.describe(r), err)
	}
	return string(b), apart, nil
}

func (t traits[T]) describe(r T) string {
	if t.name != nil {
		return fmt.Sprintf("%s %q", t.kind, t.name(r))
	}
	return t.kind + " " + t.id(r)
}

// check refuses what would end up under a wrong key.
func (t traits[T]) check(r T) error {
	if id := t.id(r); id == "" || strings.Contains(id, "/") {
		return fmt.Errorf("catalog: a %s with %q for an id", t.kind, id)
	}
	if t.name == nil {
		return nil
	}
	if name := t.name(r); name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("catalog: a %s with %q for a name", t.kind, name)
	}
	return nil
}

// Get reads a record by its id. ErrNotFound.
func (t *Table[T]) Get(ctx context.Context, id string) (T, error) {
	var none T
	res, err := t.etcd.Get(ctx, t.key(id))
	if err != nil {
		return none, fmt.Errorf("catalog: read %s %s: %w", t.kind, id, err)
	}
	if len(res.Kvs) == 0 {
		return none, fmt.Errorf("%s %s: %w", t.kind, id, ErrNotFound)
	}
	return t.decode(res.Kvs[0])
}

// ByName reads a record by its name. ErrNotFound, also for kinds that have no
// names.
func (t *Table[T]) ByName(ctx context.Context, name string) (T, error) {
	var none T
	res, err := t.etcd.Get(ctx, t.nameKey(name))
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

// List reads all records as they were at one instant, by id, oldest first.
func (t *Table[T]) List(ctx context.Context) ([]T, error) {
	res, err := t.etcd.Get(ctx, t.prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("catalog: list every %s: %w", t.kind, err)
	}
	records := make([]T, 0, len(res.Kvs))
	for _, kv := range res.Kvs {
		r, err := t.decode(kv)
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
	return t.write(ctx, r, creating)
}

// Put writes a record that was read before, if nobody changed it since, and
// sets its new revision. ErrConflict, or ErrNotFound when it was deleted. A
// name cannot be changed.
func (t *Table[T]) Put(ctx context.Context, r T) error {
	return t.write(ctx, r, putting)
}

// Delete deletes a record that was read before, if nobody changed it since;
// its name is free again. ErrConflict, or ErrNotFound when it is gone already.
func (t *Table[T]) Delete(ctx context.Context, r T) error {
	return t.write(ctx, r, deleting)
}

func (t *Table[T]) write(ctx context.Context, r T, v verb) error {
	c, err := t.change(r, v)
	if err != nil {
		return err
	}
	revision, err := commit(ctx, t.etcd, []change{c})
	if err != nil {
		return err
	}
	switch v {
	case creating:
		t.setRevisions(r, revision, revision)
	case putting:
		t.setRevisions(r, revision, t.created(r))
	}
	return nil
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
