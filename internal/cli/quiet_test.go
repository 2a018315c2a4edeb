package cli

import (
	"bytes"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
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
		if name == "SIGHUP" && signal.Ignored(syscall.SIGHUP) {
			t.Log("SIGHUP is ignored here, as under nohup, and commands leave it so")
			continue
		}
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

// TestConsoleOfAMachineThatIsStarted: it says what it waits for, can be left
// meanwhile, and opens when the machine runs.
func TestConsoleOfAMachineThatIsStarted(t *testing.T) {
	pending, starting := argonv1.MachineState_MACHINE_STATE_PENDING, argonv1.MachineState_MACHINE_STATE_STARTING
	for name, tt := range map[string]struct {
		states []argonv1.MachineState
		leave  func(person *os.File) error
	}{
		"it runs":           {states: []argonv1.MachineState{pending, starting, argonv1.MachineState_MACHINE_STATE_RUNNING}},
		"left with the key": {states: []argonv1.MachineState{pending}},
		"SIGTERM": {states: []argonv1.MachineState{starting}, leave: func(*os.File) error {
			return syscall.Kill(os.Getpid(), syscall.SIGTERM)
		}},
	} {
		dir := serveFake(t, &fakeAPI{states: tt.states})
		person, program := openTerminal(t)
		out := &told{word: "WEB", done: make(chan struct{})}
		errs := &told{word: "machine web does not run yet (for a reason): its console opens when it does; ctrl-] leaves\n", done: make(chan struct{})}
		ended := make(chan int, 1)
		go func() {
			ended <- Main([]string{"--dir", dir, "machine", "console", "web"}, "test", program, out, errs)
		}()
		await := func(what string, done <-chan struct{}) {
			t.Helper()
			select {
			case <-done:
			case code := <-ended:
				t.Fatalf("%s: it ended with %d before %s", name, code, what)
			case <-time.After(30 * time.Second):
				t.Fatalf("%s: never %s", name, what)
			}
		}
		await("it said what it waits for", errs.done)
		if len(tt.states) > 1 {
			await("it opened", out.done)
		}
		if tt.leave == nil {
			tt.leave = func(person *os.File) error {
				_, err := person.Write([]byte{detachKey})
				return err
			}
		}
		if err := tt.leave(person); err != nil {
			t.Fatal(err)
		}
		select {
		case code := <-ended:
			if code != exitOK {
				t.Errorf("%s: exit code %d", name, code)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: it can't be left", name)
		}
	}
}
