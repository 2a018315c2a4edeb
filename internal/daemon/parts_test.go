package daemon

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/network"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPortInUse(t *testing.T) {
	ln, err := listenTCP(t.Context(), "api", "127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	port := ln.Addr().(*net.TCPAddr).Port
	_, err = listenTCP(t.Context(), "api", "127.0.0.1", port)
	if err == nil || !strings.Contains(err.Error(), "in use") || !strings.Contains(err.Error(), "--api-port") {
		t.Errorf("got %v", err)
	}
	// TEST-NET-1, RFC 5737: never an address of this host.
	if _, err = listenTCP(t.Context(), "api", "192.0.2.1", port); err == nil || !strings.Contains(err.Error(), "--address") {
		t.Errorf("got %v", err)
	}
}

func TestSocketIsPrivateAndReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	ln, err := listenUnix(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %v", st.Mode())
	}
}

func TestDirectory(t *testing.T) {
	dir := t.TempDir()
	p := paths{dir: dir, runDir: filepath.Join(dir, "run")}
	if err := p.make(); err != nil {
		t.Fatal(err)
	}
	lock, err := p.lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.lock(); err == nil || !strings.Contains(err.Error(), "another server") {
		t.Errorf("a second lock: %v", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := p.lock()
	if err != nil {
		t.Errorf("after the first ended: %v", err)
	}
	_ = again.Close()

	long := paths{dir: dir, runDir: filepath.Join(dir, strings.Repeat("x", 100))}
	if err := long.make(); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("a long directory: %v", err)
	}
}

func TestGuestDirs(t *testing.T) {
	d := guestDirs{paths{dir: t.TempDir(), runDir: t.TempDir()}}
	dir, err := d.Make("M-1")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := d.Make("M-1"); err != nil || again != dir {
		t.Errorf("again: %s, %v", again, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "console.log"), append(bytes.Repeat([]byte("x"), keptConsole), "the end"...), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Remove("M-1", "M")
	if kept := d.Kept(); !slices.Equal(kept, []string{"M"}) {
		t.Errorf("kept: %v", kept)
	}
	if log, err := (consoles{paths: d.paths}).Kept("M"); err != nil || len(log) != keptConsole || !bytes.HasSuffix(log, []byte("xthe end")) {
		t.Errorf("kept: %d bytes, %v", len(log), err)
	}
	d.Remove("M-2", "M") // which never printed anything
	d.Forget("M")
	if kept := d.Kept(); len(kept) != 0 {
		t.Errorf("forgotten: %v", kept)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("after its removal: %v", err)
	}
}

func TestMeminfo(t *testing.T) {
	total, available, err := parseMeminfo([]byte("MemTotal:       1000 kB\nMemFree: 5 kB\nMemAvailable:    400 kB\nHugePages_Total:  0\n"))
	if err != nil || total != 1000<<10 || available != 400<<10 {
		t.Errorf("got %d, %d, %v", total, available, err)
	}
	for _, bad := range []string{"", "MemTotal: x kB", "MemTotal: 99999999999999999999 kB"} {
		if _, _, err := parseMeminfo([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	dir := t.TempDir()
	has, err := findResources(dir)
	if err != nil {
		t.Fatal(err)
	}
	capacity, used, err := has.measure()
	if err != nil || capacity.GetCpus() == 0 || capacity.GetMemoryBytes() == 0 || capacity.GetDiskBytes() == 0 ||
		used.GetMemoryBytes() > capacity.GetMemoryBytes() || used.GetDiskBytes() > capacity.GetDiskBytes() {
		t.Errorf("of %v are used %v, %v", capacity, used, err)
	}
	file, largest := filepath.Join(dir, "file"), int64(capacity.GetLargestFileBytes())
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, largest); err != nil {
		t.Errorf("a file can have %d bytes: %v", largest, err)
	}
	if err := os.Truncate(file, largest+1<<20); err == nil {
		t.Errorf("a file can have more than %d bytes", largest)
	}
}

func FuzzMeminfo(f *testing.F) {
	f.Add([]byte("MemTotal: 1 kB\nMemAvailable: 2 kB"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _, _ = parseMeminfo(b) })
}

func TestDiffers(t *testing.T) {
	capacity := &argonv1.Resources{MemoryBytes: 1000, DiskBytes: 1000}
	a := &argonv1.Resources{MemoryBytes: 500, DiskBytes: 500}
	for want, b := range map[bool]*argonv1.Resources{
		false: {MemoryBytes: 510, DiskBytes: 490},
		true:  {MemoryBytes: 500, DiskBytes: 489},
	} {
		if differs(capacity, a, b) != want || differs(capacity, b, a) != want {
			t.Errorf("%v and %v: want %v", a, b, want)
		}
	}
}

func TestGuestPorts(t *testing.T) {
	g := newGuestPorts("S")
	m := &argonv1.Machine{Meta: &argonv1.Meta{Id: "M"}, Ports: []*argonv1.PublishedPort{
		{ClusterPort: 8080, GuestPort: 80}, {ClusterPort: 8081, GuestPort: 80}, {ClusterPort: 22, GuestPort: 22},
	}}
	first, err := g.Open(t.Context(), m, "M-1")
	if err != nil || len(first) != 2 {
		t.Fatalf("got %v, %v", first, err)
	}
	web := network.Target{MachineID: "M", GuestPort: 80}
	address, ok := g.lookup(web)
	at := netip.AddrPortFrom(netip.MustParseAddr(first[0].HostAddress), uint16(first[0].HostPort))
	if !ok || address != at.String() || first[0].GuestPort != 80 {
		t.Errorf("port 80 is at %q, opened %v", address, first)
	}
	again, err := newGuestPorts("S").Open(t.Context(), m, "M-1")
	if err != nil || again[0] != first[0] || again[1] != first[1] {
		t.Errorf("after a restart: %v, %v", again, err)
	}
	g.Close("M-1")
	if _, ok := g.lookup(web); ok {
		t.Error("still led to a guest that is gone")
	}
}

func TestPublications(t *testing.T) {
	if got := publications(nil); got != nil {
		t.Errorf("of nothing: %v", got)
	}
	got := publications(&catalog.State{Machines: map[string]*argonv1.Machine{
		"M": {
			Meta: &argonv1.Meta{Name: "web"}, ServerId: "S", Placement: 3,
			Ports: []*argonv1.PublishedPort{{ClusterPort: 8080, GuestPort: 80}},
		},
	}})
	want := network.Publication{
		Port: 8080, Target: network.Target{MachineID: "M", GuestPort: 80}, Machine: "web", ServerID: "S", Placement: 3,
	}
	if len(got) != 1 || got[0] != want {
		t.Errorf("got %v", got)
	}
}
