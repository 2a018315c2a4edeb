package daemon

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestBallastStep(t *testing.T) {
	const size = 48 << 20
	for name, tt := range map[string]struct {
		short bool
		free  uint64
		want  ballastChange
	}{
		"there is room":           {false, 1 << 30, leaveIt},
		"little is left":          {false, size / 2, leaveIt},
		"full":                    {false, size/3 - 1, giveUp},
		"to the last block":       {false, 0, giveUp},
		"full still":              {true, 0, leaveIt},
		"what was given is there": {true, size, leaveIt},
		"volumes keep so much":    {true, reserveBytes + size, leaveIt},
		"there is room again":     {true, 3 * size, take},
	} {
		if got := ballastStep(tt.short, tt.free, size); got != tt.want {
			t.Errorf("%s: got %v, want %v", name, got, tt.want)
		}
	}
	if size/shortPart+size > reserveBytes {
		t.Error("volumes would take what is given up")
	}
}

// A real file system is filled to the last block, and emptied again.
func TestBallast(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	b, err := openBallast(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	is := func(what string, short bool, atLeast uint64) {
		t.Helper()
		if err := b.look(); err != nil {
			t.Fatal(err)
		}
		free, _, err := roomIn(dir)
		if err != nil || free < atLeast || b.Short() != short || (b.problem() != "") != short {
			t.Errorf("%s: %d free, short %v, %q, %v", what, free, b.Short(), b.problem(), err)
		}
	}
	is("at the start", false, 0)
	free, _, _ := roomIn(dir)
	if want := uint64(64<<20 - 4<<20); free != want {
		t.Errorf("%d free, want %d", free, want)
	}
	filler := filepath.Join(dir, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(free)); err != nil {
		t.Fatal(err)
	}
	is("full", true, b.size)
	again, err := openBallast(dir, slog.New(slog.DiscardHandler))
	if err != nil || !again.Short() {
		t.Errorf("after a restart: short %v, %v", again.Short(), err)
	}
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	is("emptied", false, 0)
	if st, err := os.Stat(b.path()); err != nil || uint64(st.Size()) != b.size {
		t.Errorf("the file is not there again: %v", err)
	}
}
