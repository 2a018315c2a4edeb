package qga

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// agent plays the guest's side: before comes first, whatever was asked; then it
// answers each command with what answer returns.
func agent(t *testing.T, before string, answer func(command string) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	t.Cleanup(func() { _ = ours.Close(); _ = theirs.Close(); <-done })
	go func() {
		defer close(done)
		in := bufio.NewReader(theirs)
		first := true
		for {
			line, err := in.ReadBytes('\n')
			if err != nil {
				return
			}
			var m struct {
				Execute   string
				Arguments struct{ ID int64 }
			}
			if json.Unmarshal(bytes.TrimLeft(line, "\xff"), &m) != nil {
				continue
			}
			out := answer(m.Execute)
			if m.Execute == "guest-sync-delimited" {
				out = fmt.Sprintf("\xff{\"return\": %d}\n", m.Arguments.ID)
			}
			if first {
				out, first = before+out, false
			}
			if _, err := io.WriteString(theirs, out); err != nil {
				return
			}
		}
	}()
	return ours
}

func TestTalk(t *testing.T) {
	for name, before := range map[string]string{
		"nothing before":           "",
		"an answer of before":      `{"return": 7}` + "\n",
		"half an answer of before": `{"retu`,
		"somebody else's sync":     "\xff{\"return\": 7}\n",
		"noise":                    strings.Repeat("noise\n", 1000),
		"delimiters":               "\xff\xff\xff\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := New(t.Context(), agent(t, before, func(string) string { return `{"return": {"host-name": "web"}}` + "\n" }))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var got struct {
				Name string `json:"host-name"`
			}
			if err := c.Execute(t.Context(), "guest-get-host-name", nil, &got); err != nil || got.Name != "web" {
				t.Errorf("got %q, %v", got.Name, err)
			}
		})
	}
}

func TestBadAnswers(t *testing.T) {
	var refusal *Error
	for name, c := range map[string]struct {
		answer string
		is     func(error) bool
	}{
		"a refusal":       {`{"error": {"class": "CommandNotFound", "desc": "no"}}` + "\n", func(err error) bool { return errors.As(err, &refusal) && refusal.Desc == "no" }},
		"no JSON":         {"hello\n", babble},
		"nothing in it":   {"{}\n", babble},
		"something else":  {`{"return": "text"}` + "\n", babble},
		"an endless line": {strings.Repeat("x", maxAnswer+5000) + "\n", babble},
	} {
		t.Run(name, func(t *testing.T) {
			client, err := New(t.Context(), agent(t, "", func(string) string { return c.answer }))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			var n int
			if err := client.Execute(t.Context(), "guest-x", nil, &n); !c.is(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func babble(err error) bool { return errors.Is(err, ErrBabble) }

// TestSilence: one that never answers is waited for as long as the caller says.
func TestSilence(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		in := bufio.NewReader(theirs)
		_, _ = in.ReadBytes('\n')
	}()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	if _, err := New(ctx, ours); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestFlood: one that never stops is not listened to for ever.
func TestFlood(t *testing.T) {
	for name, flood := range map[string]string{"noise": strings.Repeat("x", 4096), "delimiters": "\xff{}\n"} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			done := make(chan struct{})
			go func() {
				defer close(done)
				in := bufio.NewReader(theirs)
				_, _ = in.ReadBytes('\n')
				for {
					if _, err := io.WriteString(theirs, flood); err != nil {
						return
					}
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if _, err := New(ctx, ours); !errors.Is(err, ErrBabble) {
				t.Errorf("got %v", err)
			}
			_ = theirs.Close()
			<-done
		})
	}
}

func FuzzAnswers(f *testing.F) {
	f.Add([]byte("\xff{\"return\": 5}\n{\"return\": {}}\n"))
	f.Add([]byte("\xff\xff\n{\"error\": {\"desc\": \"no\"}}\n"))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &Client{conn: deafConn{}, in: bufio.NewReader(bytes.NewReader(b))}
		if c.sync(5) != nil {
			return
		}
		var result map[string]any
		_ = c.Execute(t.Context(), "guest-x", nil, &result)
	})
}

// deafConn takes everything.
type deafConn struct{ net.Conn }

func (deafConn) Write(p []byte) (int, error) { return len(p), nil }
func (deafConn) SetDeadline(time.Time) error { return nil }
