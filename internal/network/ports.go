package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"time"
)

// Publication is one published port as it should be: what comes to Port on
// every server's address goes to the machine.
type Publication struct {
	Port    uint16
	Target  Target
	Machine string // its name, for messages
	// ServerID is where the machine runs; empty: nowhere now.
	ServerID string
	// Placement tells one start of the machine from the next: connections end
	// when it changes.
	Placement uint64
}

// Options are what Ports is made with.
type Options struct {
	// Address is the one this server listens on.
	Address  string
	ServerID string
	// Published returns what is published now, and a channel that is closed
	// when that may have changed.
	Published func() ([]Publication, <-chan struct{})
	// LocalPort finds where on 127.0.0.1 the monitor forwards to a guest that
	// runs here.
	LocalPort func(Target) (address string, ok bool)
	// Dial opens a connection to another server's data port with [ALPN].
	Dial func(ctx context.Context, serverID string) (net.Conn, error)
	// Busy is told when a port can not be listened on, once until it could, and with
	// nil when it can after all, or is published no more.
	Busy func(Publication, error)
	Log  *slog.Logger
	// Rate is how many bytes per second a machine's published ports may carry
	// each way; 0: no limit. nil: nobody has one.
	Rate func(machineID string) uint64
	// MaxConns bounds the connections carried at once, each way of counting:
	// those accepted here, and the tunnels served here.
	MaxConns int
	// RetryAfter is the pause before a port that was in use is tried again.
	RetryAfter time.Duration
	// Listen is net.ListenConfig's, or a test's.
	Listen func(ctx context.Context, network, address string) (net.Listener, error)
}

// Ports serves the published ports of one server.
type Ports struct {
	o         Options
	accepted  chan struct{} // one token for each accepted connection
	tunnelled chan struct{}
	rates     rates

	mu        sync.Mutex
	listeners map[uint16]*listener
}

// NewPorts fills in what Options leave open: 4096 connections, 2 s.
func NewPorts(o Options) *Ports {
	if o.MaxConns == 0 {
		o.MaxConns = 4096
	}
	if o.RetryAfter == 0 {
		o.RetryAfter = 2 * time.Second
	}
	if o.Listen == nil {
		o.Listen = new(net.ListenConfig).Listen
	}
	return &Ports{
		o:         o,
		accepted:  make(chan struct{}, o.MaxConns),
		tunnelled: make(chan struct{}, o.MaxConns),
		rates:     rates{limit: o.Rate},
		listeners: map[uint16]*listener{},
	}
}

// Run makes what is listened on equal to what is published, until ctx ends.
// Then all connections are closed.
func (p *Ports) Run(ctx context.Context) error {
	defer p.reconcile(ctx, nil)
	for {
		published, changed := p.o.Published()
		var retry <-chan time.Time
		if !p.reconcile(ctx, published) {
			retry = time.After(p.o.RetryAfter)
		}
		select {
		case <-changed:
		case <-retry:
		case <-ctx.Done():
			return nil
		}
	}
}

// reconcile tells whether everything is as it should be.
func (p *Ports) reconcile(ctx context.Context, published []Publication) bool {
	want := map[uint16]Publication{}
	for _, pub := range published {
		want[pub.Port] = pub
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for port, l := range p.listeners {
		if _, ok := want[port]; !ok {
			l.close()
			l.mended()
			delete(p.listeners, port)
		}
	}
	good := true
	for port, pub := range want {
		l := p.listeners[port]
		if l == nil {
			l = &listener{ports: p}
			p.listeners[port] = l
		}
		l.point(pub)
		good = l.open(ctx) && good
	}
	return good
}

// listener serves one published port. Its fields but pub and conns belong to
// reconcile.
type listener struct {
	ports  *Ports
	ln     net.Listener
	told   bool // that the port is in use
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu    sync.Mutex
	pub   Publication
	conns map[*carried]struct{}
}

// carried is one accepted connection.
type carried struct {
	cancel context.CancelFunc
}

// point sends new connections to where the machine is now and ends those to
// where it was.
func (l *listener) point(pub Publication) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pub == pub {
		return
	}
	l.pub = pub
	for c := range l.conns {
		c.cancel()
	}
}

func (l *listener) open(ctx context.Context) bool {
	if l.ln != nil {
		return true
	}
	o := &l.ports.o
	address := net.JoinHostPort(o.Address, strconv.Itoa(int(l.pub.Port)))
	ln, err := o.Listen(ctx, "tcp", address)
	if err != nil {
		if !l.told && ctx.Err() == nil {
			l.told = true
			o.Log.Warn("published port cannot be served", "machine", l.pub.Machine, "port", l.pub.Port, "err", err)
			o.Busy(l.pub, err)
		}
		return false
	}
	l.ln = ln
	l.mended()
	ctx, l.cancel = context.WithCancel(ctx)
	l.done.Go(func() { l.serve(ctx, ln) })
	return true
}

// mended tells that the port is in use no more, if it was told that it is.
func (l *listener) mended() {
	if l.told {
		l.told = false
		l.ports.o.Busy(l.pub, nil)
	}
}

func (l *listener) close() {
	if l.ln == nil {
		return
	}
	_ = l.ln.Close()
	l.cancel()
	l.done.Wait()
	l.ln = nil
}

func (l *listener) serve(ctx context.Context, ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			l.ports.o.Log.Warn("published port: accepting a connection", "port", l.pub.Port, "err", err)
			select {
			case <-time.After(100 * time.Millisecond): // too many open files
				continue
			case <-ctx.Done():
				return
			}
		}
		select {
		case l.ports.accepted <- struct{}{}:
		default:
			reset(conn)
			continue
		}
		l.done.Go(func() {
			defer func() { <-l.ports.accepted }()
			l.carry(ctx, conn)
		})
	}
}

// carry serves one accepted connection until it ends, or until the machine is
// somewhere else.
func (l *listener) carry(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &carried{cancel: cancel}
	l.mu.Lock()
	pub := l.pub
	if l.conns == nil {
		l.conns = map[*carried]struct{}{}
	}
	l.conns[c] = struct{}{}
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.conns, c)
		l.mu.Unlock()
	}()
	guest, err := l.ports.reach(ctx, pub)
	if err != nil {
		l.ports.o.Log.Debug("published port: no way to the machine", "machine", pub.Machine, "port", pub.Port, "err", err)
		reset(conn)
		return
	}
	spliceUntil(ctx, conn, guest)
}

// reach connects to the guest, wherever it is.
func (p *Ports) reach(ctx context.Context, pub Publication) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, headerTimeout)
	defer cancel()
	switch pub.ServerID {
	case "":
		return nil, fmt.Errorf("machine %s does not run", pub.Machine)
	case p.o.ServerID:
		return p.reachLocal(ctx, pub.Target)
	}
	conn, err := p.o.Dial(ctx, pub.ServerID)
	if err != nil {
		return nil, err
	}
	if err := openTunnel(ctx, conn, pub.Target); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

func (p *Ports) reachLocal(ctx context.Context, t Target) (net.Conn, error) {
	address, ok := p.o.LocalPort(t)
	if !ok {
		return nil, fmt.Errorf("machine %s: port %d is not forwarded here", t.MachineID, t.GuestPort)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	// The dialling's end is not the connection's.
	return p.rates.of(context.WithoutCancel(ctx), t.MachineID, conn), nil
}

// ServeTunnel serves a tunnel that another server opened, until it ends or ctx
// does. It closes conn. The caller has checked that the peer is a server of
// this cluster.
func (p *Ports) ServeTunnel(ctx context.Context, conn net.Conn) {
	guest, err := p.acceptTunnel(ctx, conn)
	if err != nil {
		p.o.Log.Debug("tunnel to a machine refused", "err", err)
		_ = conn.Close()
		return
	}
	defer func() { <-p.tunnelled }()
	spliceUntil(ctx, conn, guest)
}

// acceptTunnel takes a token of tunnelled when it succeeds.
func (p *Ports) acceptTunnel(ctx context.Context, conn net.Conn) (guest net.Conn, err error) {
	answer := func(b byte) error {
		_, err := conn.Write([]byte{b})
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(headerTimeout)); err != nil {
		return nil, err
	}
	target, err := readHeader(conn)
	if err != nil {
		return nil, err
	}
	select {
	case p.tunnelled <- struct{}{}:
	default:
		return nil, errors.Join(errors.New("too many tunnels"), answer(tunnelBusy))
	}
	defer func() {
		if err != nil {
			<-p.tunnelled
		}
	}()
	dialling, cancel := context.WithTimeout(ctx, headerTimeout)
	defer cancel()
	guest, err = p.reachLocal(dialling, target)
	if err != nil {
		return nil, errors.Join(err, answer(tunnelNowhere))
	}
	if err := errors.Join(answer(tunnelReady), conn.SetDeadline(time.Time{})); err != nil {
		_ = guest.Close()
		return nil, err
	}
	return guest, nil
}

// spliceUntil is splice with an end from outside.
func spliceUntil(ctx context.Context, a, b net.Conn) {
	stop := context.AfterFunc(ctx, func() {
		reset(a)
		reset(b)
	})
	defer stop()
	splice(a, b)
}
