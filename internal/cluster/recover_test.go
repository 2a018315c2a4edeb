package cluster

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// recover makes a server that is down the only voter, and starts it.
func (s *testServer) recover(file string) string {
	s.w.t.Helper()
	r, err := PrepareRecovery(s.w.t.Context(), RecoverOptions{Dir: s.options.Dir, File: file})
	if err != nil {
		s.w.t.Fatal(err)
	}
	if _, err := r.Carry(s.w.t.Context()); err != nil {
		s.w.t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		s.w.t.Fatal(err)
	}
	s.open()
	s.up()
	return r.Source
}

// volume makes a record that is to survive.
func (s *testServer) volume(name string) {
	s.w.t.Helper()
	if err := s.member.Store().Volumes.Create(s.w.t.Context(), &argonv1.Volume{Meta: &argonv1.Meta{Name: name}, SizeBytes: 1 << 20}); err != nil {
		s.w.t.Fatal(err)
	}
}

func (s *testServer) hasVolume(name string) {
	s.w.t.Helper()
	if _, err := s.member.Store().Volumes.ByName(s.w.t.Context(), name); err != nil {
		s.w.t.Error(err)
	}
}

func (s *testServer) rejoin(at *testServer) error {
	s.w.t.Helper()
	_, _, err := Rejoin(s.w.t.Context(), s.options.Dir, at.options.Address, at.token(time.Hour), "", time.Now())
	return err
}

// TestRecoverFromOwnEtcd loses two of three voters. The third goes on with what it
// has; the others are refused when they come back, even though they are a majority
// of what there was, until they rejoin.
func TestRecoverFromOwnEtcd(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.first(), w.join(), w.join()
	w.votes(a, a, b, c)
	a.volume("d")
	for _, s := range w.all {
		s.down()
	}
	serial := serialOf(a.member.creds.own.Leaf)
	if from := a.recover(""); from != "this server's own etcd" {
		t.Errorf("recovered from %s", from)
	}
	a.works()
	a.hasVolume("d")
	w.votes(a, a)
	if list, err := a.member.Store().Servers.List(t.Context()); err != nil || len(list) != 3 {
		t.Errorf("the records have %d servers: %v", len(list), err)
	}
	if own, err := a.member.Server(t.Context()); err != nil || own.GetCertificateSerial() == serial {
		t.Errorf("the certificate is the old one: %v", err)
	}

	// Both of the dead at once: they have a majority of the old incarnation.
	for _, s := range []*testServer{b, c} {
		s.open()
		s.serve()
	}
	failed := make(chan error, 2)
	for _, s := range []*testServer{b, c} {
		s.loops.Go(func() { failed <- s.untilSuperseded() })
	}
	for range 2 {
		if err := <-failed; !errors.Is(err, ErrSuperseded) {
			t.Errorf("a dead server that came back: %v", err)
		}
	}
	for _, s := range []*testServer{b, c} {
		s.down()
		if _, err := Open(s.options); !errors.Is(err, ErrSuperseded) {
			t.Errorf("a superseded server is opened again: %v", err)
		}
		id := s.member.ID()
		if err := s.rejoin(a); err != nil {
			t.Fatal(err)
		}
		s.open()
		s.up()
		if s.member.ID() != id {
			t.Errorf("server %s came back as %s", id, s.member.ID())
		}
		s.hasVolume("d")
	}
	w.votes(a, a, b, c)
}

// untilSuperseded runs what a daemon runs until the server finds that its time is
// over.
func (s *testServer) untilSuperseded() error {
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	if err := s.member.Start(ctx); err != nil {
		return err
	}
	view := catalog.NewView(s.member.Store(), s.options.Log)
	s.loops.Go(func() { _ = view.Run(ctx) })
	s.loops.Go(func() { _ = s.member.KeepLease(ctx, nil, s.renewed) })
	s.loops.Go(func() {
		_ = s.member.Lead(ctx, func(ctx context.Context) error { return s.member.LeadIntroductions(ctx, view) })
	})
	return s.member.WatchSuccession(ctx)
}

// TestRecoverFromCopy recovers a server that never voted from the copies that it
// kept, of which the newest is damaged.
func TestRecoverFromCopy(t *testing.T) {
	w := newWorld(t)
	a, b := w.first(), w.join()
	a.volume("d")
	if err := b.member.copyCatalog(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.volume("later")
	b.options.Now = func() time.Time { return time.Now().Add(time.Minute) }
	b.member.opts.Now = b.options.Now
	if err := b.member.copyCatalog(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.down()
	b.down()
	all, err := directory(b.options.Dir).listCopies()
	if err != nil || len(all) != 2 {
		t.Fatalf("%d copies: %v", len(all), err)
	}
	damage(t, all[0].path)
	if from := b.recover(""); !strings.HasPrefix(from, "this server's copy of ") {
		t.Errorf("recovered from %s", from)
	}
	b.works()
	b.hasVolume("d")
	w.votes(b, b)
}

func damage(t *testing.T, path string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	content[len(content)/2] ^= 1
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *testServer) backup(path string) {
	s.w.t.Helper()
	var b bytes.Buffer
	if err := s.member.Backup(s.w.t.Context(), func(p []byte) error { b.Write(p); return nil }); err != nil {
		s.w.t.Fatal(err)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		s.w.t.Fatal(err)
	}
}

// TestRestoreBackup restores a backup on a host that has nothing else.
func TestRestoreBackup(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	a.volume("d")
	file := filepath.Join(t.TempDir(), "backup")
	a.backup(file)
	id := a.member.ID()
	a.down()
	fresh := w.server()
	for _, one := range []struct {
		name, address, why string
	}{{"s2", a.options.Address, "take its place with --name s1"}, {"s1", "", "others cannot reach"}} {
		r, err := PrepareRecovery(t.Context(), RecoverOptions{Dir: fresh.options.Dir, File: file, ServerName: one.name, Address: one.address, Ports: fresh.options.Ports})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Carry(t.Context()); err == nil || !strings.Contains(err.Error(), one.why) {
			t.Errorf("%s at %q: %v", one.name, one.address, err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	r, err := PrepareRecovery(t.Context(), RecoverOptions{Dir: fresh.options.Dir, File: file, ServerName: "s1", Address: fresh.options.Address, Ports: fresh.options.Ports})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Carry(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	fresh.open()
	fresh.up()
	fresh.works()
	fresh.hasVolume("d")
	if fresh.member.ID() != id {
		t.Errorf("it has not taken the place of s1")
	}
}

// TestBadBackups refuses what is no whole backup of this cluster, and leaves the
// directory as it was.
func TestBadBackups(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	a.backup(good)
	content, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	a.down()
	other := newWorld(t)
	o := other.first()
	o.backup(filepath.Join(dir, "other"))
	for name, b := range map[string][]byte{
		"empty": nil, "cut": content[:len(content)-1], "half": content[:len(content)/2], "head": content[:len(copyMagic)+10],
		"longer": append(bytes.Clone(content), 0), "text": []byte("not a backup\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "damaged"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	damage(t, filepath.Join(dir, "damaged"))
	before := listing(t, a.options.Dir)
	for _, name := range []string{"empty", "cut", "half", "head", "longer", "text", "damaged", "other", "absent"} {
		if _, err := PrepareRecovery(t.Context(), RecoverOptions{Dir: a.options.Dir, File: filepath.Join(dir, name)}); err == nil {
			t.Errorf("%s: taken for a backup of this cluster", name)
		} else if !strings.Contains(err.Error(), filepath.Join(dir, name)) {
			t.Errorf("%s: the error does not name it: %v", name, err)
		}
	}
	if after := listing(t, a.options.Dir); after != before {
		t.Errorf("the directory has changed:\n%s\nwas\n%s", after, before)
	}
	a.open()
	a.up()
	a.works()
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		all = append(all, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, "\n")
}

// TestSettleAgain cuts the change of identity short after each of its steps.
func TestSettleAgain(t *testing.T) {
	old := map[string]string{"ca.pem": "old", "etcd": "old", "server.json": "old"}
	staged := map[string]string{"ca.pem": "new", "succession.pem": "new", "server.json": "new"}
	fresh := func() directory {
		d := directory(t.TempDir())
		for name, content := range old {
			if err := d.write(name, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Mkdir(d.settled(), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, content := range staged {
			if err := directory(d.settled()).write(name, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := directory(d.settled()).write("kept", []byte("before"), 0o600); err != nil {
			t.Fatal(err)
		}
		return d
	}
	// What a crash leaves: some old parts away, or all and some new ones placed.
	steps := []func(directory){
		func(directory) {},
		func(d directory) { d.move(t, "etcd", "before/etcd") },
		func(d directory) {
			for name := range old {
				d.move(t, name, "before/"+name)
			}
		},
		func(d directory) {
			for name := range old {
				d.move(t, name, "before/"+name)
			}
			if err := d.write("settling/cleared", nil, 0o600); err != nil {
				t.Fatal(err)
			}
			d.move(t, "settling/succession.pem", "succession.pem")
		},
	}
	for i, step := range steps {
		d := fresh()
		if err := os.Mkdir(d.path("before"), 0o700); err != nil {
			t.Fatal(err)
		}
		step(d)
		if err := d.settleStaged(); err != nil {
			t.Fatal(err)
		}
		for name := range staged {
			if b, err := os.ReadFile(d.path(name)); err != nil || string(b) != "new" {
				t.Errorf("cut %d: %s is %q: %v", i, name, b, err)
			}
		}
		for name := range old {
			if b, err := os.ReadFile(d.path("before/" + name)); err != nil || string(b) != "old" {
				t.Errorf("cut %d: kept %s is %q: %v", i, name, b, err)
			}
		}
		if exists(d.path("etcd")) || exists(d.settled()) {
			t.Errorf("cut %d: something of before is left", i)
		}
	}
}

func (d directory) move(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(d.path(from), d.path(to)); err != nil {
		t.Fatal(err)
	}
}

// TestSuperfluous keeps the newest copies, then one a day, within bounds.
func TestSuperfluous(t *testing.T) {
	start := time.Date(2026, 3, 31, 23, 0, 0, 0, time.UTC)
	var all []storedCopy
	for i := range 24 * 14 {
		all = append(all, storedCopy{size: 1 << 20, head: CopyHead{Taken: start.Add(-time.Duration(i) * time.Hour)}})
	}
	if kept := len(all) - len(superfluous(all)); kept != keptHourly+keptDaily-1 {
		t.Errorf("%d are kept", kept)
	}
	for i := range all {
		all[i].size = keptBytes
	}
	if kept := len(all) - len(superfluous(all)); kept != 2 {
		t.Errorf("%d large ones are kept", kept)
	}
}

// TestSuccessionIsProven: only who belongs to the later incarnation can say so.
func TestSuccessionIsProven(t *testing.T) {
	now := time.Now()
	first, second := newTestAuthority(t), newTestAuthority(t)
	succession, err := first.certifySuccession(second, "c", 2, now)
	if err != nil {
		t.Fatal(err)
	}
	show := func(a *authority) *credentials {
		d := directory(t.TempDir())
		creds, err := certify(d, a, &argonv1.Server{Meta: &argonv1.Meta{Id: "x", Name: "x"}, Address: net.IPv4(127, 0, 0, 1).String()}, now)
		if err != nil {
			t.Fatal(err)
		}
		return creds
	}
	if n := supersededBy(append(chainOf(t, show(second)), succession), first.cert); n != 2 {
		t.Errorf("a proof of incarnation 2 counts as %d", n)
	}
	if n := supersededBy(append(chainOf(t, show(newTestAuthority(t))), succession), first.cert); n != 0 {
		t.Errorf("a proof in foreign hands counts as %d", n)
	}
	if n := supersededBy(append(chainOf(t, show(second)), succession), newTestAuthority(t).cert); n != 0 {
		t.Errorf("a proof for another cluster counts as %d", n)
	}
}

func newTestAuthority(t *testing.T) *authority {
	t.Helper()
	a, err := newAuthority("c", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func chainOf(t *testing.T, c *credentials) []*x509.Certificate {
	t.Helper()
	var chain []*x509.Certificate
	for _, der := range c.own.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	return chain
}
