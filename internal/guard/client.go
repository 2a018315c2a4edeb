package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/boottime"
	"github.com/argon-cluster/argon/internal/cgroup"
)

// ErrNoGuard: this process was not started by a guard, or its guard is gone.
var ErrNoGuard = errors.New("there is no guard")

// Client is the daemon's end of the connection. It keeps the deadline, too, and
// ends the guests itself when the guard hangs. Safe for concurrent use.
type Client struct {
	nc      *net.UnixConn
	reading sync.WaitGroup
	fence   *fence
	knows   []string
	kept    shelf

	sending sync.Mutex

	mu      sync.Mutex
	seq     uint64
	waiting map[uint64]chan answer
	// running has a channel for each guest that is known to run, closed at
	// its end.
	running map[string]chan struct{}
	lost    chan struct{}
}

// Connect takes up the connection that this process was started with.
func Connect(ctx context.Context) (*Client, error) {
	fd, err := strconv.Atoi(os.Getenv(fdName))
	if err != nil {
		return nil, fmt.Errorf("%s is not set: %w", fdName, ErrNoGuard)
	}
	// Neither of them is for what this process starts.
	_ = os.Unsetenv(fdName)
	unix.CloseOnExec(fd)
	nc, err := connOf(fd)
	if err != nil {
		return nil, err
	}
	c := newClient(nc)
	c.knows = strings.Split(os.Getenv(knowsName), ",")
	err = c.takeKept(os.Getenv(keptName))
	_, _ = os.Unsetenv(knowsName), os.Unsetenv(keptName)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	// What runs from before.
	_, err = c.List(ctx)
	if err == nil {
		err = c.raiseFence(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func newClient(nc *net.UnixConn) *Client {
	c := &Client{nc: nc, waiting: map[uint64]chan answer{}, running: map[string]chan struct{}{}, lost: make(chan struct{})}
	c.reading.Go(c.read)
	return c
}

// raiseFence makes this process watch the deadline as well.
func (c *Client) raiseFence(ctx context.Context) error {
	about, err := c.About(ctx)
	if err != nil {
		return err
	}
	groups := cgroup.Join(about.Groups)
	if !groups.Usable() {
		return nil // only a parent may kill by number
	}
	ring, err := newAlarm()
	if err != nil {
		return err
	}
	c.fence = &fence{now: boottime.Now, alarm: ring, kill: groups.KillAll}
	c.reading.Go(func() {
		for ring.wait() == nil {
			c.fence.enforce()
		}
	})
	return nil
}

// Lost is closed when the guard is gone: nobody would end the guests.
func (c *Client) Lost() <-chan struct{} { return c.lost }

// Close ends the connection.
func (c *Client) Close() error {
	err := c.nc.Close()
	if c.fence != nil {
		c.fence.alarm.close()
	}
	c.kept.close()
	c.reading.Wait()
	return err
}

// Ready says that the daemon has started: from now on it is started again
// whenever it ends.
func (c *Client) Ready(ctx context.Context) error {
	_, err := c.call(ctx, request{Op: opReady})
	return err
}

// Status tells the service manager in one line what the server does, or waits for.
// serving: it has started.
func (c *Client) Status(ctx context.Context, serving bool, text string) error {
	if !c.Knows("status") {
		return nil
	}
	_, err := c.call(ctx, request{Op: opStatus, Serving: serving, Text: text})
	return err
}

// SetDeadline says until when, by CLOCK_BOOTTIME, guests may run. It never
// moves back.
func (c *Client) SetDeadline(ctx context.Context, until time.Duration) error {
	if c.fence != nil {
		if err := c.fence.extend(until); err != nil {
			return err
		}
	}
	_, err := c.call(ctx, request{Op: opDeadline, Until: until})
	return err
}

// LimitDeadline moves the deadline back if it is later. A guard that can't do that
// never had a reason for a later one.
func (c *Client) LimitDeadline(ctx context.Context, until time.Duration) error {
	if c.fence != nil {
		if err := c.fence.lower(until); err != nil {
			return err
		}
	}
	if !c.Knows("lower") {
		return nil
	}
	_, err := c.call(ctx, request{Op: opLower, Until: until})
	return err
}

// Start runs a guest. ErrDeadline when no guest may run, ErrExists when one of
// this id does.
func (c *Client) Start(ctx context.Context, p Process) (pid int, err error) {
	// Known before it runs, or its end could come first.
	gone := c.known(p.ID)
	a, err := c.call(ctx, request{Op: opStart, Process: &p})
	if err != nil {
		if !errors.Is(err, ErrExists) {
			c.forget(p.ID, gone)
		}
		return 0, fmt.Errorf("guest %s: %w", p.ID, err)
	}
	return a.PID, nil
}

// Kill ends a guest and returns when it is gone. One that is not there is no
// error.
func (c *Client) Kill(ctx context.Context, id string) error {
	_, err := c.call(ctx, request{Op: opKill, ID: id})
	return err
}

// Limit changes the limits of processors of a guest that runs. ErrCannotLimit when
// this host has nothing to do so with.
func (c *Client) Limit(ctx context.Context, id string, l cgroup.Limits) error {
	err := ErrOlder
	if c.Knows("limit") {
		_, err = c.call(ctx, request{Op: opLimit, ID: id, Limits: l})
	}
	if err != nil {
		return fmt.Errorf("limiting guest %s: %w", id, err)
	}
	return nil
}

// About is what the guard has to end and to limit guests with.
func (c *Client) About(ctx context.Context) (About, error) {
	if !c.Knows("about") {
		return About{Text: "process groups, no limits: " + ErrOlder.Error()}, nil
	}
	a, err := c.call(ctx, request{Op: opAbout})
	if err != nil {
		return About{}, err
	}
	if a.About == nil {
		return About{}, errors.New("asking the guard: an empty answer")
	}
	return *a.About, nil
}

// Keep has a file kept by the guard under a name, such as a socket that clients
// connect to while no daemon runs. The next daemon has it, too.
func (c *Client) Keep(ctx context.Context, name string, f *os.File) error {
	err := ErrOlder
	if c.Knows("keep") {
		_, err = c.call(ctx, request{Op: opKeep, ID: name, file: f})
	}
	if err == nil {
		err = c.kept.keepCopy(name, f)
	}
	if err != nil {
		return fmt.Errorf("having %s kept: %w", name, err)
	}
	return nil
}

// Kept is a copy of what is kept under a name; nil if nothing is. The caller
// closes it.
func (c *Client) Kept(name string) *os.File { return c.kept.take(name) }

// Drop ends the keeping.
func (c *Client) Drop(ctx context.Context, name string) error {
	if !c.Knows("keep") {
		return nil
	}
	c.kept.drop(name)
	_, err := c.call(ctx, request{Op: opDrop, ID: name})
	return err
}

// takeKept takes up what earlier daemons had kept.
func (c *Client) takeKept(names string) error {
	if names == "" {
		return nil
	}
	var list []string
	if err := json.Unmarshal([]byte(names), &list); err != nil {
		return fmt.Errorf("taking up what the guard has kept: %w", err)
	}
	for i, name := range list {
		fd := childFD + 1 + i
		unix.CloseOnExec(fd)
		if err := c.kept.keep(name, os.NewFile(uintptr(fd), name)); err != nil {
			return err
		}
	}
	return nil
}

// Knows tells whether the guard, which may be older than this program,
// understands something that guards did not always.
func (c *Client) Knows(what string) bool { return slices.Contains(c.knows, what) }

// List names the guests that run.
func (c *Client) List(ctx context.Context) ([]Running, error) {
	a, err := c.call(ctx, request{Op: opList})
	if err != nil {
		return nil, err
	}
	for _, r := range a.Guests {
		c.known(r.ID)
	}
	return a.Guests, nil
}

// Done is closed when the guest is gone, or if it is not known to run.
func (c *Client) Done(id string) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if gone := c.running[id]; gone != nil {
		return gone
	}
	gone := make(chan struct{})
	close(gone)
	return gone
}

func (c *Client) known(id string) chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running[id] == nil {
		c.running[id] = make(chan struct{})
	}
	return c.running[id]
}

func (c *Client) forget(id string, gone chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running[id] == gone {
		delete(c.running, id)
		close(gone)
	}
}

func (c *Client) call(ctx context.Context, r request) (answer, error) {
	reply := make(chan answer, 1)
	c.mu.Lock()
	c.seq++
	r.Seq = c.seq
	c.waiting[r.Seq] = reply
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.waiting, r.Seq)
	}()
	line, err := json.Marshal(r)
	if err != nil {
		return answer{}, fmt.Errorf("asking the guard: %w", err)
	}
	if len(line) >= maxLine {
		return answer{}, fmt.Errorf("asking the guard: %d bytes are too many", len(line))
	}
	c.sending.Lock()
	err = writeMessage(c.nc, append(line, '\n'), r.file)
	c.sending.Unlock()
	if err != nil {
		return answer{}, fmt.Errorf("asking the guard: %w: %w", ErrNoGuard, err)
	}
	select {
	case a := <-reply:
		return a, a.err()
	case <-c.lost:
		return answer{}, ErrNoGuard
	case <-ctx.Done():
		return answer{}, fmt.Errorf("asking the guard: %w", ctx.Err())
	}
}

// read takes answers and news until the connection ends.
func (c *Client) read() {
	defer close(c.lost)
	in := lines(c.nc)
	for in.Scan() {
		var a answer
		if err := json.Unmarshal(in.Bytes(), &a); err != nil {
			_ = c.nc.Close()
			return
		}
		c.mu.Lock()
		if a.Exited != "" {
			if gone := c.running[a.Exited]; gone != nil {
				delete(c.running, a.Exited)
				close(gone)
			}
		} else if reply := c.waiting[a.Seq]; reply != nil {
			reply <- a
		}
		c.mu.Unlock()
	}
}
