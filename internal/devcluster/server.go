package devcluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// Server is one `argon server` with all its processes. Safe for concurrent
// use.
type Server struct {
	*serverState
	cluster *Cluster

	mu sync.Mutex
	// exited is closed when the guard that this process started is gone and
	// reaped; nil if another process started it.
	exited chan struct{}
}

// LogPath is the file that takes what the server prints. It is not on a disk
// that may be full or lose power.
func (s *Server) LogPath() string {
	if s.cluster.state.Disk > 0 {
		return s.Dir + ".log"
	}
	return filepath.Join(s.Dir, "server.log")
}

// Client makes a client of the server's admin socket; the caller closes it.
func (s *Server) Client() (*client.Client, error) {
	return client.Dial(client.Options{Socket: client.SocketPath(s.Dir)})
}

// Start starts the server's processes and returns once its API answers.
func (s *Server) Start(ctx context.Context) error {
	running, err := processesOf(s.Dir)
	if err != nil {
		return err
	}
	if len(running) > 0 {
		return fmt.Errorf("dev server %s: it runs already", s.Name)
	}
	if err := s.spawn(); err != nil {
		return fmt.Errorf("dev server %s: %w", s.Name, err)
	}
	return s.waitAnswer(ctx)
}

func (s *Server) spawn() error {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(s.LogPath(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := append([]string{s.cluster.state.Binary, "server", "--dir", s.Dir, "--address", s.Address}, s.cluster.state.Flags...)
	// Its own session: the terminal's ctrl-C is not for it.
	attr := &syscall.SysProcAttr{Setsid: true}
	if s.cluster.state.Disk > 0 {
		args, attr.Unshareflags = s.onOwnDisk(args), syscall.CLONE_NEWNS
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(append(os.Environ(), s.cluster.state.Env...), markName+"="+s.Dir)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = attr
	start := cmd.Start
	if n := s.cluster.network; n != nil {
		start = func() error { return n.in(n.namespace(s.Name), cmd.Start) }
	}
	if err := start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	s.mu.Lock()
	s.exited = exited
	s.mu.Unlock()
	go func() {
		_ = cmd.Wait() // how it ends is told by the one who ended it, or its log
		close(exited)
	}()
	return nil
}

// Kill ends all processes of the server at once with SIGKILL, or only those of
// the parts that are named.
func (s *Server) Kill(ctx context.Context, parts ...Part) error {
	if len(parts) == 0 {
		parts = Parts
	}
	if err := kill(ctx, s.Dir, parts); err != nil {
		return fmt.Errorf("dev server %s: %w", s.Name, err)
	}
	if slices.Contains(parts, Guard) {
		s.reap()
	}
	return nil
}

// reap waits for the guard's end where this process is its parent.
func (s *Server) reap() {
	s.mu.Lock()
	exited := s.exited
	s.exited = nil
	s.mu.Unlock()
	if exited != nil {
		<-exited
	}
}

// Pause stops all processes of the server, or those of some parts, with
// SIGSTOP: it is silent, but not gone.
func (s *Server) Pause(ctx context.Context, parts ...Part) error {
	if len(parts) == 0 {
		parts = Parts
	}
	frozen, err := freeze(ctx, s.Dir, parts)
	if err == nil && len(frozen) == 0 {
		err = errors.New("it does not run")
	}
	if err != nil {
		return fmt.Errorf("dev server %s: %w", s.Name, err)
	}
	return nil
}

// Resume lets a paused server go on.
func (s *Server) Resume() error {
	if err := thaw(s.Dir); err != nil {
		return fmt.Errorf("dev server %s: %w", s.Name, err)
	}
	return nil
}

// Reload has the guard replace the daemon, as after an upgrade.
func (s *Server) Reload() error {
	found, err := processesOf(s.Dir)
	for _, p := range found {
		if p.part == Guard {
			err = errors.Join(err, signal(p, s.Dir, unix.SIGHUP))
		}
	}
	if err != nil {
		return fmt.Errorf("dev server %s: %w", s.Name, err)
	}
	return nil
}

// Stop has the guard stop the server in order, as a host does that shuts down,
// and waits until nothing of it runs.
func (s *Server) Stop(ctx context.Context) error {
	found, err := processesOf(s.Dir)
	for _, p := range found {
		if p.part == Guard {
			err = errors.Join(err, signal(p, s.Dir, unix.SIGTERM))
		}
	}
	for err == nil && len(found) > 0 {
		select {
		case <-time.After(stopPoll):
			found, err = processesOf(s.Dir)
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return fmt.Errorf("dev server %s: stop: %w", s.Name, err)
	}
	s.reap()
	return nil
}

// stopPoll is how often it is looked whether a server has stopped.
const stopPoll = 20 * time.Millisecond

// Condition is what the server's processes do: "running", "paused" (at least
// one is), or "stopped".
func (s *Server) Condition() (string, error) {
	found, err := processesOf(s.Dir)
	switch {
	case err != nil:
		return "", err
	case len(found) == 0:
		return "stopped", nil
	case slices.ContainsFunc(found, func(p process) bool { return p.state == 'T' || p.state == 't' }):
		return "paused", nil
	}
	return "running", nil
}

// PIDs are the server's living processes of one part.
func (s *Server) PIDs(part Part) ([]int, error) {
	found, err := processesOf(s.Dir)
	var pids []int
	for _, p := range found {
		if p.part == part {
			pids = append(pids, p.pid)
		}
	}
	return pids, err
}

// Cut severs the server from everything else, both ways.
func (s *Server) Cut(ctx context.Context) error { return s.setLink(ctx, false) }

// Heal undoes Cut.
func (s *Server) Heal(ctx context.Context) error { return s.setLink(ctx, true) }

func (s *Server) setLink(ctx context.Context, up bool) error {
	if err := s.needNetwork(); err != nil {
		return err
	}
	if err := s.cluster.network.setLink(ctx, s.Name, up); err != nil {
		return fmt.Errorf("dev server %s: %w", s.Name, err)
	}
	return s.cluster.save(func() { s.IsCut = !up })
}

// Mute makes everything vanish that this server sends to the other one. A cut
// between two servers is both muted.
func (s *Server) Mute(ctx context.Context, to *Server) error {
	if err := s.needNetwork(); err != nil {
		return err
	}
	if err := s.cluster.network.lose(ctx, s.Name, to.Address); err != nil {
		return fmt.Errorf("dev server %s: %w", s.Name, err)
	}
	return s.cluster.save(func() {
		if !slices.Contains(s.CutFrom, to.Name) {
			s.CutFrom = append(s.CutFrom, to.Name)
		}
	})
}

// Unmute undoes Mute.
func (s *Server) Unmute(ctx context.Context, to *Server) error {
	if !slices.Contains(s.CutFrom, to.Name) {
		return nil
	}
	if err := s.cluster.network.find(ctx, s.Name, to.Address); err != nil {
		return fmt.Errorf("dev server %s: %w", s.Name, err)
	}
	return s.cluster.save(func() {
		s.CutFrom = slices.DeleteFunc(s.CutFrom, func(name string) bool { return name == to.Name })
	})
}

// Received is how many bytes the server has got from others since the cluster
// was made, whatever they were.
func (s *Server) Received(ctx context.Context) (uint64, error) {
	if err := s.needNetwork(); err != nil {
		return 0, err
	}
	n, err := s.cluster.network.received(ctx, s.Name)
	if err != nil {
		return 0, fmt.Errorf("dev server %s: %w", s.Name, err)
	}
	return n, nil
}

func (s *Server) needNetwork() error {
	if s.cluster.network == nil {
		return fmt.Errorf("dev server %s: it has no links of its own: the cluster was started without --netns", s.Name)
	}
	return nil
}

// Command is argon's command line against this server, to be started.
func (s *Server) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.cluster.state.Binary, args...)
	cmd.Env = append(os.Environ(), "ARGON_DIR="+s.Dir, "ARGON_SERVER=")
	return cmd
}

// Exec runs argon's command line against this server and returns what it
// printed. An error holds what it printed to standard error.
func (s *Server) Exec(ctx context.Context, args ...string) (string, error) {
	cmd := s.Command(ctx, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("argon %s on %s: %w: %s", strings.Join(args, " "), s.Name, err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

func (s *Server) join(ctx context.Context, address, token string) error {
	api, err := s.Client()
	if err != nil {
		return err
	}
	defer api.Close()
	_, err = client.Call(ctx, api.Cluster.Join, &argonv1.JoinRequest{
		Address: address, Token: token, ServerName: s.Name, Zone: s.Zone, Witness: s.Witness,
	})
	if err != nil {
		return s.explain("join", err)
	}
	return nil
}

// explain says where to read more.
func (s *Server) explain(what string, err error) error {
	return fmt.Errorf("dev server %s: %s: %w (its log is %s)", s.Name, what, err, s.LogPath())
}
