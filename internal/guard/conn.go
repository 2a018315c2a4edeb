package guard

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"time"
)

// conn is the guard's end of the connection to one daemon.
type conn struct {
	nc     *net.UnixConn
	guests *guests
	shelf  *shelf
	// ready is called when the daemon says that it has started.
	ready   func()
	manager manager

	sending sync.Mutex
}

// writeTimeout bounds how long a daemon that hangs may hold up the guard's
// answers; whoever sends them waits for nothing else.
const writeTimeout = time.Second

// serve carries out the daemon's requests until the connection ends. Anything
// that is no request ends it.
func (c *conn) serve(ctx context.Context) error {
	var jobs sync.WaitGroup
	defer jobs.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	files := &fileReader{conn: c.nc}
	defer files.close()
	in := lines(files)
	for in.Scan() {
		r, err := parseRequest(in.Bytes())
		if err == nil && r.Op == opKeep {
			r.file, err = files.next()
		}
		if err != nil {
			_ = c.nc.Close()
			return err
		}
		do := c.begin(ctx, r)
		// A kill waits for the guest's end; a renewal must not wait for that.
		jobs.Go(do)
	}
	if err := in.Err(); err != nil {
		return fmt.Errorf("reading the daemon's requests: %w", err)
	}
	return nil
}

// begin does what must be done before the next request is read, and returns the
// rest: a kill that follows a start must find that guest.
func (c *conn) begin(ctx context.Context, r request) (rest func()) {
	if r.Op != opStart {
		return func() { c.handle(ctx, r) }
	}
	place, err := c.guests.reserve(r.Process.ID)
	return func() {
		a := answer{Seq: r.Seq}
		if err == nil {
			a.PID, err = c.guests.start(*r.Process, place)
		}
		a.fail(err)
		c.send(a)
	}
}

func (c *conn) handle(ctx context.Context, r request) {
	a := answer{Seq: r.Seq}
	var err error
	switch r.Op {
	case opReady:
		c.ready()
	case opDeadline:
		err = c.guests.extend(r.Until)
	case opKill:
		err = c.guests.kill(ctx, r.ID)
	case opLimit:
		err = c.guests.limit(r.ID, r.Limits)
	case opAbout:
		a.About = c.guests.about()
	case opKeep:
		err = c.shelf.keep(r.ID, r.file)
	case opLower:
		err = c.guests.lower(r.Until)
	case opStatus:
		c.manager.status(r.Serving, r.Text)
	case opDrop:
		c.shelf.drop(r.ID)
	case opList:
		// The news that a guest has ended must come after every list that
		// has it.
		c.sending.Lock()
		defer c.sending.Unlock()
		a.Guests = c.guests.list()
		c.write(a)
		return
	}
	a.fail(err)
	c.send(a)
}

// send sends one line.
func (c *conn) send(a answer) {
	c.sending.Lock()
	defer c.sending.Unlock()
	c.write(a)
}

// write is send for whoever holds the lock. If the daemon does not take it, the
// connection is over, and with it the daemon.
func (c *conn) write(a answer) {
	line, err := json.Marshal(a)
	if err == nil {
		_ = c.nc.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, err = c.nc.Write(append(line, '\n'))
	}
	if err != nil {
		_ = c.nc.Close()
	}
}
