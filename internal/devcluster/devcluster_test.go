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
	"testing"

	"go.uber.org/goleak"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// processTree is a server's processes in little: a parent, a child in its own
// session whose parent is gone, and one that forks all the time.
const processTree = `
setsid sh -c 'sh -c "sleep 1000 & exec sleep 1000" & exit 0' &
sh -c 'while :; do sleep 0.001; done' --role=daemon &
exec sleep 1000
`

// startFamily starts it with a mark; whatever is left is ended with the test.
func startFamily(t *testing.T) (mark string) {
	t.Helper()
	mark = t.TempDir()
	cmd := exec.Command("sh", "-c", processTree)
	cmd.Env = append(os.Environ(), markName+"="+mark)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := kill(context.Background(), mark, Parts); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait()
	})
	waitUntil(t, func() bool { return len(sleepers(t, mark)) >= 3 })
	return mark
}

// sleepers are the processes that stay.
func sleepers(t *testing.T, mark string) []int {
	t.Helper()
	var pids []int
	for _, p := range find(t, mark) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
		if strings.HasPrefix(string(cmdline), "sleep\x001000") {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

func find(t *testing.T, mark string) []process {
	t.Helper()
	found, err := processesOf(mark)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func waitUntil(t *testing.T, is func() bool) {
	t.Helper()
	for !is() {
		if err := pause(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKillEndsEveryProcess(t *testing.T) {
	mark := startFamily(t)
	other := startFamily(t)
	if err := kill(t.Context(), mark, Parts); err != nil {
		t.Fatal(err)
	}
	if left := find(t, mark); len(left) > 0 {
		t.Errorf("left: %+v", left)
	}
	if n := len(sleepers(t, other)); n < 3 {
		t.Errorf("another server's processes were killed, too: %d left", n)
	}
}

func TestKillOfOnePartLeavesTheOthers(t *testing.T) {
	mark := startFamily(t)
	if err := kill(t.Context(), mark, []Part{Daemon}); err != nil {
		t.Fatal(err)
	}
	for _, p := range find(t, mark) {
		if p.part == Daemon {
			t.Errorf("a daemon is left: %+v", p)
		}
	}
	if n := len(sleepers(t, mark)); n < 3 {
		t.Errorf("other processes were killed, too: %d left", n)
	}
}

func TestFreezeAndThaw(t *testing.T) {
	mark := startFamily(t)
	frozen, err := freeze(t.Context(), mark, Parts)
	if err != nil {
		t.Fatal(err)
	}
	if len(frozen) < 4 {
		t.Errorf("%d processes frozen, want at least 4: %+v", len(frozen), frozen)
	}
	before := find(t, mark)
	for _, p := range before {
		if p.state != 'T' {
			t.Errorf("not stopped: %+v", p)
		}
	}
	if err := thaw(mark); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool {
		return !slices.ContainsFunc(find(t, mark), func(p process) bool { return p.state == 'T' })
	})
}

func TestParseStat(t *testing.T) {
	for _, c := range []struct {
		stat   string
		state  byte
		parent int
		ok     bool
	}{
		{"12 (argon) S 7 12 12 0", 'S', 7, true},
		{"12 (a) b) R 1 (x) T 7 12", 'T', 7, true},
		{"12 (", 0, 0, false},
		{"", 0, 0, false},
		{"12 (a) SS 7", 0, 0, false},
		{"12 (a) S x", 'S', 0, false},
	} {
		state, parent, ok := parseStat([]byte(c.stat))
		if ok != c.ok || ok && (state != c.state || parent != c.parent) {
			t.Errorf("%q: %q, %d, %v", c.stat, state, parent, ok)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (argon) S 7 12"))
	f.Fuzz(func(_ *testing.T, stat []byte) { parseStat(stat) })
}

func TestPlan(t *testing.T) {
	short, err := os.MkdirTemp("", "argon-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(short) })
	c, err := plan(Options{Dir: filepath.Join(short, "c"), Servers: 3, Witness: true, Zones: true, Binary: "argon"})
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for i, s := range c.Servers() {
		if want := fmt.Sprintf("s%d", i+1); s.Name != want || s.Dir != filepath.Join(c.Dir(), want) {
			t.Errorf("server %d: %+v", i, s.serverState)
		}
		if s.Witness != (i == 2) || seen[s.Address] || seen[s.Zone] {
			t.Errorf("server %d: %+v", i, s.serverState)
		}
		seen[s.Address], seen[s.Zone] = true, true
	}
	if err := c.save(func() {}); err != nil {
		t.Fatal(err)
	}
	again, err := Open(c.Dir())
	if err != nil || fmt.Sprint(again.state) != fmt.Sprint(c.state) {
		t.Errorf("opened again: %+v, %v", again, err)
	}
	if _, err := plan(Options{Dir: c.Dir(), Servers: 1}); err == nil {
		t.Error("a directory in use was taken")
	}
}

func TestPlanRefuses(t *testing.T) {
	for name, o := range map[string]Options{
		"no servers":        {Servers: 0},
		"too many servers":  {Servers: MaxServers + 1},
		"only a witness":    {Servers: 1, Witness: true},
		"directory's path":  {Servers: 1, Dir: "/tmp/" + strings.Repeat("x", maxDirLen)},
		"file as directory": {Servers: 1, Dir: "/dev/null/x"},
	} {
		if _, err := plan(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := Open(t.TempDir()); err == nil {
		t.Error("an empty directory was opened")
	}
}

func TestUpSaysWhyAServerEnded(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, "argon")
	if err := os.WriteFile(binary, []byte("#!/bin/sh\necho 'argon: port 7440 is in use'\nexit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := Up(t.Context(), Options{Servers: 1, Binary: binary})
	if err == nil || !strings.Contains(err.Error(), "port 7440 is in use") {
		t.Fatalf("got %v", err)
	}
	// The log stays until it is taken down.
	_, after, _ := strings.Cut(err.Error(), "dev cluster in ")
	where, _, _ := strings.Cut(after, ":")
	c, err := Open(where)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Down(t.Context(), KeepNothing); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(where); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", where, err)
	}
}

func TestWhatIsMissing(t *testing.T) {
	server := func(alive bool, role argonv1.VoterRole) *argonv1.ServerView {
		return &argonv1.ServerView{Alive: alive, Server: &argonv1.Server{VoterRole: role}}
	}
	voter, learner := argonv1.VoterRole_VOTER_ROLE_VOTER, argonv1.VoterRole_VOTER_ROLE_LEARNER
	for _, c := range []struct {
		want   string
		status *argonv1.StatusResponse
	}{
		{"it is starting", &argonv1.StatusResponse{State: "starting"}},
		{"it sees 2 of 3 servers alive", &argonv1.StatusResponse{
			State:   "ready",
			Servers: []*argonv1.ServerView{server(true, voter), server(true, voter), server(false, voter)},
		}},
		{"2 of 3 voters so far", &argonv1.StatusResponse{
			State:   "ready",
			Servers: []*argonv1.ServerView{server(true, voter), server(true, voter), server(true, learner)},
		}},
		{"", &argonv1.StatusResponse{
			State:   "ready",
			Servers: []*argonv1.ServerView{server(true, voter), server(true, voter), server(true, voter)},
		}},
	} {
		if got := whatIsMissing(c.status, 3); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}
