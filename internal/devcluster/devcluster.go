// Package devcluster runs a cluster of real servers on one machine, for trying
// things out, for the demo, for tests and benchmarks.
//
// What lives here: starting and stopping `argon server` processes with their
// own directories and addresses, and the faults that can be made to them: all
// processes killed or stopped at once, links cut, disks filled, power cut. What must not: anything of
// what a server does; it is driven through its binary and its API only.
package devcluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sync/errgroup"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/cgroup"
)

// Options say what cluster is wanted.
type Options struct {
	// Dir keeps the servers' directories and dev.json. It is made; empty means
	// a new one under the system's temporary directory. At most 39 bytes long,
	// as paths of unix sockets are made from it.
	Dir string
	// Servers is how many; they are called s1 to sN.
	Servers int
	// Witness makes the last of them one that only votes.
	Witness bool
	// Netns puts each server into a network namespace of its own, joined by a
	// bridge in one more, so that links can be cut. Needs root.
	Netns bool
	// Disk gives each server a file system of its own of so many bytes, so that
	// it can be full, and lose power. 0: none has. Needs root.
	Disk int64
	// Zones puts each server into a zone of its own.
	Zones bool
	// Binary is the argon to run; empty means this program.
	Binary string
	// Flags and Env are given to each `argon server`.
	Flags, Env []string
	// Settings of the cluster; nil means the defaults.
	Settings *argonv1.Settings
	// Progress is told what is being waited for; nil is fine.
	Progress func(string)
}

// Limits of Options.
const (
	MaxServers = 32
	maxDirLen  = 39
)

// Cluster is a set of servers on this machine. Its servers outlive it: another
// process goes on with [Open]. Safe for concurrent use, but two processes must
// not change one cluster at once.
type Cluster struct {
	state    state
	network  *network // nil without namespaces
	servers  []*Server
	progress func(string)

	saving sync.Mutex
}

// Up starts servers and makes a cluster of them. It returns once every server
// is ready and the voters are as many as there should be. On an error all that
// was started is ended again; the directory stays, for its logs.
func Up(ctx context.Context, o Options) (*Cluster, error) {
	c, err := plan(o)
	if err != nil {
		return nil, err
	}
	if err := c.up(ctx, o.Settings); err != nil {
		stop := context.WithoutCancel(ctx)
		return nil, errors.Join(fmt.Errorf("dev cluster in %s: %w", c.state.Dir, err), c.Down(stop, KeepData))
	}
	return c, nil
}

// Open finds the cluster that was started in this directory.
func Open(dir string) (*Cluster, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s, err := loadState(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no dev cluster in %s: start one with `argon dev up`", dir)
	}
	if err != nil {
		return nil, err
	}
	return newCluster(*s, nil), nil
}

func newCluster(s state, progress func(string)) *Cluster {
	if progress == nil {
		progress = func(string) {}
	}
	c := &Cluster{state: s, progress: progress}
	if s.Netns {
		c.network = &network{id: s.ID}
	}
	for i := range s.Servers {
		c.servers = append(c.servers, &Server{cluster: c, serverState: &c.state.Servers[i]})
	}
	return c
}

// Dir is the cluster's directory.
func (c *Cluster) Dir() string { return c.state.Dir }

// Servers are all servers, s1 first.
func (c *Cluster) Servers() []*Server { return c.servers }

// Server finds a server by its name.
func (c *Cluster) Server(name string) (*Server, error) {
	for _, s := range c.servers {
		if s.Name == name {
			return s, nil
		}
	}
	return nil, fmt.Errorf("dev cluster in %s: no server %q: there are s1 to s%d", c.state.Dir, name, len(c.servers))
}

func (c *Cluster) up(ctx context.Context, settings *argonv1.Settings) error {
	if err := c.save(func() {}); err != nil {
		return err
	}
	if c.network != nil {
		c.progress("making network namespaces")
		if err := c.network.up(ctx, c.state.Servers); err != nil {
			return err
		}
	}
	if c.state.Disk > 0 {
		c.progress("making disks")
		for _, s := range c.servers {
			if err := s.makeDisk(ctx, c.state.Disk); err != nil {
				return fmt.Errorf("dev server %s: its disk: %w", s.Name, err)
			}
		}
	}
	c.progress("starting servers")
	if err := c.each(ctx, func(ctx context.Context, s *Server) error { return s.Start(ctx) }); err != nil {
		return err
	}
	if err := c.form(ctx, settings); err != nil {
		return err
	}
	return c.WaitReady(ctx)
}

// form makes a cluster of the first server and lets the others join it.
func (c *Cluster) form(ctx context.Context, settings *argonv1.Settings) error {
	first := c.servers[0]
	api, err := first.Client()
	if err != nil {
		return err
	}
	defer api.Close()
	c.progress("making a cluster of " + first.Name)
	_, err = client.Call(ctx, api.Cluster.Init, &argonv1.InitRequest{
		ClusterName: "dev", ServerName: first.Name, Zone: first.Zone, Settings: settings,
	})
	if err != nil {
		return first.explain("init", err)
	}
	c.progress("joining the others")
	return c.each(ctx, func(ctx context.Context, s *Server) error {
		if s == first {
			return nil
		}
		token, err := client.Call(ctx, api.Cluster.CreateToken, &argonv1.CreateTokenRequest{})
		if err != nil {
			return first.explain("token", err)
		}
		return s.join(ctx, first.Address, token.GetToken())
	})
}

// each does the same with all servers at once.
func (c *Cluster) each(ctx context.Context, do func(context.Context, *Server) error) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, s := range c.servers {
		group.Go(func() error { return do(ctx, s) })
	}
	return group.Wait()
}

// Keep says what Down leaves behind.
type Keep bool

// What Down leaves behind.
const (
	KeepNothing Keep = false
	KeepData    Keep = true
)

// Down ends every process and namespace of the cluster, also those that a
// crashed run left behind, and removes what Up made in the directory.
func (c *Cluster) Down(ctx context.Context, keep Keep) error {
	c.progress("stopping servers")
	err := c.each(ctx, func(ctx context.Context, s *Server) error { return s.Kill(ctx) })
	if c.network != nil {
		err = errors.Join(err, c.network.down(ctx))
	}
	if c.state.Disk > 0 {
		err = errors.Join(err, c.each(ctx, func(ctx context.Context, s *Server) error { return s.unmount(ctx) }))
	}
	if err != nil || keep == KeepData {
		return err
	}
	for _, s := range c.servers {
		err = errors.Join(err, cgroup.Clean(cgroup.ServerName(s.Dir)), os.RemoveAll(s.Dir))
		for _, beside := range []string{s.diskPath(), s.bootPath(), s.Dir + ".log"} {
			err = errors.Join(err, os.RemoveAll(beside))
		}
	}
	if err = errors.Join(err, os.Remove(statePath(c.state.Dir))); err != nil {
		return fmt.Errorf("dev cluster in %s: removing it: %w", c.state.Dir, err)
	}
	_ = os.Remove(c.state.Dir) // stays if it holds something else
	return nil
}
