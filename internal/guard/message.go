package guard

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/argon-cluster/argon/internal/cgroup"
)

// op is what the daemon asks for.
type op string

const (
	opReady    op = "ready"
	opDeadline op = "deadline"
	opStart    op = "start"
	opKill     op = "kill"
	opList     op = "list"
	opLimit    op = "limit"
	opAbout    op = "about"
	opKeep     op = "keep"
	opDrop     op = "drop"
	opLower    op = "lower"
	opStatus   op = "status"
)

// request is one line from the daemon; each has one answer, in any order.
type request struct {
	Seq     uint64        `json:"seq"`
	Op      op            `json:"op"`
	Until   time.Duration `json:"until,omitempty"`
	Process *Process      `json:"process,omitempty"`
	ID      string        `json:"id,omitempty"`
	Limits  cgroup.Limits `json:"limits,omitzero"`
	// Serving and Text are for the service manager.
	Serving bool   `json:"serving,omitempty"`
	Text    string `json:"text,omitempty"`

	// file comes beside the line.
	file *os.File
}

// About is what a guard has to end and to limit guests with.
type About struct {
	// Text says it in one line.
	Text string `json:"text"`
	// CPU and Memory can be limited.
	CPU    bool        `json:"cpu"`
	Memory bool        `json:"memory"`
	Groups cgroup.Dirs `json:"groups"`
}

// answer is one line from the guard: to a request, or, without a Seq, the news
// that a guest has ended.
type answer struct {
	Seq    uint64    `json:"seq,omitempty"`
	Error  string    `json:"error,omitempty"`
	Code   string    `json:"code,omitempty"`
	PID    int       `json:"pid,omitempty"`
	Guests []Running `json:"guests,omitempty"`
	Exited string    `json:"exited,omitempty"`
	About  *About    `json:"about,omitempty"`
}

// codes are the errors that callers decide by, as they travel.
var codes = map[string]error{"deadline": ErrDeadline, "exists": ErrExists, "limit": ErrCannotLimit}

// fail puts an error into an answer.
func (a *answer) fail(err error) {
	if err == nil {
		return
	}
	a.Error = err.Error()
	for code, known := range codes {
		if errors.Is(err, known) {
			a.Code = code
		}
	}
}

// err takes it out again.
func (a *answer) err() error {
	switch known := codes[a.Code]; {
	case known != nil:
		return known
	case a.Error != "":
		return errors.New(a.Error)
	}
	return nil
}

// maxLine bounds a line, in bytes: the arguments of a guest are its longest
// part.
const maxLine = 256 << 10

// lines reads what is sent, a line each.
func lines(r io.Reader) *bufio.Scanner {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 4096), maxLine)
	return s
}

// parseRequest reads a line. Whatever it is, the guard must live on.
func parseRequest(line []byte) (request, error) {
	var r request
	if err := json.Unmarshal(line, &r); err != nil {
		return r, fmt.Errorf("reading a request: %w", err)
	}
	switch {
	case r.Seq == 0:
		return r, errors.New("a request without a number")
	case r.Op == opStart && r.Process == nil:
		return r, errors.New("a start without a process")
	}
	switch r.Op {
	case opReady, opDeadline, opStart, opKill, opList, opLimit, opAbout, opKeep, opDrop, opLower, opStatus:
		return r, nil
	}
	return r, fmt.Errorf("a request for %q", r.Op)
}
