package cli

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openTerminal makes a terminal: what a person holds of it, and the other end.
func openTerminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no terminals here:", err)
	}
	t.Cleanup(func() { _ = person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(filepath.Join("/dev/pts", strconv.Itoa(n)), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = program.Close() })
	return person, program
}

// told closes a channel when a word was written to it.
type told struct {
	word string
	seen bytes.Buffer
	done chan struct{}
}

func (w *told) Write(p []byte) (int, error) {
	before := bytes.Contains(w.seen.Bytes(), []byte(w.word))
	w.seen.Write(p)
	if !before && bytes.Contains(w.seen.Bytes(), []byte(w.word)) {
		close(w.done)
	}
	return len(p), nil
}

// TestQuietConsoleIsLeft: the console of a machine that prints nothing more is
// left by the key and by each signal, and the terminal is as it was.
func TestQuietConsoleIsLeft(t *testing.T) {
	dir := serveFake(t, &fakeAPI{})
	for name, leave := range map[string]func(person *os.File) error{
		"ctrl-]": func(person *os.File) error {
			_, err := person.Write([]byte{detachKey})
			return err
		},
		"SIGTERM": func(*os.File) error { return syscall.Kill(os.Getpid(), syscall.SIGTERM) },
		"SIGHUP":  func(*os.File) error { return syscall.Kill(os.Getpid(), syscall.SIGHUP) },
	} {
		for range 5 { // without the mend, some rounds end
			person, program := openTerminal(t)
			before, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
			if err != nil {
				t.Fatal(err)
			}
			out := &told{word: "WEB", done: make(chan struct{})}
			ended := make(chan int, 1)
			go func() {
				ended <- Main([]string{"--dir", dir, "machine", "console", "web"}, "test", program, out, io.Discard)
			}()
			<-out.done
			if err := leave(person); err != nil {
				t.Fatal(err)
			}
			select {
			case code := <-ended:
				if code != exitOK {
					t.Errorf("%s: exit code %d", name, code)
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("%s: the console of a quiet machine can't be left", name)
			}
			after, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
			if err != nil || *after != *before {
				t.Errorf("%s: the terminal is not as it was: %v", name, err)
			}
		}
	}
}
