package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/cluster"
)

// This file: what a server has before it serves, and how it waits for what it lacks.

// ground is what a server stands on. lock keeps others away from its directory.
type ground struct {
	paths     paths
	lock      *os.File
	resources resources
	disk      *disk
	ballast   *ballast
	member    *cluster.Member
	// started is the address that the server was started with; empty if it was
	// left open.
	started string
}

// leastRoom must be free in the server's directory for etcd to start.
const leastRoom = 8 << 20

// stand finds all of it, and waits where it must. The caller closes the lock, also
// after an error.
func stand(ctx context.Context, o *Options) (*ground, error) {
	g := &ground{paths: paths{dir: o.Dir, runDir: o.RunDir}, started: o.Address}
	for _, step := range []func() error{
		g.paths.make,
		func() (err error) { g.lock, err = g.paths.lock(); return err },
		func() (err error) { g.resources, err = findResources(g.paths.volumes()); return err },
		func() (err error) { g.disk, err = openDisk(g.paths, o.Log); return err },
		func() (err error) { g.ballast, err = openBallast(o.Dir, o.Log); return err },
		func() error { return hasRoom(g.ballast) },
		func() (err error) { g.member, err = o.open(g); return err },
		func() error { return g.member.CheckClock() },
	} {
		if err := o.await(ctx, step); err != nil {
			return g, err
		}
	}
	return g, o.placeMember(ctx, g)
}

// hasRoom fails while there is no room to start with, not even what is kept.
func hasRoom(b *ballast) error {
	if err := b.look(); err != nil {
		return err
	}
	free, _, err := roomIn(b.dir)
	if err == nil && free < leastRoom {
		err = fmt.Errorf("the file system of %s has %d MiB free, a server needs %d: free some: %w", b.dir, free>>20, leastRoom>>20, unix.ENOSPC)
	}
	return err
}

// open finds out who this server is.
func (o *Options) open(g *ground) (*cluster.Member, error) {
	capacity, _, err := g.resources.measure()
	if err != nil {
		return nil, err
	}
	return cluster.Open(cluster.Options{
		Dir: o.Dir, Address: o.Address,
		Ports:    cluster.Ports{API: o.APIPort, Data: o.DataPort, Peer: o.PeerPort, Etcd: o.EtcdPort},
		Capacity: capacity, Version: o.Version, NoRoom: g.ballast.Short, Log: o.Log,
	})
}

// placeMember fills in what the options leave open: a member of a cluster has the
// ports that it was made with, and the address that it had last. The address of one
// that is none yet may stay open.
func (o *Options) placeMember(ctx context.Context, g *ground) (err error) {
	if !g.member.Configured() {
		o.APIPort = cmp.Or(o.APIPort, DefaultAPIPort)
		o.DataPort = cmp.Or(o.DataPort, DefaultDataPort)
		o.PeerPort = cmp.Or(o.PeerPort, DefaultPeerPort)
		o.EtcdPort = cmp.Or(o.EtcdPort, DefaultEtcdPort)
		g.member, err = o.open(g)
		return err
	}
	address, ports := g.member.Address()
	o.tell(ctx, false, "waits for its address "+address)
	if o.Address == "" {
		if o.Address, err = cluster.AwaitAddress(ctx, address, o.Log); err != nil {
			return err
		}
		if g.member, err = o.open(g); err != nil {
			return err
		}
		address, ports = g.member.Address()
	} else if err := cluster.AwaitGivenAddress(ctx, o.Address, o.Log); err != nil {
		return err
	}
	o.Address, o.APIPort, o.DataPort, o.PeerPort, o.EtcdPort = address, ports.API, ports.Data, ports.Peer, ports.Etcd
	return nil
}

// awaitPause is between two attempts.
const awaitPause = time.Second

// await tries until it succeeds, or fails as time does not mend, or ctx ends.
func (o *Options) await(ctx context.Context, try func() error) error {
	told := ""
	for {
		err := try()
		if err == nil || !mayPass(err) {
			return err
		}
		if told != err.Error() {
			told = err.Error()
			o.Log.Warn("this server waits until it can start", "for", err)
			o.tell(ctx, false, "waits: "+told)
		}
		select {
		case <-time.After(awaitPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// mayPass reports whether what an error tells of can be over without anything that
// is done to the server: another one is still ending, a disk is full or read-only,
// the clock is not set yet.
func mayPass(err error) bool {
	return slices.ContainsFunc([]error{errInUse, cluster.ErrClock, unix.ENOSPC, unix.EDQUOT, unix.EROFS}, func(one error) bool { return errors.Is(err, one) })
}

// tell tells the service manager.
func (o *Options) tell(ctx context.Context, serving bool, text string) {
	if err := o.Guard.Status(ctx, serving, text); err != nil && ctx.Err() == nil {
		o.Log.Warn("the guard was not told of the server's state", "err", err)
	}
}

// tellCondition tells the service manager that the server serves, and then what it
// waits for. It serves before it has a majority: a host's start must not depend on
// other hosts.
func (s *server) tellCondition(ctx context.Context) error {
	for _, step := range []struct {
		text  string
		until <-chan struct{}
	}{
		{"serves; it is not part of a cluster yet: run `argon init` or `argon join`", s.configured},
		{"serves; " + waitsForMajority, s.ready},
		{"serves its cluster", nil},
	} {
		if step.until != nil && isClosed(step.until) {
			continue
		}
		s.tell(ctx, true, step.text)
		select {
		case <-step.until:
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}
