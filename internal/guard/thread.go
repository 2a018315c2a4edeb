package guard

import "runtime"

// thread is one thread of the operating system that all children are started
// from. To the kernel a child's parent is the thread that forked it: with
// PR_SET_PDEATHSIG a child dies when that thread ends, and Go ends threads when
// it likes, unless one is locked.
type thread struct {
	work chan func()
	done chan struct{}
}

func newThread() *thread {
	t := &thread{work: make(chan func()), done: make(chan struct{})}
	go func() {
		defer close(t.done)
		runtime.LockOSThread()
		for f := range t.work {
			f()
		}
	}()
	return t
}

// do runs f on the thread.
func (t *thread) do(f func() error) error {
	result := make(chan error, 1)
	t.work <- func() { result <- f() }
	return <-result
}

// close ends the thread, and with it every child that still runs.
func (t *thread) close() {
	close(t.work)
	<-t.done
}
