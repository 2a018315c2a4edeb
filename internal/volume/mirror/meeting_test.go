package mirror

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestMeeting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Meeting{Patience: time.Second}
		met := make(chan error, 8)
		come := func(ctx context.Context, name string, size int) {
			go func() { met <- m.Meet(ctx, name, size) }()
			synctest.Wait()
		}
		ctx := t.Context()

		come(ctx, "a", 2)
		come(ctx, "b", 2)
		if len(met) != 0 {
			t.Fatal("somebody met alone")
		}
		come(ctx, "a", 2)
		for range 2 {
			if err := <-met; err != nil {
				t.Errorf("two of two: %v", err)
			}
		}
		time.Sleep(2 * time.Second)
		if err := <-met; err == nil {
			t.Error("one of two met")
		}

		// One who has given up does not count for those who come later.
		ended, end := context.WithCancelCause(ctx)
		come(ended, "c", 2)
		end(errors.New("the attachment ended"))
		if err := <-met; err == nil {
			t.Error("one whose attachment ended has met")
		}
		come(ctx, "c", 2)
		if len(met) != 0 {
			t.Error("somebody met one who had left")
		}
		come(ctx, "c", 2)
		for range 2 {
			if err := <-met; err != nil {
				t.Errorf("two of two again: %v", err)
			}
		}
	})
}

// Volumes that were not ready together try again; who waits for them sees it.
func TestInstantOfThoseWhoComeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Meeting{Patience: time.Second}
		stopped, done := false, make(chan error, 1)
		go func() {
			done <- m.Instant(t.Context(), "g", 2, func(context.Context) error { stopped = true; return nil })
		}()
		met := make(chan error, 8)
		come := func(where string) {
			go func() { met <- m.Meet(t.Context(), "g/"+where, 3) }()
			synctest.Wait()
		}
		come(whenReady)
		if err := <-met; err == nil {
			t.Fatal("one of two met")
		}
		for _, where := range []string{whenReady, whenStill} {
			come(where)
			come(where)
			for range 2 {
				if err := <-met; err != nil {
					t.Errorf("%s: %v", where, err)
				}
			}
		}
		if err := <-done; err != nil || !stopped {
			t.Errorf("the instant: %v, stopped: %v", err, stopped)
		}
		if err := m.Instant(t.Context(), "nobody", 1, nil); err == nil || len(m.groups) != 0 {
			t.Errorf("of nobody: %v, and %d are remembered", err, len(m.groups))
		}
	})
}
