package e2e_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/argon-cluster/argon/test/harness"
)

// database is the guest's PostgreSQL, reached from outside.
type database struct {
	t   *testing.T
	url string
	// confirmed is the highest number whose COMMIT was confirmed; so were all
	// below it.
	confirmed atomic.Int64
}

const (
	connectWithin = 10 * time.Second
	queryWithin   = 20 * time.Second
)

// session runs f with a connection of its own.
func (d *database) session(ctx context.Context, f func(context.Context, *pgx.Conn) error) error {
	short, cancel := context.WithTimeout(ctx, connectWithin)
	defer cancel()
	conn, err := pgx.Connect(short, d.url)
	if err != nil {
		return err
	}
	err = f(ctx, conn)
	short, cancel = context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_ = conn.Close(short) // it may be broken already
	return err
}

// until tries again until f succeeds.
func (d *database) until(what string, f func(context.Context, *pgx.Conn) error) {
	d.t.Helper()
	var err error
	for deadline := time.Now().Add(harness.Patience); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(d.t.Context(), connectWithin+queryWithin)
		err = d.session(ctx, f)
		cancel()
		if err == nil {
			return
		}
	}
	d.t.Fatalf("%s: %v", what, err)
}

// write commits one number after the other until the returned function is
// called.
func (d *database) write() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_ = d.session(ctx, d.insert) // broken by the kill; it connects again
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// insert commits until something breaks.
func (d *database) insert(ctx context.Context, conn *pgx.Conn) error {
	// What was committed without a confirmation counts as confirmed once it
	// is seen.
	var highest int64
	if err := conn.QueryRow(ctx, "SELECT coalesce(max(n), 0) FROM t").Scan(&highest); err != nil {
		return err
	}
	if confirmed := d.confirmed.Load(); highest < confirmed {
		d.t.Errorf("LOST: the COMMIT of %d was confirmed, and %d is the highest that is there", confirmed, highest)
	}
	d.confirmed.Store(highest)
	for n := highest + 1; ; n++ {
		short, cancel := context.WithTimeout(ctx, queryWithin)
		_, err := conn.Exec(short, "INSERT INTO t VALUES ($1)", n)
		cancel()
		if err != nil {
			return err
		}
		d.confirmed.Store(n)
	}
}
