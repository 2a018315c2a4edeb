package devcluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// markName is the environment variable by which the processes of a server are
// found, whoever their parent is now: all of them inherit it.
const markName = "ARGON_DEV_SERVER"

// Part is a set of a server's processes.
type Part string

// The parts of a server.
const (
	Guard  Part = "guard"
	Daemon Part = "daemon"
	Guests Part = "guests"
)

// Parts are all of them.
var Parts = []Part{Guard, Daemon, Guests}

// process is one process of a server.
type process struct {
	pid, parent int
	state       byte // as in /proc/PID/stat: 'R', 'S', 'T', 'Z' ...
	part        Part
	marked      bool
}

// processesOf finds a server's living processes: those that have its mark and
// all their descendants.
func processesOf(mark string) ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	var all []process
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			if p, ok := readProcess(pid, mark); ok {
				all = append(all, p)
			}
		}
	}
	return family(all), nil
}

// readProcess tells of one process; not ok if it is gone, or as good as gone.
func readProcess(pid int, mark string) (process, bool) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return process{}, false
	}
	p := process{pid: pid}
	var ok bool
	if p.state, p.parent, ok = parseStat(stat); !ok || p.state == 'Z' || p.state == 'X' {
		return process{}, false
	}
	// Other users' processes can't be read; they are not ours.
	environ, _ := os.ReadFile(filepath.Join(dir, "environ"))
	p.marked = slices.Contains(strings.Split(string(environ), "\x00"), markName+"="+mark)
	cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
	p.part = partOf(strings.Split(string(cmdline), "\x00"))
	return p, true
}

// parseStat takes state and parent out of /proc/PID/stat; the program's name
// before them may hold anything, even parentheses.
func parseStat(stat []byte) (state byte, parent int, ok bool) {
	_, after, found := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
	fields := bytes.Fields(after)
	if !found || len(fields) < 2 || len(fields[0]) != 1 {
		return 0, 0, false
	}
	parent, err := strconv.Atoi(string(fields[1]))
	return fields[0][0], parent, err == nil
}

func partOf(args []string) Part {
	switch {
	case slices.Contains(args, "--role=daemon"):
		return Daemon
	case slices.Contains(args, "server"):
		return Guard
	}
	return Guests
}

// family is the marked processes and all that descend from them.
func family(all []process) []process {
	in := make(map[int]bool)
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if !in[p.pid] && (p.marked || in[p.parent]) {
				in[p.pid], grown = true, true
			}
		}
	}
	return slices.DeleteFunc(all, func(p process) bool { return !in[p.pid] })
}

// freeze stops the processes of these parts, and those that they start
// meanwhile, until all stand still. It returns them.
func freeze(ctx context.Context, mark string, parts []Part) ([]process, error) {
	for {
		found, err := processesOf(mark)
		if err != nil {
			return nil, err
		}
		found = slices.DeleteFunc(found, func(p process) bool { return !slices.Contains(parts, p.part) })
		still := true
		for _, p := range found {
			if p.state != 'T' && p.state != 't' {
				still = false
				if err := signal(p, mark, unix.SIGSTOP); err != nil {
					return nil, err
				}
			}
		}
		if still {
			return found, nil
		}
		if err := pause(ctx); err != nil {
			return nil, fmt.Errorf("stopping the processes of %s: %w", mark, err)
		}
	}
}

// kill ends the processes of these parts at once, as a power cut does: first
// all stand still, then none is left that could see another one die.
func kill(ctx context.Context, mark string, parts []Part) error {
	frozen, err := freeze(ctx, mark, parts)
	if err != nil {
		return err
	}
	for _, p := range frozen {
		if err := signal(p, mark, unix.SIGKILL); err != nil {
			return err
		}
	}
	for {
		found, err := processesOf(mark)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(found, func(p process) bool { return contains(frozen, p.pid) }) {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("waiting for the processes of %s to end: %w", mark, err)
		}
	}
}

func contains(list []process, pid int) bool {
	return slices.ContainsFunc(list, func(p process) bool { return p.pid == pid })
}

// thaw lets all processes of a server go on.
func thaw(mark string) error {
	found, err := processesOf(mark)
	for _, p := range found {
		err = errors.Join(err, signal(p, mark, unix.SIGCONT))
	}
	return err
}

// signal sends a signal to a process, unless its number is another's by now.
func signal(p process, mark string, s unix.Signal) error {
	handle, err := os.FindProcess(p.pid)
	if err != nil {
		return nil // gone
	}
	defer func() { _ = handle.Release() }()
	// The handle is the process's own; what is read now is of the same one,
	// or of one that came after it, whose handle is dead.
	if now, ok := readProcess(p.pid, mark); !ok || now.marked != p.marked {
		return nil
	}
	if err := handle.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("sending %v to process %d: %w", s, p.pid, err)
	}
	return nil
}

// lookEvery is how often a change is looked for that nothing tells of.
const lookEvery = 5 * time.Millisecond

func pause(ctx context.Context) error {
	timer := time.NewTimer(lookEvery)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
