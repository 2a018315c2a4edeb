package soak

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/argon-cluster/argon/internal/devcluster"
)

const (
	// commandWithin bounds a command; servers fail meanwhile.
	commandWithin = time.Minute
	maxSnapshots  = 4 // of one volume
	growBy        = 8 << 20
	maxSize       = 2 * volumeSize
)

// operator takes snapshots of volumes in use, looks whether they hold what they
// must, deletes them, rolls the volumes back to them, and lets these grow and be
// scrubbed. Commands may fail while servers do.
type operator struct {
	w         *world
	rng       *rand.Rand
	snapshots map[*job]map[string]*Picture
	// left are clones that could not be removed yet, or may have been made.
	left  []string
	named int
	done  map[string]int
}

func newOperator(w *world) *operator {
	o := &operator{
		w: w, rng: rand.New(rand.NewPCG(w.seed, 2)),
		snapshots: make(map[*job]map[string]*Picture), done: make(map[string]int),
	}
	for _, j := range w.jobs {
		o.snapshots[j] = make(map[string]*Picture)
	}
	return o
}

// run does one thing after the other.
func (o *operator) run(ctx context.Context) {
	for sleep(ctx, time.Duration(500+o.rng.IntN(4000))*time.Millisecond) {
		o.clean(ctx)
		j := o.w.jobs[o.rng.IntN(len(o.w.jobs))]
		what, do := o.choose(j)
		err := do(ctx, j)
		switch {
		case err == nil:
			o.done[what]++
		case errors.Is(err, ErrWrong):
			o.w.T.Errorf("%s of %s: %v", what, j.name, err)
			return
		default:
			o.done[what+" failed"]++
			o.w.say("%s of %s: %v", what, j.name, firstLines(err.Error(), 1))
		}
	}
}

func (o *operator) choose(j *job) (string, func(context.Context, *job) error) {
	n := len(o.snapshots[j])
	switch r := o.rng.IntN(14); {
	case n == 0 || r < 4 && n < maxSnapshots:
		return "snapshot", o.snapshot
	case r < 6:
		return "removal", func(ctx context.Context, j *job) error { return o.remove(ctx, j, o.any(j)) }
	case r < 9:
		return "clone", func(ctx context.Context, j *job) error { return o.clone(ctx, j, o.any(j)) }
	case r < 11:
		return "rollback", func(ctx context.Context, j *job) error { return o.rollBack(ctx, j, o.any(j)) }
	case r < 13:
		return "scrub", o.scrub
	}
	return "growth", o.grow
}

// clean removes clones that are left: as long as there is one, its snapshot can't
// be removed.
func (o *operator) clean(ctx context.Context) {
	o.left = slices.DeleteFunc(o.left, func(name string) bool {
		_, err := o.argon(ctx, "volume", "rm", name)
		return err == nil || gone(err)
	})
}

func (o *operator) any(j *job) string {
	names := slices.Sorted(maps.Keys(o.snapshots[j]))
	return names[o.rng.IntN(len(names))]
}

// argon runs a command on a server that nothing is wrong with, if there is one.
func (o *operator) argon(ctx context.Context, args ...string) (string, error) {
	all := o.w.Servers()
	s := all[o.rng.IntN(len(all))]
	for _, other := range all {
		if o.w.isStruck(s.Name) {
			s = other
		}
	}
	ctx, cancel := context.WithTimeout(ctx, commandWithin)
	defer cancel()
	return s.Exec(ctx, args...)
}

func (o *operator) name(kind string) string {
	o.named++
	return fmt.Sprint(kind, o.named)
}

func (o *operator) snapshot(ctx context.Context, j *job) error {
	name, cuts := o.name("s"), o.w.cuts.Load()
	p := j.ledger.Expose()
	_, err := o.argon(ctx, "snapshot", "create", j.name, name)
	p.Close()
	if err != nil {
		return err
	}
	if o.w.cuts.Load() != cuts {
		p = nil // nobody knows what it may hold
	}
	o.snapshots[j][name] = p
	return nil
}

func (o *operator) remove(ctx context.Context, j *job, name string) error {
	if _, err := o.argon(ctx, "snapshot", "rm", j.name, name); err != nil && !gone(err) {
		return err
	}
	delete(o.snapshots[j], name)
	return nil
}

// gone tells whether what was to be removed is not there, as after a command
// that had no answer.
func gone(err error) bool { return strings.Contains(err.Error(), "there is no ") }

// clone makes a volume of a snapshot, reads it on some server, and removes it.
func (o *operator) clone(ctx context.Context, j *job, name string) error {
	clone := o.name("c")
	o.left = append(o.left, clone) // run removes it
	if _, err := o.argon(ctx, "volume", "create", clone, "--snapshot", j.name+"/"+name); err != nil {
		return err
	}
	all := o.w.Servers()
	return o.look(ctx, all[o.rng.IntN(len(all))], clone, j, name)
}

// rollBack makes a volume that nobody uses what it was in a snapshot. If the
// command fails nobody knows whether that was done.
func (o *operator) rollBack(ctx context.Context, j *job, name string) error {
	p := o.snapshots[j][name]
	if p == nil {
		return nil
	}
	defer j.pause()()
	var err error
	for tries := 0; tries < 20; tries++ {
		if _, err = o.argon(ctx, "snapshot", "rollback", j.name, name); err == nil || !strings.Contains(err.Error(), "in use") {
			break
		}
		sleep(ctx, 500*time.Millisecond) // it is being detached
	}
	if err != nil && strings.Contains(err.Error(), "in use") {
		return err
	}
	p.Restore(err == nil)
	j.fio.pending = false
	return err
}

// scrub compares the replicas: they must be equal, whatever happens.
func (o *operator) scrub(ctx context.Context, j *job) error {
	out, err := o.argon(ctx, "volume", "scrub", j.name, "--wait")
	switch {
	case err != nil && strings.Contains(err.Error(), "nothing tells which copy is right"):
		return fmt.Errorf("%w: %w", ErrWrong, err)
	case err == nil && !strings.Contains(out, ", 0 repaired"):
		return fmt.Errorf("%w: %s", ErrWrong, out)
	}
	return err
}

// look reads the ledger's part of a clone.
func (o *operator) look(ctx context.Context, s *devcluster.Server, clone string, j *job, name string) error {
	ctx, cancel := context.WithTimeout(ctx, commandWithin)
	defer cancel()
	c, err := connect(ctx, s, clone)
	if err != nil {
		return err
	}
	defer c.end()
	client, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer client.Abort()
	defer context.AfterFunc(ctx, client.Abort)()
	data := make([]byte, ledgerSize)
	for off := 0; off < len(data); off += 1 << 20 {
		if _, err := client.ReadAt(data[off:off+1<<20], int64(off)); err != nil {
			return ofConnection(err)
		}
	}
	p := o.snapshots[j][name]
	if p == nil {
		return nil
	}
	if err := p.Check(data); err != nil {
		return fmt.Errorf("%w: snapshot %s, read on %s: %w", ErrWrong, name, s.Name, err)
	}
	return nil
}

func (o *operator) grow(ctx context.Context, j *job) error {
	if j.size >= maxSize {
		return nil
	}
	if _, err := o.argon(ctx, "volume", "resize", j.name, fmt.Sprintf("%dB", j.size+growBy)); err != nil {
		return err
	}
	j.size += growBy
	return nil
}

// check reads every snapshot that is left on each server that has a replica of
// its volume.
func (o *operator) check(ctx context.Context, j *job) error {
	for _, name := range slices.Sorted(maps.Keys(o.snapshots[j])) {
		clone := o.name("c")
		o.w.Argon(o.w.S(1), "volume", "create", clone, "--snapshot", j.name+"/"+name)
		o.w.Healthy(o.w.S(1), clone)
		v, err := o.w.Volume(o.w.S(1), clone)
		if err != nil {
			return err
		}
		for _, r := range v.GetVolume().GetReplicas() {
			s := o.w.ByID(o.w.S(1), r.GetServerId())
			o.w.Eventually(clone+" was read on "+s.Name, func() bool {
				err = o.look(ctx, s, clone, j, name)
				return err == nil || errors.Is(err, ErrWrong)
			})
			if err != nil {
				return err
			}
		}
		// It may still be connected for a moment.
		o.w.Eventually(clone+" can be removed", func() bool {
			_, err := o.argon(ctx, "volume", "rm", clone)
			return err == nil || gone(err)
		})
	}
	return nil
}
