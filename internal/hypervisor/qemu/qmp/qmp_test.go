package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const greeting = `{"QMP":{"version":{"qemu":{"micro":0,"minor":2,"major":7}},"capabilities":[]}}`

// monitor answers like QEMU, out of order and with events in between.
func monitor(t *testing.T, conn net.Conn, wg *sync.WaitGroup) {
	t.Helper()
	wg.Go(func() {
		defer conn.Close()
		fmt.Fprintln(conn, greeting)
		in := bufio.NewScanner(conn)
		var held string
		for in.Scan() {
			var r struct {
				Execute   string
				Arguments json.RawMessage
				ID        uint64
			}
			if err := json.Unmarshal(in.Bytes(), &r); err != nil {
				t.Errorf("got %s: %v", in.Bytes(), err)
				return
			}
			fmt.Fprintln(conn, `{"event":"TICK","data":{"n":1},"timestamp":{"seconds":1,"microseconds":2}}`)
			switch r.Execute {
			case "hold":
				held = fmt.Sprintf(`{"return":"held","id":%d}`, r.ID)
			case "fail":
				fmt.Fprintf(conn, `{"error":{"class":"GenericError","desc":"no"},"id":%d}`+"\n", r.ID)
			case "quit":
				return
			default:
				if r.Arguments == nil {
					r.Arguments = []byte("{}")
				}
				fmt.Fprintf(conn, `{"return":%s,"id":%d}`+"\n", r.Arguments, r.ID)
			}
			if held != "" && r.Execute != "hold" {
				fmt.Fprintln(conn, held)
				held = ""
			}
		}
	})
}

func TestClient(t *testing.T) {
	ours, theirs := net.Pipe()
	var wg sync.WaitGroup
	monitor(t, theirs, &wg)
	events := make(chan Event, 100)
	c, err := New(t.Context(), ours, func(e Event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	held := make(chan string, 1)
	wg.Go(func() {
		var s string
		if err := c.Execute(t.Context(), "hold", nil, &s); err != nil {
			t.Error(err)
		}
		held <- s
	})
	for done := false; !done; { // until the held one was overtaken
		var echo struct{ N int }
		if err := c.Execute(t.Context(), "echo", map[string]int{"N": 7}, &echo); err != nil || echo.N != 7 {
			t.Fatalf("echo: %+v, %v", echo, err)
		}
		select {
		case s := <-held:
			done = s == "held"
		default:
		}
	}
	var refusal *Error
	if err := c.Execute(t.Context(), "fail", nil, nil); !errors.As(err, &refusal) || refusal.Desc != "no" {
		t.Errorf("fail: %v", err)
	}
	if e := <-events; e.Name != "TICK" || string(e.Data) != `{"n":1}` {
		t.Errorf("event %+v", e)
	}
	if err := c.Execute(t.Context(), "quit", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	<-c.Done()
	_ = c.Close()
	wg.Wait()
}

func TestNoGreeting(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := New(ctx, ours, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// FuzzRead: whatever comes from the monitor, the client neither panics nor
// hangs.
func FuzzRead(f *testing.F) {
	f.Add([]byte(greeting + "\n" + `{"return":{},"id":1}` + "\n" + `{"event":"X"}`))
	f.Add([]byte(greeting + "\n" + greeting + "\n" + `{"id":18446744073709551615}` + "\n" + `[]`))
	f.Add([]byte("\n\n{"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		ours, theirs := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = theirs.Write(sent)
			_ = theirs.Close()
		})
		wg.Go(func() {
			var b [4096]byte
			for {
				if _, err := theirs.Read(b[:]); err != nil {
					return
				}
			}
		})
		if c, err := New(t.Context(), ours, nil); err == nil {
			_ = c.Execute(t.Context(), "x", nil, nil)
			_ = c.Close()
		}
		wg.Wait()
	})
}
