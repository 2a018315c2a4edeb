package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu/qmp"
)

// This file saves a guest's memory and makes guests of it. For QEMU both are
// migrations: over a file descriptor that is handed over on its monitor's socket,
// so that nothing depends on paths and on who may open them.
//
// Memory is saved to a file on this server's disk first, without a name and with
// its room reserved. So a guest waits for nothing but its own server; and QEMU
// can go on to the end when the daemon does not: one that runs on while its
// memory is saved stops for good when that fails (seen with QEMU 7.2: who would
// free the page that it is about to write is gone).

const (
	// live is the capability of QEMU that lets a guest run on while its memory,
	// as it was, is saved: pages are saved before the guest may change them.
	live = "background-snapshot"
	// memoryStream is what QEMU calls the descriptor.
	memoryStream = "memory"
	// lookAfter is how often QEMU is asked how it does.
	lookAfter = 2 * time.Millisecond
	// devicesRoom is more than a guest's devices have of memory of their own.
	devicesRoom = 128 << 20
)

// Pause implements hypervisor.Guest.
func (g *guest) Pause(ctx context.Context) error {
	g.mu.Lock()
	g.pausedAt = time.Now()
	g.mu.Unlock()
	return g.execute(ctx, "stop", nil)
}

// Platform implements hypervisor.Guest.
func (g *guest) Platform(ctx context.Context) (hypervisor.Platform, error) {
	var kind string
	var about struct {
		QEMU struct{ Major, Minor, Micro int } `json:"qemu"`
	}
	err := g.executeWith(ctx, "qom-get", map[string]string{"path": "/machine", "property": "type"}, &kind)
	if err == nil {
		err = g.execute(ctx, "query-version", &about)
	}
	v := about.QEMU
	return hypervisor.Platform{
		Machine: strings.TrimSuffix(kind, "-machine"), Version: fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro),
	}, err
}

type capability struct {
	Name  string `json:"capability"`
	State bool   `json:"state"`
}

func (g *guest) setCapabilities(ctx context.Context, c ...capability) error {
	return g.executeWith(ctx, "migrate-set-capabilities", map[string]any{"capabilities": c}, nil)
}

func (g *guest) capabilities(ctx context.Context) (set []capability, err error) {
	err = g.execute(ctx, "query-migrate-capabilities", &set)
	return set, err
}

// savesLive tells whether what is under way, if anything is, is the saving of a
// guest that runs on.
func (g *guest) savesLive(ctx context.Context) (bool, error) {
	set, err := g.capabilities(ctx)
	return slices.Contains(set, capability{live, true}), err
}

// PrepareSave implements hypervisor.Guest. QEMU refuses what its server's kernel
// or the guest's memory can't do (userfaultfd), and tells why.
func (g *guest) PrepareSave(ctx context.Context) (hypervisor.SaveMode, error) {
	if err := g.settle(ctx); err != nil {
		return hypervisor.SaveMode{}, err
	}
	if err := g.openSpool(ctx); err != nil {
		return hypervisor.SaveMode{}, err
	}
	var refused *qmp.Error
	switch err := g.setCapabilities(ctx, capability{live, true}); {
	case errors.As(err, &refused):
		return hypervisor.SaveMode{Reason: refused.Desc}, nil
	case err != nil:
		return hypervisor.SaveMode{}, err
	}
	// So that nothing but the saving itself is left to do while it stands still.
	g.mu.Lock()
	spool := g.spool
	g.mu.Unlock()
	return hypervisor.SaveMode{Live: true}, g.hand(ctx, spool)
}

// DropSave implements hypervisor.Guest. QEMU has the file, too.
func (g *guest) DropSave(ctx context.Context) error {
	g.mu.Lock()
	spool := g.spool
	g.spool = nil
	g.mu.Unlock()
	if spool == nil {
		return nil
	}
	err := spool.Close()
	var refused *qmp.Error
	if cerr := g.executeWith(ctx, "closefd", map[string]string{"fdname": memoryStream}, nil); !errors.As(cerr, &refused) { // it had none
		err = errors.Join(err, cerr)
	}
	return err
}

// openSpool makes the file that memory is saved to.
func (g *guest) openSpool(ctx context.Context) error {
	var size struct {
		Base    int64 `json:"base-memory"`
		Plugged int64 `json:"plugged-memory"`
	}
	if err := g.execute(ctx, "query-memory-size-summary", &size); err != nil {
		return err
	}
	f, err := os.CreateTemp(g.spoolDir, "memory-*")
	if err != nil {
		return fmt.Errorf("making a file for the guest's memory: %w", err)
	}
	room := size.Base + size.Plugged + size.Base/64 + devicesRoom
	err = errors.Join(os.Remove(f.Name()), unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, room))
	if err != nil {
		return errors.Join(fmt.Errorf("making room for %d bytes of the guest's memory in %s: %w", room, g.spoolDir, err), f.Close())
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.spool != nil {
		_ = g.spool.Close()
	}
	g.spool = f
	return nil
}

// settle waits until nothing is under way that an earlier run of the daemon began,
// and takes back what was set for another kind of migration.
func (g *guest) settle(ctx context.Context) error {
	var m state
	if err := g.wait(ctx, func(ctx context.Context) (bool, error) {
		m = state{}
		err := g.execute(ctx, "query-migrate", &m)
		return m.over(), err
	}); err != nil {
		return err
	}
	set, err := g.capabilities(ctx)
	if err != nil {
		return err
	}
	var off []capability
	for _, c := range set {
		if c.State {
			off = append(off, capability{c.Name, false})
		}
	}
	if len(off) > 0 {
		if err := g.setCapabilities(ctx, off...); err != nil {
			return err
		}
	}
	// As fast as it is taken.
	return g.executeWith(ctx, "migrate-set-parameters", map[string]uint64{"max-bandwidth": 1 << 40}, nil)
}

// Save implements hypervisor.Guest.
func (g *guest) Save(ctx context.Context, runsOn bool) (hypervisor.Saved, error) {
	g.mu.Lock()
	saved, spool := hypervisor.Saved{Stopped: g.pausedAt}, g.spool
	g.spool = nil
	g.mu.Unlock()
	if spool == nil {
		return saved, fmt.Errorf("guest %s: it was not got ready to be saved", g.id)
	}
	memory := &spooled{ctx: ctx, guest: g, file: spool}
	if err := g.save(ctx, memory, runsOn); err != nil {
		return saved, errors.Join(fmt.Errorf("saving the memory of guest %s: %w", g.id, err), memory.Close())
	}
	saved.Memory = memory
	if runsOn {
		saved.Pause = time.Since(saved.Stopped)
	}
	return saved, nil
}

func (g *guest) save(ctx context.Context, memory *spooled, runsOn bool) error {
	if !runsOn {
		if err := errors.Join(g.setCapabilities(ctx, capability{live, false}), g.hand(ctx, memory.file)); err != nil {
			return err
		}
	}
	if err := g.executeWith(ctx, "migrate", map[string]string{"uri": "fd:" + memoryStream}, nil); err != nil {
		return err
	}
	if runsOn {
		return g.wait(ctx, g.runs)
	}
	memory.whole = true
	err := g.wait(ctx, g.saved)
	if err != nil {
		err = errors.Join(err, g.giveUpSaving(context.WithoutCancel(ctx)))
	}
	return err
}

// giveUpSaving ends the saving of a guest that stands still.
func (g *guest) giveUpSaving(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	return g.wait(ctx, func(ctx context.Context) (bool, error) {
		var m state
		if err := g.execute(ctx, "query-migrate", &m); err != nil || m.over() {
			return true, err
		}
		return false, g.execute(ctx, "migrate_cancel", nil)
	})
}

// endTimeout bounds how long QEMU may take to give up.
const endTimeout = 10 * time.Second

// spooled is the memory in its file; QEMU may still be writing it.
type spooled struct {
	ctx   context.Context
	guest *guest
	file  *os.File
	off   int64
	whole bool
}

// Read implements io.Reader.
func (s *spooled) Read(p []byte) (int, error) {
	for {
		whole := s.whole
		n, err := s.file.ReadAt(p, s.off)
		if n > 0 {
			s.off += int64(n)
			return n, nil
		}
		if !errors.Is(err, io.EOF) || whole {
			return 0, err
		}
		if s.whole, err = s.guest.saved(s.ctx); err != nil {
			return 0, err
		}
		if s.whole {
			continue
		}
		select {
		case <-time.After(lookAfter):
		case <-s.guest.done:
			return 0, errors.New("the guest has ended before its memory was saved")
		case <-s.ctx.Done():
			return 0, s.ctx.Err()
		}
	}
}

// Close implements io.Closer. QEMU goes on to the end, for itself.
func (s *spooled) Close() error { return s.file.Close() }

// runs tells whether the processors do.
func (g *guest) runs(ctx context.Context) (bool, error) {
	st, err := g.Status(ctx)
	if err != nil || st.State == hypervisor.Running {
		return err == nil, err
	}
	// It will not if this has failed.
	var m state
	err = g.execute(ctx, "query-migrate", &m)
	if err == nil && m.over() && m.Status != "completed" {
		return false, m.failure()
	}
	return false, err
}

// saved tells whether all was written, or read.
func (g *guest) saved(ctx context.Context) (bool, error) {
	var m state
	err := g.execute(ctx, "query-migrate", &m)
	switch {
	case err != nil || m.Status == "completed":
		return err == nil, err
	case m.over() && m.Status != "":
		return false, m.failure()
	}
	return false, nil
}

// wait asks until something is so.
func (g *guest) wait(ctx context.Context, so func(context.Context) (bool, error)) error {
	tick := time.NewTicker(lookAfter)
	defer tick.Stop()
	for {
		if ok, err := so(ctx); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-g.done:
			return errors.New("it has ended")
		}
	}
}

// openStream hands QEMU one end of a stream, and returns the other.
func (g *guest) openStream(ctx context.Context) (*net.UnixConn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("making a stream for memory: %w", err)
	}
	theirs, mine := os.NewFile(uintptr(fds[0]), memoryStream), os.NewFile(uintptr(fds[1]), memoryStream)
	defer theirs.Close()
	defer mine.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		return nil, fmt.Errorf("making a stream for memory: %w", err)
	}
	if err := g.hand(ctx, theirs); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn.(*net.UnixConn), nil
}

// hand gives QEMU a descriptor to migrate with.
func (g *guest) hand(ctx context.Context, f *os.File) error {
	client, err := g.monitor(ctx)
	if err == nil {
		err = client.ExecuteWith(ctx, f, "getfd", map[string]string{"fdname": memoryStream}, nil)
	}
	if err != nil {
		return fmt.Errorf("guest %s: %w", g.id, err)
	}
	return nil
}

// state is how a migration does.
type state struct {
	Status string `json:"status"`
	Error  string `json:"error-desc"`
}

func (m state) over() bool {
	switch m.Status {
	case "", "none", "completed", "failed", "cancelled":
		return true
	}
	return false
}

func (m state) failure() error { return fmt.Errorf("QEMU gave it up (%s): %s", m.Status, m.Error) }

// Wake implements hypervisor.Monitor. QEMU's processors stand still until Resume:
// what it was given is whole by then, as the reader says at its end.
func (m *Monitor) Wake(ctx context.Context, spec hypervisor.Spec, memory io.Reader) (hypervisor.Guest, error) {
	started, cancel := context.WithTimeout(ctx, hypervisor.StartTimeout)
	defer cancel()
	g, err := m.launch(started, spec, "-incoming", "defer")
	if err != nil {
		return nil, err
	}
	if err := g.load(ctx, memory); err != nil {
		return nil, m.giveUp(ctx, spec, fmt.Errorf("giving the guest its memory: %w", err))
	}
	return g, nil
}

// load lets QEMU read its memory.
func (g *guest) load(ctx context.Context, memory io.Reader) error {
	ours, err := g.openStream(ctx)
	if err != nil {
		return err
	}
	defer ours.Close()
	defer context.AfterFunc(ctx, func() { _ = ours.SetDeadline(time.Now()) })()
	if err := g.executeWith(ctx, "migrate-incoming", map[string]string{"uri": "fd:" + memoryStream}, nil); err != nil {
		return err
	}
	feed := &feeding{w: ours}
	if _, err := io.CopyBuffer(feed, memory, make([]byte, 256<<10)); err != nil {
		return err
	}
	_ = ours.CloseWrite()
	if err := g.wait(ctx, g.saved); err != nil {
		return errors.Join(err, feed.err)
	}
	return nil
}

// feeding writes to QEMU for as long as it reads: once it has all that it needs
// it stops, before the very end. The rest is still read, to see that it is whole.
type feeding struct {
	w   io.Writer
	err error
}

// Write implements io.Writer.
func (f *feeding) Write(p []byte) (int, error) {
	if f.err == nil {
		_, f.err = f.w.Write(p)
	}
	return len(p), nil
}
